"""The full-size models by name, for programs that need no weights."""

from minigpt4_jax.config import LlmConfig, LoraConfig, ModelConfig, VisionConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.training import workdir
from minigpt4_jax.training.config import TrainConfig

LLAMA2 = LlmConfig(eps=1e-5, max_length=4096)

# Sizes of the released models; what the checkpoints say else (templates, ends) costs nothing.
SIZES = {
    "vicuna7b": ModelConfig(),
    "vicuna13b": ModelConfig(
        llm=LlmConfig(width=5120, layers=40, heads=40, kv_heads=40, ffn=13824)
    ),
    "llama2": ModelConfig(variant="minigpt4-llama2", qformer=None, merge_patches=4, llm=LLAMA2),
    "v2": ModelConfig(
        variant="minigpt-v2", qformer=None, merge_patches=4, llm=LLAMA2, lora=LoraConfig(),
        vision=VisionConfig(image_size=448), max_text_length=1024,
    ),
}  # fmt: skip


def size_of(c: TrainConfig, size: str | None) -> tuple[str, ModelConfig]:
    """(name, the model that a run's configuration is for): `size` if it is given, else the model
    directory it names, else the released model of its variant and width. UserError: unknown."""
    if size is None and c.model:
        return c.model, workdir.model_config(c)
    if size is None:
        named = {"minigpt4-llama2": "llama2", "minigpt-v2": "v2"}.get(c.variant, "vicuna7b")
        size = "vicuna13b" if c.llm_width == 5120 else named
    if size not in SIZES:
        raise UserError(f"--size={size}: expected one of {', '.join(SIZES)}")
    return size, workdir.adjusted(SIZES[size], c, size)
