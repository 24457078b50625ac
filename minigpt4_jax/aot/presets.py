"""Configurations of the released models by name, for programs that need no weights."""

from minigpt4_jax.config import LlmConfig, LoraConfig, ModelConfig, VisionConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.model_config import override_model_config, read_model_config

_LLAMA2 = LlmConfig(eps=1e-5, max_length=4096)

# What else the checkpoints define (chat templates, stop symbols) does not affect the cost.
PRESETS = {
    "vicuna7b": ModelConfig(),
    "vicuna13b": ModelConfig(
        llm=LlmConfig(width=5120, layers=40, heads=40, kv_heads=40, ffn=13824)
    ),
    "llama2": ModelConfig(variant="minigpt4-llama2", qformer=None, merge_patches=4, llm=_LLAMA2),
    "v2": ModelConfig(
        variant="minigpt-v2", qformer=None, merge_patches=4, llm=_LLAMA2, lora=LoraConfig(),
        vision=VisionConfig(image_size=448), max_text_length=1024,
    ),
}  # fmt: skip


def model_for(c: TrainConfig, preset: str | None) -> tuple[str, ModelConfig]:
    """(name, configuration) of the model of a run: `preset` if given, else the model directory of the
    training configuration, else the preset of its variant and width. UserError: unknown preset."""
    if preset is None and c.model:
        return c.model, read_model_config(c)
    if preset is None:
        by_variant = {"minigpt4-llama2": "llama2", "minigpt-v2": "v2"}
        preset = "vicuna13b" if c.llm_width == 5120 else by_variant.get(c.variant, "vicuna7b")
    if preset not in PRESETS:
        raise UserError(f"--size={preset}: expected one of {', '.join(PRESETS)}")
    return preset, override_model_config(PRESETS[preset], c, preset)
