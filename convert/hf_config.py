"""LlmConfig of a Hugging Face config.json: the one place that knows model families by name."""

from typing import Any

from minigpt4_jax.config import LlmConfig, RopeScaling
from minigpt4_jax.errors import UserError

# Vicuna, LLaMA 1/2/3 and SmolLM2 are "llama"
SUPPORTED_LLMS = ("llama", "mistral", "qwen2", "qwen3")

# fields that a config.json must have
REQUIRED_LLM_FIELDS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"
)  # fmt: skip


def llm_config_from_hf(c: dict[str, Any]) -> LlmConfig:
    """The configuration of a language model. c: the values of its config.json, as transformers spells
    them. UserError: the architecture or a value is not supported, or a size is missing."""
    kind = c.get("model_type")
    if kind not in SUPPORTED_LLMS:
        raise UserError(
            f"language model: model_type {kind!r} is not supported; supported are "
            f"{', '.join(SUPPORTED_LLMS)} (LLaMA 1/2/3, Vicuna, SmolLM2 are 'llama')"
        )
    if missing := [k for k in REQUIRED_LLM_FIELDS if k not in c]:
        raise UserError(f"language model config.json: missing {', '.join(missing)}")
    if (act := c.get("hidden_act", "silu")) != "silu":
        raise UserError(f"language model: hidden_act {act!r} is not supported; expected 'silu'")
    heads = c["num_attention_heads"]
    bias = bool(c.get("attention_bias", False))
    rope = c.get("rope_parameters") or {}
    return LlmConfig(
        model_type=kind,
        vocab=c["vocab_size"],
        width=c["hidden_size"],
        layers=c["num_hidden_layers"],
        heads=heads,
        kv_heads=c.get("num_key_value_heads") or heads,
        head_dim=c.get("head_dim") or c["hidden_size"] // heads,
        ffn=c["intermediate_size"],
        eps=c.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta") or c.get("rope_theta") or 10000.0),
        rope_scaling=_rope_scaling(c.get("rope_scaling") or rope, c),
        qkv_bias=bias or kind == "qwen2",
        o_bias=bias and kind != "qwen2",
        mlp_bias=bool(c.get("mlp_bias", False)),
        qk_norm=kind == "qwen3",
        tie=bool(c.get("tie_word_embeddings", False)),
        window=_window(kind, c),
        max_length=c.get("max_position_embeddings", 2048),
    )


def _rope_scaling(s: dict[str, Any], c: dict[str, Any]) -> RopeScaling | None:
    kind = s.get("rope_type", s.get("type", "default"))  # as in transformers, None is no default
    if (partial := s.get("partial_rotary_factor", c.get("partial_rotary_factor", 1.0))) != 1.0:
        raise UserError(
            f"language model: partial_rotary_factor {partial} is not supported; expected 1"
        )
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise UserError(
            f"language model: rope_scaling type {kind!r} is not supported; "
            "expected default, linear or llama3"
        )

    def number(name: str, default: Any = None) -> float:
        value = s.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise UserError(
                f"language model: rope_scaling {kind}: {name} is {value!r}; expected a number above 0"
            )
        return float(value)

    if kind == "linear":
        return RopeScaling("linear", number("factor"))
    original = number("original_max_position_embeddings", c.get("max_position_embeddings", 8192))
    return RopeScaling(
        "llama3",
        number("factor"),
        number("low_freq_factor"),
        number("high_freq_factor"),
        int(original),
    )


def _window(kind: str, c: dict[str, Any]) -> int | None:
    window = c.get("sliding_window")
    if kind in ("qwen2", "qwen3") and not c.get("use_sliding_window", False):
        window = None
    if kind == "llama" or not window:
        return None
    types = set(c.get("layer_types") or ())
    if types == {"full_attention"}:
        return None
    if kind in ("qwen2", "qwen3") and (
        len(types) > 1 or (not types and c.get("max_window_layers", 0) > 0)
    ):
        raise UserError(
            "language model: a sliding window on some layers only is not supported; "
            "set use_sliding_window to false in config.json (exact up to the window's length)"
        )
    return int(window)
