"""The language model's configuration: every field of config.json is used, harmless, or named to the user."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from convert.hf_config import (
    REQUIRED_LLM_FIELDS,
    SUPPORTED_LLMS,
    llm_config_from_hf,
    missing_llm_fields,
    required_llm_fields,
)
from convert.sources import MappedCheckpoint
from minigpt4_jax.config import LlmConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.utils.text import one_line

# Fields that no configuration class of transformers lists, and that do not change the logits.
_HARMLESS = {
    "torch_dtype", "rope_scaling", "rope_theta", "auto_map", "_attn_implementation",
    "_attn_implementation_autoset", "_flash_attn_2_enabled", "unsloth_version", "unsloth_fixed",
    "use_mrope", "max_sequence_length", "tokenizer_class", "model_max_length", "is_llama_config",
    "rope_interleaved", "rope_parameters", "head_dim", "sliding_window", "transformers.js_config",
    "task_specific_params", "num_labels", "license", "prefix", "output_past", "is_gated_act",
    "dense_act_fn", "decoder_start_token_id", "n_positions",
}  # fmt: skip
# What the fields that are used may be. null is as if a field were absent, except for numbers and those
# that are required.
_SIZES = (
    *REQUIRED_LLM_FIELDS, "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window"
)  # fmt: skip
_OWN_SIZES = {
    "opt": ("ffn_dim",),
    "t5": (
        "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads", "n_positions",
        "relative_attention_num_buckets", "relative_attention_max_distance",
    ),
}  # fmt: skip
_NUMBERS = ("rms_norm_eps", "rope_theta")
_OWN_NUMBERS = {"t5": ("layer_norm_epsilon",)}
_SWITCHES = ("attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window")
_OBJECTS = ("rope_scaling", "rope_parameters", "quantization_config")
_OTHERS = ("model_type", "hidden_act", "layer_types", "max_window_layers")
_ROPE = {
    "rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings", "partial_rotary_factor",
}  # fmt: skip
# Fields that only some families have and that are used.
_OWN = {
    "opt": {
        *_OWN_SIZES["opt"], "activation_function", "do_layer_norm_before", "enable_bias",
        "word_embed_proj_dim", "_remove_final_layer_norm", "layer_norm_elementwise_affine",
    },
    "t5": {
        *_OWN_SIZES["t5"], *_OWN_NUMBERS["t5"], "feed_forward_proj", "dense_act_fn", "is_gated_act",
        "scale_decoder_outputs", "decoder_start_token_id",
    },
}  # fmt: skip
# Fields of transformers' classes that do not change the logits.
_UNUSED_BY_MODELS = {
    "transformers_version", "architectures", "output_hidden_states", "output_attentions",
    "return_dict", "dtype", "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id",
    "problem_type", "initializer_range", "use_cache", "pad_token_id", "bos_token_id",
    "eos_token_id", "pretraining_tp", "attention_dropout", "_name_or_path", "dropout", "layerdrop",
    "init_std", "dropout_rate", "classifier_dropout", "initializer_factor", "is_decoder",
}  # fmt: skip


def llm_config(values: dict[str, Any], label: str, notes: list[str]) -> LlmConfig:
    """LlmConfig of a config.json, with the defaults of transformers' class for its model_type.

    label: the file in messages. Fields that transformers does not use either are named in a note.
    UserError: an unsupported model_type, a missing size, or a field whose value is not supported.
    """
    from transformers import AutoConfig

    model_type = values.get("model_type")
    if model_type not in SUPPORTED_LLMS or missing_llm_fields(values):
        return llm_config_from_hf(values)  # raises
    _check_values(values, label)
    if quantization := values.get("quantization_config"):
        method = quantization.get("quant_method", "an unknown method")
        raise UserError(
            f"{label}: quantization_config: the weights are quantized by {method}, which is not read; "
            "convert the original weights, or a GGUF file, and add --quantize=int8 or int4"
        )
    resolved = _resolve(values, label)
    _check_layer_types(values, resolved, label)
    if model_type == "mistral" and values.get("layer_types"):
        resolved["sliding_window"] = None  # transformers reads it as Ministral: layer_types decide
    _check_rope(values, label, notes)
    if "head_dim" in values and resolved.get("head_dim") is None:
        raise UserError(
            f"{label}: head_dim is null, which transformers' {model_type} models do not take; "
            "expected a number, or no head_dim"
        )
    if model_type == "t5" and values.get("dense_act_fn", "") is None:
        raise UserError(
            f"{label}: dense_act_fn is null, which transformers' t5 models do not take; expected the name of "
            "an activation, or no dense_act_fn"
        )
    known = AutoConfig.for_model(model_type).to_dict()
    if unused := sorted(key for key in values if key not in known and key not in _HARMLESS):
        notes.append(
            f"{label}: {', '.join(unused)}: not used, as in transformers' {model_type} models"
        )
    used = {*_SIZES, *_NUMBERS, *_SWITCHES, *_OBJECTS, *_OTHERS, *_OWN.get(model_type, ())}
    if new := sorted(
        key
        for key, value in values.items()
        if key in known and key not in used | _UNUSED_BY_MODELS and value != known[key]
    ):
        notes.append(
            f"{label}: {', '.join(new)}: not used here, though this version of transformers has it for "
            f"{model_type} models; compare the answers"
        )
    if model_type == "t5":  # what transformers derives from other fields, or drops
        for key in ("dense_act_fn", "decoder_start_token_id", "n_positions"):
            resolved |= {key: values[key]} if values.get(key) is not None else {}
    for key in ("rope_scaling", "rope_theta"):  # they are in rope_parameters
        resolved.pop(key, None)
    # of fields that the class does not have, transformers uses none; qwen2 has biases without the field
    for key in {"sliding_window", "layer_types", "attention_bias", "mlp_bias"} - known.keys():
        resolved.pop(key, None)
    return llm_config_from_hf(resolved)


def _check_layer_types(values: dict[str, Any], resolved: dict[str, Any], label: str) -> None:
    """UserError: layers of another type than full attention, in a model that has no window for them."""
    other = set(values.get("layer_types") or ()) - {"full_attention"}
    has_window = resolved.get("use_sliding_window") and resolved.get("sliding_window")
    if other and not (has_window and values["model_type"] in ("qwen2", "qwen3")):
        raise UserError(
            f"{label}: layer_types has {', '.join(map(str, sorted(other)))}, which is not supported for a "
            f"{values['model_type']} model without use_sliding_window; expected full_attention"
        )


def _check_rope(values: dict[str, Any], label: str, notes: list[str]) -> None:
    """UserError: rotary parameters for each type of layers. Keys that are not used are named in a note."""
    for field in ("rope_scaling", "rope_parameters"):
        rope = values.get(field) or {}
        if nested := sorted(key for key, value in rope.items() if isinstance(value, dict)):
            raise UserError(
                f"{label}: {field} has its own values for {', '.join(nested)}, which is not supported; "
                "expected rope_type, rope_theta, factor ... of all layers"
            )
        if unused := sorted(f"{field}.{key}" for key in rope if key not in _ROPE):
            notes.append(f"{label}: {', '.join(unused)}: not used by this rope_type")


def _check_values(values: dict[str, Any], label: str) -> None:
    """UserError: a field that is used has a value of another type, or one that no model has."""
    model_type = values["model_type"]
    sizes = (*_SIZES, *_OWN_SIZES.get(model_type, ()))
    numbers = (*_NUMBERS, *_OWN_NUMBERS.get(model_type, ()))
    expected: list[tuple[tuple[str, ...], str, Callable[[Any], bool]]] = [
        (sizes, "a positive integer", lambda v: type(v) is int and v > 0),
        (numbers, "a positive number", lambda v: type(v) in (int, float) and 0 < v < math.inf),
        (_SWITCHES, "true or false", lambda v: type(v) is bool),
        (_OBJECTS, "an object", lambda v: isinstance(v, dict)),
        (("layer_types",), "a list", lambda v: isinstance(v, list)),
    ]
    for names, what, fits in expected:
        for name in names:
            value = values.get(name)
            may_be_null = name not in (*required_llm_fields(model_type), *numbers)
            if name in values and not (value is None and may_be_null) and not fits(value):
                raise UserError(f"{label}: {name} is {value!r}; expected {what}")


def _resolve(values: dict[str, Any], label: str) -> dict[str, Any]:
    """All fields, those that are absent with the defaults of transformers' configuration class.

    UserError: the class refuses a value; the message names its field.
    """
    from transformers import AutoConfig

    def resolve(values: dict[str, Any]) -> dict[str, Any]:
        values = copy.deepcopy(values)  # transformers changes dictionaries that it is given
        fields: dict[str, Any] = AutoConfig.for_model(values.pop("model_type"), **values).to_dict()
        return fields

    try:
        return resolve(values)
    except Exception as e:  # its checks raise several types
        error = one_line(e)
    for name in sorted(values.keys() - {"model_type"}):
        try:
            resolve({key: value for key, value in values.items() if key != name})
        except Exception:
            continue
        raise UserError(f"{label}: {name}: transformers refuses {values[name]!r}: {error}")
    raise UserError(f"{label}: transformers refuses it: {error}")


def resolve_tied_embeddings(
    config: dict[str, Any], llm: MappedCheckpoint, notes: list[str]
) -> None:
    """Let the file decide what a tied model's output matrix is, as transformers 5 does.

    config: LlmConfig fields, whose `tie` may change. An lm_head.weight that differs from the embedding is
    kept; one without embedding is the embedding; an equal one is dropped. A T5 is tied if it lacks either of
    them, whatever config.json says.
    """
    head, embed = llm.mapped.get("llm.head.weight"), llm.mapped.get("llm.embed")
    if config["model_type"] == "t5" and (head is None) != (embed is None):
        config["tie"] = True
        if head is None:
            notes.append(
                f"{llm.label} has no lm_head.weight: the embedding is used, as in transformers 5"
            )
    if not config["tie"] or head is None:
        return
    if embed is None:
        llm.mapped["llm.embed"] = head
        notes.append(f"{head.key} is the embedding too: the language model ties them")
    elif _equal(llm, head.key, embed.key):
        notes.append(f"{head.key} is not used: the language model ties it to the embedding")
    else:
        config["tie"] = False
        notes.append(
            f"{head.key} differs from {embed.key}, so both are kept, although config.json says "
            "tie_word_embeddings"
        )
        return
    del llm.mapped["llm.head.weight"]


def _equal(llm: MappedCheckpoint, a: str, b: str) -> bool:
    tensors = llm.reader.tensors
    if tensors[a].shape != tensors[b].shape:
        return False
    return bool(np.array_equal(llm.reader.read(a), llm.reader.read(b)))
