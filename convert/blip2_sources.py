"""Opens the checkpoints of BLIP-2: LAVIS' files, Hugging Face directories, BERT."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from convert.blip2_config import MODEL_TYPES, check_shapes, hf_sizes
from convert.blip2_keys import (
    BERT,
    HF_QKV_BIAS,
    LAVIS_TABLES,
    Blip2Table,
)
from convert.formats.readers import Reader, open_directory, read_json
from convert.formats.tensors import Tensor
from convert.image_processor import check_image_processor
from convert.key_mapping import (
    BLIP2,
    EVA,
    FINE_TUNED,
    LLM,
    NATIVE,
    KeyTable,
    Transform,
    map_keys,
    translate,
)
from convert.sources import MappedCheckpoint, ParameterSource, open_checkpoint
from minigpt4_jax.errors import UserError

_LAVIS = tuple(LAVIS_TABLES.values())
_KNOWN = (*_LAVIS, NATIVE, EVA, BLIP2, LLM, FINE_TUNED)

# Adds the row of `[DEC]`, which BERT's vocabulary lacks.
APPEND_TOKEN = Transform(
    lambda source, target: source[1:] == target[1:] and source[0] + 1 == target[0],
    lambda x, target: np.concatenate([x, _new_row(x)]),
)


def _new_row(x: np.ndarray) -> np.ndarray:
    """The row of a new token: small random numbers in a matrix, 0 in a bias."""
    if x.ndim == 1:
        return np.zeros(1, x.dtype)
    return np.random.default_rng(0).normal(0, 0.02, (1, x.shape[1])).astype(x.dtype)


def open_lavis(option: str, path: Path, accepted: tuple[KeyTable, ...]) -> MappedCheckpoint:
    """Open a .pth of LAVIS, or a file or directory of this project. UserError: another format."""
    return open_checkpoint(option, path, accepted, _KNOWN)


def is_hf_blip2(path: Path) -> bool:
    """Whether a path is a Hugging Face directory of a BLIP-2 or InstructBLIP model."""
    if not (path / "config.json").is_file():
        return False
    return read_json(path / "config.json").get("model_type") in MODEL_TYPES


def is_bert(path: Path) -> bool:
    """Whether a path is a Hugging Face directory of BERT."""
    if not (path / "config.json").is_file():
        return False
    return read_json(path / "config.json").get("model_type") == "bert"


def open_hf(
    option: str, path: Path, table: KeyTable, values: Mapping[str, Any], notes: list[str]
) -> MappedCheckpoint:
    """Open a Hugging Face directory of BLIP-2. values: of its config.json, from which the sizes come."""
    check_image_processor(path, values["vision_config"]["image_size"], notes)
    reader = split_qkv_biases(open_directory(path))
    mapped, unknown = map_keys(table, reader.tensors)
    token = values.get("image_token_index")
    recorded = {"image_token_index": token} if type(token) is int else {}
    checkpoint = MappedCheckpoint(
        option, reader, table, mapped, unknown, hf_sizes(values), recorded
    )
    check_shapes(checkpoint.shapes(""), values, str(path / "config.json"))
    return checkpoint


def open_bert(option: str, path: Path) -> MappedCheckpoint:
    """Open BERT's weights, with the hub's old names of norms (gamma, beta) too."""
    reader = open_directory(path)
    renamed = {
        key.replace(".gamma", ".weight").replace(".beta", ".bias"): tensor
        for key, tensor in reader.tensors.items()
    }
    reader = replace(reader, tensors=renamed)
    mapped, unknown = map_keys(BERT, reader.tensors)
    for name in ("qformer.embed", "qformer.lm_head.bias"):
        if name in mapped:
            mapped[name] = replace(mapped[name], transform=APPEND_TOKEN)
    for name in [n for n in mapped if ".text_mlp." in n]:  # queries start with the text's layers
        mapped[name.replace(".text_mlp.", ".mlp.")] = mapped[name]
    return MappedCheckpoint(option, reader, BERT, mapped, unknown)


def split_qkv_biases(reader: Reader) -> Reader:
    """The reader with each fused bias [3 D] as three tensors, KEY.q, KEY.k and KEY.v.

    The keys' third is always zero and dropped. UserError: it is not.
    """
    tensors: dict[str, Tensor] = {}
    for key, tensor in reader.tensors.items():
        if not key.endswith(HF_QKV_BIAS):
            tensors[key] = tensor
            continue
        width = tensor.shape[0] // 3
        if np.any(tensor.load()[width : 2 * width]):
            raise UserError(f"{reader.label}: {key}: the keys have a bias; expected zeros")
        for i, part in ((0, "q"), (2, "v")):
            tensors[f"{key}.{part}"] = _part(tensor, slice(i * width, (i + 1) * width))
    return replace(reader, tensors=tensors)


def _part(tensor: Tensor, index: slice) -> Tensor:
    size = index.stop - index.start
    nbytes = size * tensor.dtype.itemsize
    return replace(tensor, shape=(size,), nbytes=nbytes, load=lambda: tensor.load()[index])


def check_second_names(
    checkpoint: MappedCheckpoint, sources: Mapping[str, ParameterSource]
) -> None:
    """UserError unless the second names of tied tensors in a file hold the parameters they are tied to.

    They are compared in the coarser of the two dtypes.
    """
    if not isinstance(checkpoint.table, Blip2Table):
        return
    for key, tensor in checkpoint.reader.tensors.items():
        for rule in checkpoint.table.second_names:
            name = translate(rule.source, rule.target, key)
            if name is None or name not in sources:
                continue
            source = sources[name]
            coarser = min(tensor.dtype, source.tensor.dtype, key=lambda d: d.itemsize)
            a, b = (t.load().astype(coarser) for t in (tensor, source.tensor))
            if a.shape != b.shape or not np.array_equal(a, b):
                raise UserError(
                    f"{checkpoint.label}: {key} differs from {source.label}, to which it is tied: the "
                    "files do not belong together"
                )
