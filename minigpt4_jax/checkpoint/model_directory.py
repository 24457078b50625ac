"""What lies in a model directory: model.json, the directories it is based on, and its tensors.

weights.py writes directories and makes models of them.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (teaches NumPy, and so safetensors, bfloat16)
import numpy as np
from safetensors import SafetensorError, safe_open

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.storage.gcs_safetensors import GcsSafetensors
from minigpt4_jax.storage.paths import (
    StorageError,
    is_remote,
    join_path,
    local_copy,
    parse_path,
    wrap_storage_errors,
)

FORMAT = 1


def read_document(model_dir: Path | str) -> dict[str, Any]:
    """model.json as a dictionary. UserError when it is absent, corrupt or of another format."""
    path = parse_path("model directory", model_dir) / "model.json"
    try:
        with wrap_storage_errors(path):
            text = path.read_text()
        document = json.loads(text)
        if document["format"] != FORMAT:
            raise UserError(f"{path}: format {document['format']}, this version reads {FORMAT}")
        document["config"]
    except FileNotFoundError as e:
        raise UserError(
            f"{model_dir} is not a model directory (no model.json): make one with "
            "`python -m convert build --out={model_dir}`".replace("{model_dir}", str(model_dir))
        ) from e
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from e
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is damaged ({e}): convert the model again") from e
    return document


@contextlib.contextmanager
def looking(path: Path) -> Iterator[None]:
    """UserError where a bucket cannot be reached, or what is in it not seen."""
    try:
        with wrap_storage_errors(path):
            yield
    except StorageError as e:
        raise UserError(f"cannot read {path}: {e}") from e


def read_config(model_dir: Path | str) -> ModelConfig:
    """The configuration of the model in a directory, checked."""
    return ModelConfig.from_dict(read_document(model_dir)["config"]).check()


def model_chain(model_dir: Path | str) -> list[Path]:
    """The directory, then its base, and so on: a parameter is read from the first that has it."""
    chain = [parse_path("model directory", model_dir)]
    while base := read_document(chain[-1]).get("base"):
        chain.append(join_path(chain[-1], base))
        with looking(chain[-1]):
            there = chain[-1].is_dir()
        if not there:
            raise UserError(
                f"{chain[-2]} holds the trained part of {chain[-1]}, which is not there: move it "
                f"back, or correct 'base' in {chain[-2] / 'model.json'}"
            )
        if len(chain) > 16:
            raise UserError(f"{model_dir}: 'base' in model.json goes in a circle")
    return chain


def tokenizer_dir(model_dir: Path | str) -> Path:
    """The tokenizer/ folder of a model (its own or its base's), on disk."""
    for folder in model_chain(model_dir):
        with looking(folder):
            if (folder / "tokenizer").is_dir():
                return local_copy(folder / "tokenizer")
    raise UserError(f"{model_dir} has no tokenizer/: convert the model again")


class _Stored(NamedTuple):
    """Where a tensor lies, and what it is."""

    path: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it, for instance F16


class Tensors(Mapping[str, np.ndarray]):
    """Lazy view of a model directory's tensors (and its bases'): each is read when asked for."""

    def __init__(self, model_dir: Path | str):
        self._stored: dict[str, _Stored] = {}
        self._in_bucket: dict[Path, GcsSafetensors] = {}  # by their files
        for folder in model_chain(model_dir):
            with looking(folder):
                paths = sorted(folder.glob("*.safetensors"))
            for path in paths:
                with self._opened(path) as file:
                    for name in file.keys():  # noqa: SIM118  (not a mapping)
                        part = file.get_slice(name)
                        stored = _Stored(path, tuple(part.get_shape()), part.get_dtype())
                        self._stored.setdefault(name, stored)

    def __getitem__(self, name: str) -> np.ndarray:
        # Opened for this tensor alone: what was read of a file that stays open stays mapped, and a
        # model would take its size twice.
        with self._opened(self._stored[name].path) as file:
            return file.get_tensor(name)

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """self[name][index], of which no more is read."""
        with self._opened(self._stored[name].path) as file:
            return file.get_slice(name)[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape

    def path(self, name: str) -> Path:
        """The file that the tensor is read from."""
        return self._stored[name].path

    def dtype(self, name: str) -> str:
        """The stored type as safetensors spells it, for instance F16."""
        return self._stored[name].dtype

    @contextlib.contextmanager
    def _opened(self, path: Path) -> Iterator[Any]:
        try:
            if is_remote(path):
                with wrap_storage_errors(path):
                    if path not in self._in_bucket:
                        self._in_bucket[path] = GcsSafetensors(path)
                    yield self._in_bucket[path]
            else:
                with safe_open(path, framework="np") as file:
                    yield file
        except StorageError as e:
            raise UserError(f"cannot read {path}: {e}") from e
        except (SafetensorError, OSError, ValueError) as e:
            raise UserError(f"{path} is damaged ({e}): convert the model again") from e
