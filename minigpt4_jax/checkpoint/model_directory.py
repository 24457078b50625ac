"""Reading a model directory: model.json, its base directories, and its tensors.

A directory written by training holds only the trained parts; the field `base` of its model.json names
the directory with the other parts, and `base_fingerprint` tells whether a directory is that one.
"""

import contextlib
import hashlib
import itertools
import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, and so with safetensors)
import numpy as np
from safetensors import SafetensorError

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.storage.hub import fetch_model_directory, is_uri, source_uri
from minigpt4_jax.storage.paths import (
    StorageError,
    file_size,
    is_remote,
    join_path,
    local_copy,
    parse_path,
    read_range,
    relative_path,
    wrap_storage_errors,
)
from minigpt4_jax.storage.safetensors_file import SafetensorsFile

FORMAT = 1
MAX_CHAIN = 16  # directories from a model to its last base
FINGERPRINT_BYTES = 1 << 20  # read of each file, which takes milliseconds
Shape = tuple[int, ...]


class ReadableTensors(Mapping[str, np.ndarray]):
    """Lazy mapping of tensors by name; shapes are known without reading them."""

    @abstractmethod
    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """self[name][index]."""

    @abstractmethod
    def shape(self, name: str) -> Shape:
        """The shape of self[name]."""


def locate(model_dir: Path | str) -> Path:
    """The path of a model directory. If it is given by its Hugging Face id, it is downloaded."""
    return parse_path("model directory", fetch_model_directory(model_dir))


def base_reference(base: Path | str, out: Path) -> str:
    """How model.json in `out` names its base: hf://ORG/NAME@COMMIT if it came from the hub, otherwise
    its path relative to `out`."""
    base = locate(base)
    return source_uri(base) or relative_path(base, out)


def read_model_json(model_dir: Path | str) -> dict[str, Any]:
    """model.json as a dictionary. UserError if it is missing, damaged or has another format version."""
    path = locate(model_dir) / "model.json"
    try:
        with wrap_storage_errors(path):
            text = path.read_text()
        document: dict[str, Any] = json.loads(text)
        if document["format"] != FORMAT:
            raise UserError(f"{path}: format {document['format']}, but this version reads {FORMAT}")
        document["config"]
    except (FileNotFoundError, NotADirectoryError) as e:
        if not str(model_dir):
            raise UserError("the model directory is an empty name; expected --model=DIR") from e
        raise UserError(
            f"{model_dir} is not a model directory (no model.json) nor a Hugging Face model id "
            f"(ORG/NAME): create one with `python -m convert build --out={model_dir}`"
        ) from e
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from e
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is damaged ({e}): convert the model again") from e
    return document


@contextlib.contextmanager
def bucket_errors_as_user_errors(path: Path) -> Iterator[None]:
    """Turns errors of a bucket (unreachable, no permission) into UserError."""
    try:
        with wrap_storage_errors(path):
            yield
    except StorageError as e:
        raise UserError(f"cannot read {path}: {e}") from e


def read_config(model_dir: Path | str) -> ModelConfig:
    """The model configuration of a directory, checked. UserError as of `read_model_json`."""
    return ModelConfig.from_dict(read_model_json(model_dir)["config"]).check()


def model_chain(model_dir: Path | str, base: Path | str | None = None) -> list[Path]:
    """The directory, its base, the base of that, and so on. A parameter is read from the first
    directory that has it.

    base: the base of `model_dir`, instead of the recorded one; it must have the recorded fingerprint.
    UserError: a base is missing or another model, or the chain is a cycle.
    """
    chain = [locate(model_dir)]
    if base is not None:
        chain.append(_given_base(chain[0], base))
    while recorded := read_model_json(chain[-1]).get("base"):
        chain.append(_recorded_base(chain[-1], recorded))
        if len(chain) > MAX_CHAIN:
            raise UserError(f"{model_dir}: 'base' in model.json is a cycle")
    return chain


def _recorded_base(folder: Path, recorded: str) -> Path:
    """The base of a directory by what its model.json records. UserError: it does not exist."""
    if is_uri(recorded):
        try:
            return locate(recorded)
        except UserError as e:
            raise UserError(
                f"{folder} holds only what was trained on {recorded}, which is not available: {e}"
                f"{_missing_base_advice(folder)}"
            ) from e
    path = join_path(folder, recorded)
    with bucket_errors_as_user_errors(path):
        exists = path.is_dir()
    if not exists:
        raise UserError(
            f"{folder} holds only what was trained on {path} (recorded as {recorded!r}), which does not "
            f"exist{_missing_base_advice(folder)}"
        )
    return path


def _missing_base_advice(folder: Path) -> str:
    """The end of a message about a directory whose base is missing."""
    copy = _find_base(folder, read_model_json(folder).get("base_fingerprint"))
    found = "" if copy is None else f" ({copy} has the recorded fingerprint)"
    return (
        f": move it back, name its new place with --base={copy or 'DIR'} (in Python load(base=...)), or "
        f"write one complete directory with `python -m convert pack --model={folder} "
        f"--base={copy or 'DIR'} --out=NEW`{found}"
    )


def _find_base(folder: Path, recorded: str | None) -> Path | None:
    """A directory near `folder` with the recorded fingerprint: beside it or beside one of the three
    directories above it."""
    if recorded is None or is_remote(folder):
        return None
    here = folder.absolute()
    candidates = (
        path.parent
        for parent in list(here.parents)[:4]
        for path in sorted(parent.glob("*/model.json"))
    )
    for candidate in candidates:
        with contextlib.suppress(UserError, OSError):
            complete = candidate != here and not read_model_json(candidate).get("base")
            if complete and fingerprint(candidate) == recorded:
                return candidate
    return None


def _given_base(folder: Path, base: Path | str) -> Path:
    """The base that the user gave for a directory, checked."""
    document = read_model_json(folder)
    if not document.get("base"):
        raise UserError(f"base {base}: {folder} is complete and has no base; omit it")
    recorded, actual = document.get("base_fingerprint"), fingerprint(base)
    if recorded not in (None, actual):
        raise UserError(
            f"base {base}: is another model (fingerprint {actual}) than the one that {folder} was "
            f"trained on (fingerprint {recorded}, recorded as {document['base']!r})"
        )
    return locate(base)


def _check_fingerprints(chain: list[Path]) -> None:
    """UserError if a base is not the model that was recorded. Directories of earlier versions record
    no fingerprint."""
    for folder, base in itertools.pairwise(chain):
        recorded = read_model_json(folder).get("base_fingerprint")
        if recorded is not None and fingerprint(base) != recorded:
            raise UserError(
                f"{folder} was trained on another model than {base} is now (its model.json has another "
                "base_fingerprint): put the original back or name it with --base (in Python "
                f"load(base=...)); to use it all the same, remove "
                f"base_fingerprint from {folder / 'model.json'}"
            )


def fingerprint(model_dir: Path | str, base: Path | str | None = None) -> str:
    """A hash of a model directory: its configuration, and size and beginning of every file. base: as for
    `model_chain`."""
    digest = hashlib.sha256()
    for directory in model_chain(model_dir, base):
        document = read_model_json(directory)
        digest.update(json.dumps(document["config"], sort_keys=True).encode())
        with bucket_errors_as_user_errors(directory):
            for path in sorted(directory.glob("*.safetensors")):
                digest.update(f"{path.name} {file_size(path)}".encode())
                digest.update(read_range(path, 0, FINGERPRINT_BYTES))
    return digest.hexdigest()[:16]


def tokenizer_dir(model_dir: Path | str, base: Path | str | None = None) -> Path:
    """The tokenizer/ folder of a model (its own or its base's), on the local disk. base: as for
    `model_chain`. UserError: there is none."""
    for folder in model_chain(model_dir, base):
        with bucket_errors_as_user_errors(folder):
            if (folder / "tokenizer").is_dir():
                return local_copy(folder / "tokenizer")
    raise UserError(f"{model_dir} has no tokenizer/: convert the model again")


class _Stored(NamedTuple):
    """A tensor's file and type."""

    path: Path
    shape: Shape
    dtype: str  # in safetensors' spelling, for instance F16


class Tensors(ReadableTensors):
    """Lazy mapping of the tensors of a model directory and its bases; each is read when it is accessed."""

    def __init__(self, model_dir: Path | str, base: Path | str | None = None):
        """base: as for `model_chain`."""
        self._stored: dict[str, _Stored] = {}
        self._files: dict[Path, SafetensorsFile] = {}
        chain = model_chain(model_dir, base)
        _check_fingerprints(chain)
        for folder in chain:
            with bucket_errors_as_user_errors(folder):
                paths = sorted(folder.glob("*.safetensors"))
            for path in paths:
                with self._opened(path) as file:
                    for name in file.keys():  # noqa: SIM118  (not a mapping)
                        part = file.get_slice(name)
                        stored = _Stored(path, tuple(part.get_shape()), part.get_dtype())
                        self._stored.setdefault(name, stored)

    def __getitem__(self, name: str) -> np.ndarray:
        with self._opened(self._stored[name].path) as file:
            tensor: np.ndarray = file.get_tensor(name)
            return tensor

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """self[name][index]; no more than that is read."""
        with self._opened(self._stored[name].path) as file:
            part: np.ndarray = file.get_slice(name)[index]
            return part

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def shape(self, name: str) -> Shape:
        return self._stored[name].shape

    def path(self, name: str) -> Path:
        """The file that the tensor is read from."""
        return self._stored[name].path

    def dtype(self, name: str) -> str:
        """The stored type in safetensors' spelling, for instance F16."""
        return self._stored[name].dtype

    @contextlib.contextmanager
    def _opened(self, path: Path) -> Iterator[SafetensorsFile]:
        try:
            with wrap_storage_errors(path):
                if path not in self._files:
                    self._files[path] = SafetensorsFile(path)
                yield self._files[path]
        except StorageError as e:
            raise UserError(f"cannot read {path}: {e}") from e
        except (SafetensorError, OSError, ValueError) as e:
            raise UserError(f"{path} is damaged ({e}): convert the model again") from e
