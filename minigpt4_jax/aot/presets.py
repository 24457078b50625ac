"""Configurations of the released models by name, for programs that need no weights."""

from dataclasses import replace

from minigpt4_jax.config import (
    LlmConfig,
    LoraConfig,
    ModelConfig,
    QFormerConfig,
    VisionConfig,
    text_branch,
)
from minigpt4_jax.errors import UserError
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.model_config import override_model_config, read_model_config

_LLAMA2 = LlmConfig(eps=1e-5, max_length=4096)
_OPT = LlmConfig(
    model_type="opt", vocab=50272, width=2560, head_dim=80, ffn=10240, eps=1e-5, qkv_bias=True,
    o_bias=True, mlp_bias=True, tie=True, norm="layer", positions="learned", activation="relu",
    gated=False,
)  # fmt: skip
_T5 = LlmConfig(
    model_type="t5", vocab=32128, width=2048, layers=24, head_dim=64, ffn=5120, positions="relative",
    activation="gelu", scaled=False, encoder_layers=24,
)  # fmt: skip
_STAGE1 = QFormerConfig(vocab=30523, max_positions=512, itc_width=256, lm_head=True)


def _blip2(variant: str, llm: LlmConfig, qformer: QFormerConfig | None = None) -> ModelConfig:
    return ModelConfig(
        variant=variant, llm=llm, qformer=qformer or QFormerConfig(), image_first=True,
        max_text_length=32,
    )  # fmt: skip


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
    "blip2-stage1": _blip2("blip2-qformer", text_branch(_STAGE1), _STAGE1),
    "blip2-opt2.7b": _blip2("blip2-opt", _OPT),
    "blip2-opt6.7b": _blip2("blip2-opt", replace(_OPT, width=4096, head_dim=128, ffn=16384)),
    "blip2-flant5xl": _blip2("blip2-flant5", _T5),
    "blip2-flant5xxl": _blip2(
        "blip2-flant5", replace(_T5, width=4096, heads=64, kv_heads=64, ffn=10240)
    ),
}  # fmt: skip


def model_for(c: TrainConfig, preset: str | None) -> tuple[str, ModelConfig]:
    """(name, configuration) of the model of a run: `preset` if given, else the model directory of the
    training configuration, else the preset of its variant and width. UserError: unknown preset."""
    if preset is None and c.model:
        return c.model, read_model_config(c)
    if preset is None:
        same = [
            name
            for name, config in PRESETS.items()
            if config.variant == (c.variant or "minigpt4-vicuna")
        ]
        widths = [name for name in same if PRESETS[name].llm.width == c.llm_width]
        preset = (widths or same)[0]
    if preset not in PRESETS:
        raise UserError(f"--size={preset}: expected one of {', '.join(PRESETS)}")
    return preset, override_model_config(PRESETS[preset], c, preset)
