"""Opens checkpoints of any format as lazy tensors with a name, shape and dtype."""

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from convert.formats import safetensors, torch_file
from convert.formats.files import HashedFile, detect_format
from convert.formats.tensors import Tensor
from minigpt4_jax.errors import UserError
from minigpt4_jax.storage.hub import source_record
from minigpt4_jax.storage.hub_files import WEIGHT_FILES, WEIGHT_INDEXES, WEIGHT_SHARDS
from minigpt4_jax.storage.paths import parse_local_path


@dataclass
class Reader:
    """The lazy tensors of one checkpoint, which may consist of several files.

    label: its name in messages. files: for their SHA-256. metadata: of a safetensors file.
    """

    label: str
    tensors: dict[str, Tensor]
    files: list[HashedFile]
    metadata: dict[str, str] = field(default_factory=dict)

    def read(self, name: str) -> np.ndarray:
        """Read one tensor as a new array."""
        return self.tensors[name].load()

    def origin(self) -> dict[str, Any]:
        """{"file": ..., "sha256": ...}, or "files" with one digest each when there are several; with
        "hub" if they were downloaded from there."""
        digests = {str(f.path): f.sha256() for f in self.files}
        hub = source_record(digests)
        if len(digests) == 1:
            (path, digest), *_ = digests.items()
            return {"file": path, "sha256": digest, **hub}
        return {"file": self.label, "files": {Path(p).name: d for p, d in digests.items()}, **hub}


def open_file(path: Path) -> Reader:
    """Open a .pth, .bin or .safetensors file. UserError: missing, damaged or of another format."""
    file_format = detect_format(parse_local_path("file", path))
    if file_format == "gguf":
        raise UserError(f"{path} is a GGUF file, which holds a language model: give it as --llm")
    file = HashedFile(path)
    if file_format == "safetensors":
        tensors, metadata = safetensors.open_tensors(file)
        return Reader(str(path), tensors, [file], metadata)
    return Reader(str(path), torch_file.open_tensors(file, file_format), [file])


def open_directory(folder: Path) -> Reader:
    """Open a Hugging Face model directory: one file, or the shards named in an index."""
    for name in WEIGHT_INDEXES:
        if (folder / name).is_file():
            return _open_shards(folder, folder / name)
    for name in itertools.chain(*WEIGHT_FILES):
        if (folder / name).is_file():
            return open_file(folder / name)
    for pattern in WEIGHT_SHARDS:
        if shards := sorted(folder.glob(pattern)):
            return _join(folder, [open_file(path) for path in shards])
    raise UserError(
        f"{folder} has no weights: expected model.safetensors, pytorch_model.bin, or shards "
        f"with {' or '.join(WEIGHT_INDEXES)}"
    )


def _open_shards(folder: Path, index: Path) -> Reader:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map: download it again")
    names = sorted(set(map(str, weight_map.values())))
    if bad := [n for n in names if Path(n).name != n]:
        raise UserError(f"{index} names a file outside its directory: {bad[0]}")
    if missing := [n for n in names if not (folder / n).is_file()]:
        raise UserError(
            f"{folder} lacks {', '.join(missing)}, which {index.name} names: download it again"
        )
    reader = _join(folder, [open_file(folder / n) for n in names])
    if missing := [k for k in weight_map if k not in reader.tensors]:
        raise UserError(
            f"{folder}: {missing[0]} is in {index.name} but not in {weight_map[missing[0]]}: "
            "download it again"
        )
    return reader


def _join(folder: Path, shards: list[Reader]) -> Reader:
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        if duplicates := tensors.keys() & shard.tensors.keys():
            raise UserError(
                f"{folder}: {min(duplicates)} is in two files, one of them {shard.label}"
            )
        tensors |= shard.tensors
    return Reader(str(folder), tensors, [f for s in shards for f in s.files])


def combine(
    label: str,
    base: Reader,
    delta: Reader,
    add: Callable[[np.ndarray, np.ndarray], np.ndarray],
    names: Mapping[str, str],
) -> Reader:
    """The tensors of `delta`, each combined with one of `base` by `add(base, delta)`.

    names: delta's tensor -> base's tensor.
    """

    def combined(d: Tensor, b: Tensor) -> Tensor:
        nbytes = d.nbytes + b.nbytes
        return Tensor(d.shape, b.dtype, nbytes, lambda: add(b.load(), d.load()), d.position)

    tensors = {d: combined(delta.tensors[d], base.tensors[b]) for d, b in names.items()}
    return Reader(label, tensors, [*base.files, *delta.files])


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. UserError: the file is missing, damaged or not an object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise UserError(f"{path} does not exist") from e
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from e
    except ValueError as e:
        raise UserError(f"{path} is not JSON ({e}): download it again") from e
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}; expected an object")
    return values
