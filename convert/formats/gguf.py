"""GGUF language models: tensors read one at a time, metadata as a Hugging Face config."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from convert.formats.files import HashedFile, detect_format
from convert.formats.gguf_blocks import BLOCK_FORMATS, unpack
from convert.formats.readers import Reader
from convert.formats.tensors import DTYPES, QuantizedBlocks, Tensor
from minigpt4_jax.errors import UserError

# llama.cpp's architecture -> model_type. Only for "llama" (LLaMA, Vicuna, Mistral, SmolLM) llama.cpp
# permutes query and key rows for interleaved rotary embeddings; Qwen rotates halves, as Hugging Face.
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
PERMUTED = ("llama",)

_FLOATS = {"F32": "float32", "F16": "float16", "F64": "float64", "BF16": "bfloat16"}


class Gguf:
    """An open GGUF file: `field` (metadata) and `reader` (tensors)."""

    def __init__(self, path: Path):
        if detect_format(path) != "gguf":
            raise UserError(
                f"{path} is not a GGUF file; a Hugging Face model is given as its directory"
            )
        self.path = path
        self._file = HashedFile(path)
        parsed = _parse(path)
        if parsed.byte_order != "I":
            raise UserError(
                f"{path} has the byte order of another machine architecture; convert the model here"
            )
        self._values = parsed.fields
        if (self.field("split.count") or 1) > 1:
            raise UserError(
                f"{path} is one part of several; join them with llama-gguf-split --merge"
            )
        self.tensors = {t.name: self._tensor(t) for t in parsed.tensors}
        self.reader = Reader(str(path), self.tensors, [self._file])

    def field(self, name: str, default: Any = None) -> Any:
        """A metadata value as a Python object; the default if it is absent."""
        value = self._values.get(name)
        return default if value is None else value.contents()

    def field_names(self) -> list[str]:
        """The names of all metadata."""
        return sorted(self._values)

    def _tensor(self, t: Any) -> Tensor:
        shape = tuple(int(n) for n in reversed(t.shape))
        start, count = int(t.data_offset), int(t.n_bytes)
        if start + count > self._file.size:
            raise UserError(
                f"{self.path} is truncated: {t.name} ends past its end; download it again"
            )
        gguf_type = t.tensor_type.name
        float_type = _FLOATS.get(gguf_type)
        dtype = DTYPES[float_type or "float32"]

        def load() -> np.ndarray:
            raw = self._file.read(start, count)
            if float_type is not None:
                return raw.view(dtype).reshape(shape)
            return _dequantize(raw, t, shape, f"{self.path}: {t.name}")

        blocks = None
        if gguf_type in BLOCK_FORMATS and len(shape) == 2:
            blocks = QuantizedBlocks(
                gguf_type, lambda: unpack(self._file.read(start, count), gguf_type, shape)
            )
        return Tensor(shape, dtype, count, load, (str(self.path), start), blocks)

    @property
    def architecture(self) -> str:
        return str(self.field("general.architecture"))

    def hf_config(self) -> dict[str, Any]:
        """The model's config.json. UserError: the architecture is not supported."""
        arch = self.architecture
        if arch not in ARCHITECTURES:
            raise UserError(
                f"{self.path}: GGUF architecture {arch!r} is not supported; supported are "
                f"{', '.join(ARCHITECTURES)} (Mistral, Vicuna and SmolLM2 files say 'llama')"
            )
        if self.field(f"{arch}.expert_count"):
            raise UserError(f"{self.path} is a mixture of experts, which is not supported")
        config: dict[str, Any] = {"model_type": ARCHITECTURES[arch]}
        for key, gguf_field in _FIELDS.items():
            value = self._number(f"{arch}.{gguf_field}")
            if value is not None:
                config[key] = value
        self._check_fields()
        if window := self.field(f"{arch}.attention.sliding_window"):
            if arch != "llama":
                raise UserError(
                    f"{self.path}: {arch}.attention.sliding_window is {window}, which is not supported"
                )
            config |= {"model_type": "mistral", "sliding_window": window}
        if missing := [k for k in _NEEDED if k not in config]:
            raise UserError(
                f"{self.path}: metadata lacks {arch}.{_FIELDS[missing[0]]}; convert it again"
            )
        config["rms_norm_eps"] = _undo_float32(config["rms_norm_eps"])
        return self._add_from_tensors(config)

    def _number(self, name: str) -> int | float | None:
        """A size or a factor of the model. UserError: it is not one positive number for all layers."""
        value = self.field(name)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise UserError(f"{self.path}: {name} differs between layers: not supported")
            value = value[0]
        if value is None:
            return None
        kinds: tuple[type, ...] = (int,)
        expected = "a positive integer"
        if name.endswith(_FRACTIONS):
            kinds, expected = (int, float), "a positive number"
        if type(value) not in kinds or not 0 < value < math.inf:
            raise UserError(f"{self.path}: {name} is {value!r}; expected {expected}")
        number: int | float = value
        return number

    def _add_from_tensors(self, config: dict[str, Any]) -> dict[str, Any]:
        """Add the values that follow from the tensors, and the rotary embedding."""
        arch, tensors = self.architecture, self.tensors
        matrices = [name for name in ("token_embd.weight", "output.weight") if name in tensors]
        if not matrices:
            raise UserError(
                f"{self.path} has no token_embd.weight: it does not hold a language model"
            )
        config["vocab_size"] = tensors[matrices[0]].shape[0]
        config["tie_word_embeddings"] = len(matrices) == 1
        if arch != "qwen2" and "blk.0.attn_q.bias" in tensors:  # Qwen2 always has them
            config["attention_bias"] = True
        if "blk.0.ffn_up.bias" in tensors:
            config["mlp_bias"] = True
        if "head_dim" not in config:
            width, heads = config["hidden_size"], config["num_attention_heads"]
            if width % heads:
                names = " and ".join(f"{arch}.{name}" for name in _WIDTH_AND_HEADS)
                raise UserError(
                    f"{self.path}: {names} are {width} and {heads}, which do not divide, "
                    f"and {arch}.attention.key_length is absent"
                )
            config["head_dim"] = width // heads
        rotated = self.field(f"{arch}.rope.dimension_count", config["head_dim"])
        if rotated != config["head_dim"]:
            raise UserError(
                f"{self.path}: only {rotated} of {config['head_dim']} dimensions rotate: "
                "not supported"
            )
        config |= self._rope_scaling(config)
        if "rope_freqs.weight" in tensors:
            if "rope_scaling" in config:
                raise UserError(
                    f"{self.path}: rope_freqs.weight together with {arch}.rope.scaling.type or "
                    "rope.scaling.factor is not supported"
                )
            config["rope_scaling"] = self._llama3_scaling(config)
        return config

    def _rope_scaling(self, config: dict[str, Any]) -> dict[str, Any]:
        """rope_scaling from metadata. Files of 2023 have the linear factor under rope.scale_linear."""
        arch = self.architecture
        kind = self.field(f"{arch}.rope.scaling.type")
        factor = self.field(f"{arch}.rope.scaling.factor", self.field(f"{arch}.rope.scale_linear"))
        if kind is None:
            kind = "none" if factor in (None, 0.0, 1.0) else "linear"
        if kind not in ("none", "linear"):
            raise UserError(
                f"{self.path}: {arch}.rope.scaling.type is {kind!r}, which is not supported; expected "
                "'none', 'linear' or no such field"
            )
        if kind == "none":
            return {}
        return {"rope_scaling": {"rope_type": kind, "factor": factor}}

    def _check_fields(self) -> None:
        """UserError for metadata that changes the model's output in a way that is not supported."""
        arch = self.architecture
        for name, neutral in _UNSUPPORTED.items():
            value = self.field(f"{arch}.{name}", neutral)
            if value != neutral:
                raise UserError(
                    f"{self.path}: {arch}.{name} is {value!r}, which is not supported; "
                    f"expected {neutral!r} or no such field"
                )
        width, heads = (self.field(f"{arch}.{name}", 0) for name in _WIDTH_AND_HEADS)
        by_width = width // heads if isinstance(heads, int) and heads else None
        key = self.field(f"{arch}.attention.key_length", by_width)
        value = self.field(f"{arch}.attention.value_length", key)
        if key != value:
            raise UserError(
                f"{self.path}: {arch}.attention.value_length is {value}, key_length {key}: "
                "different sizes are not supported"
            )

    def unused_fields(self) -> list[str]:
        """Metadata that is neither used nor known not to matter."""
        known = {*_FIELDS.values(), *_UNSUPPORTED, *_USED, *_HARMLESS}
        names = {f"{self.architecture}.{name}" for name in known}
        names |= {f"tokenizer.ggml.{name}" for name in _TOKENIZER}
        names |= {name for name in _TOKENIZER_SWITCHES if not self.field(name)}
        return sorted(
            name
            for name in self._values
            if name not in names and not name.startswith(_HARMLESS_PREFIXES)
        )

    def _llama3_scaling(self, config: dict[str, Any]) -> dict[str, Any]:
        """The parameters of Llama 3.1's scaling, recovered from the frequency divisors in the file."""
        divisors = self.reader.read("rope_freqs.weight").astype(np.float64)
        theta, dim = config.get("rope_theta", 10000.0), config["head_dim"]
        wavelength = 2 * math.pi * theta ** (np.arange(0, dim, 2) / dim)
        factor = round(float(divisors.max()), 3)
        for original in (8192, 4096, 2048, 16384, 32768):
            blend = np.clip((original / wavelength - 1) / (4 - 1), 0, 1)
            if np.allclose(1 / ((1 - blend) / factor + blend), divisors, rtol=1e-3):
                return {
                    "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": original,
                }  # fmt: skip
        raise UserError(f"{self.path}: the rotary scaling in rope_freqs.weight is not Llama 3's")


_FIELDS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "intermediate_size": "feed_forward_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "max_position_embeddings": "context_length",
}
_FRACTIONS = (_FIELDS["rms_norm_eps"], _FIELDS["rope_theta"])  # the others are integers
# Metadata (GGUF specification; llama.cpp's LLM_KV names) that is read elsewhere in this file,
_WIDTH_AND_HEADS = ("embedding_length", "attention.head_count")
_USED = (
    "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
    "expert_count", "attention.value_length", "attention.sliding_window",
)  # fmt: skip
# or that says what the tensors say too, or how the file was made,
_HARMLESS = (
    "vocab_size", "tensor_data_layout", "rope.scaling.original_context_length",
    "rope.scaling.finetuned", "expert_used_count", "rope.scaling.yarn_log_multiplier",
    "attention.sliding_window_pattern",
)  # fmt: skip
# or that is supported with this value only.
_UNSUPPORTED: dict[str, Any] = {
    "use_parallel_residual": False, "attention.causal": True, "pooling_type": 0,
    "attention.max_alibi_bias": 0.0, "attention.clamp_kqv": 0.0, "attention.scale": 0.0,
    "attn_logit_softcapping": 0.0, "final_logit_softcapping": 0.0,
    "logit_scale": 1.0, "residual_scale": 1.0, "embedding_scale": 1.0,
    "rope.scaling.attn_factor": 1.0, "rope.dimension_sections": [], "expert_shared_count": 0,
    "leading_dense_block_count": 0, "attention.layer_norm_epsilon": None,
    "attention.group_norm_epsilon": None, "swin_norm": False,
}  # fmt: skip
# Metadata of the tokenizer that gguf_tokenizer.py and end_tokens.py read, or that is not used: tokens for
# infilling, classes and masks.
_TOKENIZER = (
    "model", "pre", "tokens", "token_type", "token_type_count", "scores", "merges", "add_bos_token",
    "add_space_prefix", "remove_extra_whitespaces", "bos_token_id", "eos_token_id",
    "unknown_token_id", "padding_token_id", "eot_token_id", "eom_token_id", "seperator_token_id",
    "mask_token_id", "cls_token_id", "prefix_token_id", "suffix_token_id", "middle_token_id",
    "fim_pre_token_id", "fim_suf_token_id", "fim_mid_token_id", "fim_pad_token_id",
    "fim_rep_token_id", "fim_sep_token_id",
)  # fmt: skip
_TOKENIZER_SWITCHES = ("tokenizer.ggml.add_eos_token", "tokenizer.ggml.add_sep_token")  # only off
# How the file was made, what it is called, how its author samples, and other templates and tokenizers.
_HARMLESS_PREFIXES = (
    "GGUF.", "general.", "split.", "quantize.", "imatrix.", "tokenizer.chat_template",
    "tokenizer.huggingface.json", "tokenizer.rwkv.",
)  # fmt: skip
_NEEDED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "rms_norm_eps",
)


def _undo_float32(value: float) -> float:
    """The shortest decimal that rounds to the same float32: 1e-5, not 9.99999974e-06."""
    return float(np.format_float_positional(np.float32(value)))


def _parse(path: Path) -> Any:
    import gguf

    try:
        return gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError, OverflowError, TypeError, MemoryError, OSError) as e:
        raise UserError(f"{path} is truncated or damaged ({e}): download it again") from e


def _dequantize(raw: np.ndarray, t: Any, shape: tuple[int, ...], where: str) -> np.ndarray:
    from gguf.quants import dequantize, quant_shape_to_byte_shape

    try:
        rows = raw.reshape(quant_shape_to_byte_shape(shape, t.tensor_type))
        return dequantize(rows, t.tensor_type).reshape(shape)
    except (NotImplementedError, ValueError) as e:
        raise UserError(f"{where}: cannot dequantize {t.tensor_type.name} ({e})") from e
