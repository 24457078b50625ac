"""BLIP-2's and InstructBLIP's config.json: every field is used, harmless, or named to the user."""

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from convert.hf_config import SUPPORTED_LLMS, missing_llm_fields
from minigpt4_jax.errors import UserError
from minigpt4_jax.models.minigpt import LN_VISION_EPS

MODEL_TYPES = ("blip-2", "instructblip")
_PARTS = ("vision_config", "qformer_config")
# What the fields that are used may be, by name; those of the whole model have no part.
_SIZES = (
    "num_query_tokens", "image_text_hidden_size", "image_size", "patch_size", "hidden_size",
    "num_hidden_layers", "num_attention_heads", "intermediate_size", "cross_attention_frequency",
    "vocab_size", "max_position_embeddings",
)  # fmt: skip
_CHECKS: list[tuple[tuple[str, ...], str, Callable[[Any], bool]]] = [
    (_SIZES, "a positive integer", lambda v: type(v) is int and v > 0),
    (("layer_norm_eps",), "a positive number", lambda v: _is_number(v) and 0 < v < math.inf),
    (
        ("hidden_dropout_prob", "attention_probs_dropout_prob"), "a number from 0 to below 1",
        lambda v: _is_number(v) and 0 <= v < 1,
    ),
    (("hidden_act",), "'gelu'", lambda v: v == "gelu"),
    (("qkv_bias",), "true", lambda v: v is True),
    (("position_embedding_type",), "'absolute'", lambda v: v == "absolute"),
]  # fmt: skip
# Fields that do not change the logits, or that transformers derives from others.
_HARMLESS = {
    "model_type", "transformers_version", "architectures", "dtype", "torch_dtype", "_name_or_path",
    "output_hidden_states", "output_attentions", "return_dict", "chunk_size_feed_forward",
    "is_encoder_decoder", "id2label", "label2id", "problem_type", "initializer_range",
    "initializer_factor", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id",
    "encoder_hidden_size", "use_decoder_only_language_model", "text_config", *_PARTS,
    "image_token_index", "image_token_id", "_attn_implementation_autoset", "classifier_dropout",
    "dropout", "num_channels", "projection_dim", "tie_word_embeddings",
}  # fmt: skip
_USED = {name for names, *_ in _CHECKS for name in names} | {"use_qformer_text_input"}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def hf_values(
    config: Mapping[str, Any], label: str, notes: list[str], *, reads_text: bool
) -> dict[str, Any]:
    """The fields of a config.json and of its parts, absent ones with the defaults of transformers' class.

    transformers leaves out fields of the parts that have their default when it saves a model. label: the file
    in messages. reads_text: whether the Q-Former of this kind of model reads text. Fields that are not used
    are named in a note. UserError: a value that is not supported.
    """
    if config.get("quantization_config"):
        raise UserError(
            f"{label}: quantization_config: the weights are quantized, which is not read; convert the "
            "original weights"
        )
    config = {
        **config,
        "text_config": config.get("text_config") or {},
    }  # a matching model needs none
    for part in (*_PARTS, "text_config"):
        if not isinstance(config.get(part), dict):
            raise UserError(
                f"{label}: {part} is {config.get(part)!r}; expected an object, as in BLIP-2's config.json"
            )
    model_type = config["model_type"]
    defaults = _class_defaults(model_type)
    if "num_query_tokens" not in config:  # a file of another model
        raise UserError(f"{label}: no num_query_tokens; expected the config.json of BLIP-2")
    values = _resolve(config, defaults, label, "", notes)
    for part in _PARTS:
        values[part] = _resolve(config[part], defaults[part], label, f"{part}.", notes)
        _check_heads(values[part], f"{label}: {part}")
    _check_vision_eps(values["vision_config"], label)
    if model_type == "blip-2":
        _check_text_input(values["qformer_config"], label, reads_text)
    values["text_config"] = _text_values(config["text_config"])
    return values


@cache
def _class_defaults(model_type: str) -> dict[str, Any]:
    """The fields of transformers' class for a model_type, which is known."""
    from transformers import AutoConfig

    fields: dict[str, Any] = AutoConfig.for_model(model_type).to_dict()
    return fields


def _resolve(
    given: Mapping[str, Any], defaults: Mapping[str, Any], label: str, prefix: str, notes: list[str]
) -> dict[str, Any]:
    """The fields of one part with their defaults. prefix: before their names in messages."""
    for names, expected, fits in _CHECKS:
        for name in names:
            if name in given and not fits(given[name]):
                raise UserError(f"{label}: {prefix}{name} is {given[name]!r}; expected {expected}")
    if unused := sorted(
        prefix + name
        for name, value in given.items()
        if name not in _USED | _HARMLESS and value != defaults.get(name)
    ):
        notes.append(f"{label}: {', '.join(unused)}: not used")
    return {**defaults, **given}


def _check_heads(part: Mapping[str, Any], label: str) -> None:
    width, heads = part["hidden_size"], part["num_attention_heads"]
    if width % heads:
        raise UserError(f"{label}.num_attention_heads {heads} does not divide hidden_size {width}")


def _check_vision_eps(vision: Mapping[str, Any], label: str) -> None:
    """transformers takes it for the norm after the ViT too, which is LAVIS' ln_vision, with LN_VISION_EPS."""
    if (eps := vision["layer_norm_eps"]) > LN_VISION_EPS:
        raise UserError(
            f"{label}: vision_config.layer_norm_eps is {eps!r}, which is not supported; expected at most "
            f"{LN_VISION_EPS}, which the norm after the ViT has"
        )


def _check_text_input(qformer: Mapping[str, Any], label: str, reads_text: bool) -> None:
    name = "use_qformer_text_input"
    if (value := qformer[name]) is not reads_text:
        raise UserError(
            f"{label}: qformer_config.{name} is {value!r}; expected {str(reads_text).lower()}, since the "
            f"Q-Former of this variant reads {'text and images' if reads_text else 'images only'}"
        )


def _text_values(given: dict[str, Any]) -> dict[str, Any]:
    """text_config with the sizes that are absent, of transformers' class for its model_type."""
    missing = missing_llm_fields(given)
    if not missing or given.get("model_type") not in SUPPORTED_LLMS:  # refused later
        return given
    defaults = _class_defaults(given["model_type"])
    return given | {name: defaults[name] for name in missing if name in defaults}


def hf_sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    """VisionConfig and QFormerConfig fields. values: as `hf_values` gives them."""
    v, q = values["vision_config"], values["qformer_config"]
    vision = {
        "image_size": v["image_size"], "patch_size": v["patch_size"], "width": v["hidden_size"],
        "depth": v["num_hidden_layers"], "heads": v["num_attention_heads"],
        "mlp": v["intermediate_size"], "eps": float(v["layer_norm_eps"]),
    }  # fmt: skip
    qformer = {
        "queries": values["num_query_tokens"], "hidden": q["hidden_size"],
        "layers": q["num_hidden_layers"], "heads": q["num_attention_heads"],
        "ffn": q["intermediate_size"], "cross_every": q["cross_attention_frequency"],
        "vision_width": v["hidden_size"], "eps": float(q["layer_norm_eps"]),
        "dropout": float(q["hidden_dropout_prob"]),
    }  # fmt: skip
    return {"vision": vision, "qformer": qformer}


def check_shapes(
    shapes: Mapping[str, tuple[int, ...]], values: Mapping[str, Any], label: str
) -> None:
    """UserError: a size in config.json that the tensors do not have, of those that shapes decide here.

    shapes: of the parameters. transformers does not load such a model.
    """
    v, q = values["vision_config"], values["qformer_config"]
    expected: dict[str, tuple[str, int, int | None, object]] = {
        "vision_config.image_size": (
            "vit.pos", -2, (v["image_size"] // v["patch_size"]) ** 2 + 1,
            f"{v['image_size']} (patch_size {v['patch_size']})",
        ),
        "qformer_config.vocab_size": ("qformer.embed", 0, q["vocab_size"], q["vocab_size"]),
        "qformer_config.max_position_embeddings": (
            "qformer.positions", 0, q["max_position_embeddings"], q["max_position_embeddings"]
        ),
        "image_text_hidden_size": (
            "qformer.vision_projection.weight", 0, values.get("image_text_hidden_size"),
            values.get("image_text_hidden_size"),
        ),
    }  # fmt: skip
    for field, (name, axis, size, value) in expected.items():
        shape = shapes.get(name, ())
        if len(shape) > 1 and shape[axis] != size:
            raise UserError(
                f"{label}: {field} is {value}, for which {name} should have {size} rows; it has {shape[axis]}"
            )
