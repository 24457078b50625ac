"""The checkpoints that a model is built from: opened, recognized, and mapped to parameter names."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert.formats.readers import Reader, open_file
from convert.formats.tensors import Tensor
from convert.key_mapping import (
    BLIP2,
    EVA,
    FINE_TUNED,
    LLM,
    NATIVE,
    KeyTable,
    MappedKey,
    Transform,
    key_as_in,
    map_keys,
)
from convert.language_model import LanguageModelFiles
from minigpt4_jax.checkpoint.model_directory import model_chain, read_config
from minigpt4_jax.errors import UserError

_DESCRIPTIONS = {
    EVA.name: "an EVA-ViT file, which belongs to --vision",
    BLIP2.name: "a BLIP-2 checkpoint, which belongs to --qformer",
    FINE_TUNED.name: "a fine-tuned MiniGPT-4 checkpoint, which belongs to --checkpoint",
    LLM.name: "a language model, which belongs to --llm",
    NATIVE.name: "a file of this project",
}


@dataclass
class MappedCheckpoint:
    """A checkpoint whose keys are mapped to parameter names.

    option: the command-line option it was given by, such as "--vision".
    sizes: part -> configuration fields that the checkpoint itself records.
    recorded: what else of its config.json goes to `sources` of model.json, for an export.
    """

    option: str
    reader: Reader
    table: KeyTable
    mapped: dict[str, MappedKey]
    unknown_keys: list[str]
    sizes: dict[str, Any] = field(default_factory=dict)
    recorded: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Its name in messages."""
        return f"{self.option} {self.reader.label}"

    def key_of(self, name: str) -> str | None:
        """The key that the file would have for a parameter that it lacks; None if its format has none."""
        return key_as_in(self.table, name, self.reader.tensors)

    def shapes(self, *prefixes: str) -> dict[str, tuple[int, ...]]:
        """Parameter -> shape in the file, for names with one of the prefixes (all without any)."""
        return {
            name: self.reader.tensors[m.key].shape
            for name, m in self.mapped.items()
            if not prefixes or name.startswith(prefixes)
        }

    def parameters(self, *prefixes: str) -> dict[str, "ParameterSource"]:
        """The sources of the parameters whose names have one of the prefixes (all without any)."""
        return {
            name: ParameterSource(self, m.key, m.transform)
            for name, m in self.mapped.items()
            if not prefixes or name.startswith(prefixes)
        }


@dataclass(frozen=True)
class ParameterSource:
    """Where a parameter is read from."""

    checkpoint: MappedCheckpoint
    key: str
    transform: Transform

    @property
    def tensor(self) -> Tensor:
        return self.checkpoint.reader.tensors[self.key]

    @property
    def label(self) -> str:
        """Its name in messages."""
        return f"{self.checkpoint.label}: {self.key}"


@dataclass
class BuildInputs:
    """The opened checkpoints of one build. `vision` and `qformer` may be the same object."""

    vision: MappedCheckpoint
    qformer: MappedCheckpoint | None
    llm: MappedCheckpoint
    checkpoint: MappedCheckpoint | None

    def all(self) -> list[MappedCheckpoint]:
        """All of them, each once."""
        distinct: list[MappedCheckpoint] = []
        for c in (self.vision, self.qformer, self.llm, self.checkpoint):
            if c is not None and all(c is not d for d in distinct):
                distinct.append(c)
        return distinct


def lora_shapes(checkpoint: MappedCheckpoint) -> dict[str, tuple[int, ...]]:
    """Shapes of the LoRA weights in a checkpoint."""
    return {name: shape for name, shape in checkpoint.shapes().items() if ".lora_" in name}


def open_checkpoint(
    option: str,
    path: Path,
    accepted: tuple[KeyTable, ...],
    known: tuple[KeyTable, ...] = (NATIVE, EVA, BLIP2, LLM, FINE_TUNED),
) -> MappedCheckpoint:
    """Open a checkpoint and recognize its format, one of `known`, by its keys. UserError: not an
    accepted format."""
    if path.is_dir():
        reader, sizes = _open_model_directory(option, path)
    else:
        reader = open_file(path)
        sizes = _recorded_sizes(reader)
    counts = {t.name: len(map_keys(t, reader.tensors)[0]) for t in known}
    best = max(counts, key=lambda name: counts[name])
    table = next((t for t in accepted if t.name == best), None)
    if table is None or counts[best] == 0:
        description = _DESCRIPTIONS.get(best, f"a file of {best}")
        if counts[best] == 0:
            description = f"unknown (its first keys: {', '.join(list(reader.tensors)[:3])})"
        expected = " or ".join(t.name for t in accepted)
        raise UserError(f"{option}: {path} is {description}; expected {expected}")
    mapped, unknown = map_keys(table, reader.tensors)
    return MappedCheckpoint(option, reader, table, mapped, unknown, sizes)


def _recorded_sizes(reader: Reader) -> dict[str, Any]:
    """{"vision": VisionConfig fields, "qformer": ...} from the metadata of our .safetensors files."""
    try:
        sizes = json.loads(reader.metadata.get("config", "{}"))
        return {part: dict(sizes[part]) for part in ("vision", "qformer") if sizes.get(part)}
    except (ValueError, TypeError, AttributeError) as e:
        raise UserError(f"{reader.label}: its metadata is damaged ({e})") from e


def _open_model_directory(option: str, folder: Path) -> tuple[Reader, dict[str, Any]]:
    """Everything but the language model of a model directory and of those it is based on."""
    if not (folder / "model.json").is_file():
        raise UserError(f"{option}: {folder} is a directory without model.json; expected a file")
    config = read_config(folder).to_dict()
    tensors: dict[str, Tensor] = {}
    files = []
    for directory in model_chain(folder):
        for path in sorted(directory.glob("*.safetensors")):
            if not path.name.startswith("llm"):
                reader = open_file(path)
                tensors = reader.tensors | tensors  # the first in the chain takes precedence
                files += reader.files
    sizes = {part: config[part] for part in ("vision", "qformer", "lora") if config[part]}
    return Reader(str(folder), tensors, files), sizes


def llm_checkpoint(files: LanguageModelFiles) -> MappedCheckpoint:
    """The language model's weights, mapped."""
    mapped, unknown = map_keys(files.table, files.reader.tensors)
    return MappedCheckpoint("--llm", files.reader, files.table, mapped, unknown)


def packaged_encoder() -> Path:
    """The demonstration's vision encoder in this package. UserError when it is not installed."""
    import minigpt4_jax

    files = sorted((Path(minigpt4_jax.__file__).parent / "assets").glob("*.safetensors"))
    if not files:
        raise UserError("--vision=FILE is needed (for instance eva_vit_g.pth)")
    return files[0]
