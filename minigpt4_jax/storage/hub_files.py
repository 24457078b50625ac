"""Which files of a Hugging Face repository are needed, decided from its file list before a download."""

import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path, PurePosixPath

from minigpt4_jax.errors import UserError

_CONFIGS = ("config.json", "generation_config.json")
# Weights of a Hugging Face directory. Safetensors come first, so that no pickle is downloaded needlessly.
WEIGHT_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WEIGHT_FILES = (("model.safetensors",), ("pytorch_model.bin", "model.bin"))  # if there is one
WEIGHT_SHARDS = ("*.safetensors", "pytorch_model*.bin")  # without an index
_GGUF_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one revision, or those of them in the cache.

    download: fetches one file and returns its local path.
    """

    label: str  # what messages call the repository
    files: Collection[str]
    download: Callable[[str], Path]

    def in_root(self, pattern: str) -> list[str]:
        """Files in the top directory that match a glob pattern."""
        paths = map(PurePosixPath, self.files)
        return sorted(p.name for p in paths if len(p.parts) == 1 and p.match(pattern))


@dataclass(frozen=True)
class Selection:
    """Glob patterns of the files to download (`*` matches `/` too), and of those to leave out.

    path: what the caller opens, relative to the snapshot's directory.
    """

    patterns: Sequence[str]
    ignored: Sequence[str] = ()
    path: str = "."

    def matches(self, file: str) -> bool:
        """Whether the file is to be downloaded."""
        return any(fnmatchcase(file, pattern) for pattern in self.patterns) and not any(
            fnmatchcase(file, pattern) for pattern in self.ignored
        )


def select_file(name: str, listing: Listing) -> Selection:
    """The named file alone. UserError: the repository does not have it."""
    if name not in listing.files:
        suffix = PurePosixPath(name).suffix
        others = sorted(file for file in listing.files if file.endswith(suffix))
        raise UserError(f"{listing.label} has no file {name}; {_choices(suffix, others)}")
    if part := _GGUF_PART.search(name):
        raise UserError(
            f"{listing.label}: {name} is one of {int(part[2])} parts; download them and join them with "
            "llama-gguf-split --merge, or choose a file that is not split"
        )
    return Selection([escape(name)], path=name)


def select_gguf(tag: str, listing: Listing) -> Selection:
    """The GGUF file whose name contains the quantization type `tag`, such as Q4_K_M, as a word."""
    word = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(tag)}(?![A-Za-z0-9_])", re.IGNORECASE)
    every = _gguf_files(listing)
    found = [file for file in every if word.search(PurePosixPath(file).stem)]
    if len(found) != 1:
        raise UserError(
            f"{listing.label}: {len(found)} GGUF files match {tag!r}; {_choices('.gguf', found or every)}"
        )
    return select_file(found[0], listing)


def select_language_model(tokenizer_files: Collection[str], listing: Listing) -> Selection:
    """Configuration, tokenizer and weights (safetensors where there are any), or the only GGUF file.

    UserError: neither is there, or several GGUF files are.
    """
    if "config.json" in listing.files and (weights := _weight_files(listing)):
        return Selection([*_CONFIGS, *tokenizer_files, *map(escape, weights)])
    found = _gguf_files(listing)
    if len(found) == 1:
        return select_file(found[0], listing)
    if found:
        raise UserError(
            f"{listing.label} has {len(found)} GGUF files; name one, or its type as in "
            f"{listing.label}:Q4_K_M; {_choices('.gguf', found)}"
        )
    raise UserError(
        f"{listing.label} is not a language model in a format that can be converted: expected config.json "
        f"with .safetensors or pytorch_model.bin, or a .gguf file; {_choices('', sorted(listing.files))}"
    )


def select_tokenizer(tokenizer_files: Collection[str], listing: Listing) -> Selection:
    """The tokenizer's files, and config.json, which names the tokenizer's class."""
    if not set(tokenizer_files) & set(listing.files):
        raise UserError(
            f"{listing.label} has no tokenizer: expected one of {', '.join(sorted(tokenizer_files))}"
        )
    return Selection(["config.json", *tokenizer_files])


def select_model_directory(listing: Listing) -> Selection:
    """A model directory of this project: model.json, tokenizer/ and tensors."""
    if "model.json" not in listing.files:
        raise UserError(
            f"{listing.label} is not a model directory (it has no model.json): make one with "
            f"`python -m convert build --llm={listing.label} --out=DIR`"
        )
    return Selection(["model.json", "tokenizer/*", "*.safetensors"], ["*/*.safetensors"])


def select_whole_model(tokenizer_files: Collection[str], listing: Listing) -> Selection:
    """A model directory of this project, or a Hugging Face model with all its parts."""
    if "model.json" in listing.files:
        return select_model_directory(listing)
    return select_language_model(tokenizer_files, listing)


def _gguf_files(listing: Listing) -> list[str]:
    """All GGUF files, of those that are split the first part, without projectors of vision models."""
    found = []
    for file in sorted(listing.files):
        part = _GGUF_PART.search(file)
        projector = PurePosixPath(file).name.lower().startswith("mmproj")
        if file.endswith(".gguf") and not projector and (part is None or int(part[1]) == 1):
            found.append(file)
    return found


def _weight_files(listing: Listing) -> list[str]:
    """The files of one format that hold the weights, with their index; [] if there are none."""
    for index, single, loose in zip(WEIGHT_INDEXES, WEIGHT_FILES, WEIGHT_SHARDS, strict=True):
        if index in listing.files:
            return [index, *_shards(listing, index)]
        for name in single:
            if name in listing.files:
                return [name]
        if found := listing.in_root(loose):
            return found
    return []


def _shards(listing: Listing, index: str) -> list[str]:
    """The files that an index names. UserError: it is damaged, or the repository lacks one."""
    try:
        names = sorted(set(json.loads(listing.download(index).read_bytes())["weight_map"].values()))
        absent = [name for name in names if name not in listing.files]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{listing.label}: {index} is damaged: it has no weight_map") from e
    if absent:
        raise UserError(f"{listing.label} lacks {absent[0]}, which {index} names")
    return names


def _choices(suffix: str, files: Sequence[str], limit: int = 8) -> str:
    """What is there instead, for the end of a message."""
    if not files:
        return f"it has no {suffix or 'files'}" if suffix else "it is empty"
    more = f" and {len(files) - limit} more" if len(files) > limit else ""
    return f"it has {', '.join(files[:limit])}{more}"
