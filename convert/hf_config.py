"""LlmConfig of a Hugging Face config.json: the one place that knows model families by name."""

from typing import Any

from minigpt4_jax.config import LlmConfig, RopeScaling
from minigpt4_jax.errors import UserError

# Vicuna, LLaMA 1/2/3 and SmolLM2 are "llama"; FlanT5 is "t5"
SUPPORTED_LLMS = ("llama", "mistral", "qwen2", "qwen3", "opt", "t5")
T5_MAX_LENGTH = 2048  # relative positions have no limit of their own

# fields that a config.json must have
REQUIRED_LLM_FIELDS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"
)  # fmt: skip
_REQUIRED_OF = {
    "opt": (*REQUIRED_LLM_FIELDS[:-1], "ffn_dim", "max_position_embeddings"),
    "t5": ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"),
}


def required_llm_fields(model_type: str | None) -> tuple[str, ...]:
    """The fields that the config.json of a language model must have."""
    return _REQUIRED_OF.get(model_type or "", REQUIRED_LLM_FIELDS)


def missing_llm_fields(c: dict[str, Any]) -> list[str]:
    """Those that a config.json does not have."""
    return [key for key in required_llm_fields(c.get("model_type")) if key not in c]


def llm_config_from_hf(c: dict[str, Any]) -> LlmConfig:
    """The configuration of a language model. c: the values of its config.json, as transformers spells
    them. UserError: the architecture or a value is not supported, or a size is missing."""
    kind = c.get("model_type")
    if kind not in SUPPORTED_LLMS:
        raise UserError(
            f"language model: model_type {kind!r} is not supported; supported are "
            f"{', '.join(SUPPORTED_LLMS)} (LLaMA 1/2/3, Vicuna, SmolLM2 are 'llama')"
        )
    if missing := missing_llm_fields(c):
        raise UserError(f"language model config.json: missing {', '.join(missing)}")
    if kind in ("opt", "t5"):
        return _opt(c) if kind == "opt" else _t5(c)
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


def _expect(c: dict[str, Any], expected: dict[str, Any]) -> None:
    """UserError for the first field of a config.json that is given and has another value."""
    for key, value in expected.items():
        if c.get(key, value) != value:
            raise UserError(
                f"language model: {key} {c[key]!r} of {c.get('model_type')} is not supported; expected "
                f"{value!r}"
            )


def _opt(c: dict[str, Any]) -> LlmConfig:
    """OPT: learned positions, LayerNorm, ReLU, biases."""
    width, heads = c["hidden_size"], c["num_attention_heads"]
    if width % heads:
        raise UserError(
            f"language model: num_attention_heads {heads} does not divide hidden_size {width}"
        )
    if (embedding := c.get("word_embed_proj_dim", width)) != width:
        raise UserError(
            f"language model: word_embed_proj_dim {embedding} differs from hidden_size {width}, which is "
            "not supported"
        )
    _expect(
        c,
        {
            "activation_function": "relu", "do_layer_norm_before": True, "enable_bias": True,
            "_remove_final_layer_norm": False, "layer_norm_elementwise_affine": True,
        },
    )  # fmt: skip
    return LlmConfig(
        model_type="opt", vocab=c["vocab_size"], width=width, layers=c["num_hidden_layers"],
        heads=heads, kv_heads=heads, head_dim=width // heads, ffn=c["ffn_dim"], eps=1e-5,
        qkv_bias=True, o_bias=True, mlp_bias=True, tie=c.get("tie_word_embeddings", True),
        max_length=c["max_position_embeddings"], norm="layer", positions="learned",
        activation="relu", gated=False,
    )  # fmt: skip


def _t5(c: dict[str, Any]) -> LlmConfig:
    """T5 1.1 and FlanT5: encoder and decoder, relative positions, gated MLP."""
    # transformers 5 writes tie_word_embeddings true and says the same by another field
    if c.get("scale_decoder_outputs", c.get("tie_word_embeddings", True)):
        raise UserError(
            "language model: a t5 with tie_word_embeddings (or scale_decoder_outputs) is not supported; "
            "expected T5 1.1 or FlanT5"
        )
    heads, act = c["num_heads"], c.get("feed_forward_proj", "relu")
    if not act.startswith("gated-"):
        raise UserError(
            f"language model: feed_forward_proj {act!r} of t5 is not supported; expected 'gated-gelu'"
        )
    activation = c.get("dense_act_fn") or {"gated-gelu": "gelu_new"}.get(act, act.split("-")[-1])
    if activation not in ("gelu_new", "gelu"):
        raise UserError(
            f"language model: activation {activation!r} of t5 (dense_act_fn, feed_forward_proj) is not "
            "supported; expected 'gelu_new' or 'gelu'"
        )
    _expect(c, {"is_gated_act": True})
    buckets = c.get("relative_attention_num_buckets", 32)
    distance = c.get("relative_attention_max_distance", 128)
    if not 4 <= buckets < 2 * distance:  # of which half hold one distance each
        raise UserError(
            f"language model: relative_attention_num_buckets {buckets} of t5 is not supported with "
            f"relative_attention_max_distance {distance}; expected 4 or more, and less than twice that"
        )
    return LlmConfig(
        model_type="t5", vocab=c["vocab_size"], width=c["d_model"],
        layers=c.get("num_decoder_layers") or c["num_layers"], heads=heads, kv_heads=heads,
        head_dim=c["d_kv"], ffn=c["d_ff"], eps=c.get("layer_norm_epsilon", 1e-6),
        max_length=max(T5_MAX_LENGTH, c.get("n_positions") or 512), positions="relative",
        activation=activation, scaled=False, encoder_layers=c["num_layers"],
        start_id=_start_id(c),
        relative_buckets=buckets, relative_distance=distance,
    )  # fmt: skip


def _start_id(c: dict[str, Any]) -> int:
    """The token that an answer of T5 begins with: padding, unless config.json names another. transformers'
    generate takes BOS next, where T5 usually has none."""
    for field in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        token = c.get(field)
        if token is None:
            continue
        if type(token) is not int or not 0 <= token < c["vocab_size"]:
            raise UserError(
                f"language model: {field} is {token!r}; expected an id below vocab_size "
                f"{c['vocab_size']}"
            )
        return token
    return 0


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
