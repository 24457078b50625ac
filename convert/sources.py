"""The files a model is made of: each opened, recognised, and matched against its table."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert.formats.readers import Reader, open_file
from convert.formats.tensors import Tensor
from convert.key_mapping import BLIP2, EVA, FINE_TUNED, LLM, OWN, Match, Table, match
from convert.language_model import LanguageModel
from minigpt4_jax.checkpoint.model_directory import model_chain, read_config
from minigpt4_jax.errors import UserError

_WHAT = {
    EVA.name: "an EVA-ViT file, which goes to --vision",
    BLIP2.name: "a BLIP-2 checkpoint, which goes to --qformer",
    FINE_TUNED.name: "a fine-tuned MiniGPT-4 checkpoint, which goes to --checkpoint",
    LLM.name: "a language model, which goes to --llm",
    OWN.name: "a file of this project",
}


@dataclass
class Source:
    """One file or directory: its tensors under this project's names, and keys nobody knows."""

    option: str  # "--vision"
    reader: Reader
    table: Table
    found: dict[str, Match]
    unknown: list[str]
    sizes: dict[str, Any] = field(default_factory=dict)  # part -> fields that shapes cannot tell

    @property
    def where(self) -> str:
        return f"{self.option} {self.reader.label}"

    def shapes(self, *prefixes: str) -> dict[str, tuple[int, ...]]:
        """Raw shapes of the parameters whose names begin so (all without prefixes)."""
        return {
            name: self.reader.tensors[m.key].shape
            for name, m in self.found.items()
            if not prefixes or name.startswith(prefixes)
        }


@dataclass
class Sources:
    """What was opened. `vision` and `qformer` may be one file."""

    vision: Source
    qformer: Source | None
    llm: Source
    checkpoint: Source | None

    def all(self) -> list[Source]:
        """Each once."""
        distinct: list[Source] = []
        for s in (self.vision, self.qformer, self.llm, self.checkpoint):
            if s is not None and all(s is not d for d in distinct):
                distinct.append(s)
        return distinct


def lora_shapes(source: Source) -> dict[str, tuple[int, ...]]:
    """Shapes of the LoRA weights a source holds."""
    return {name: shape for name, shape in source.shapes().items() if ".lora_" in name}


def open_source(option: str, path: Path, accepted: tuple[Table, ...]) -> Source:
    """Open a checkpoint and recognise it by its keys. UserError when it is something else."""
    if path.is_dir():
        reader, sizes = _open_model_directory(option, path)
    else:
        reader = open_file(path)
        sizes = _sizes_in(reader)
    counts = {t.name: len(match(t, reader.tensors)[0]) for t in (OWN, EVA, BLIP2, LLM, FINE_TUNED)}
    best = max(counts, key=lambda name: counts[name])
    table = next((t for t in accepted if t.name == best), None)
    if table is None or counts[best] == 0:
        what = _WHAT[best]
        if counts[best] == 0:
            what = f"unknown (its first keys: {', '.join(list(reader.tensors)[:3])})"
        expected = " or ".join(t.name for t in accepted)
        raise UserError(f"{option}: {path} is {what}; expected {expected}")
    found, unknown = match(table, reader.tensors)
    return Source(option, reader, table, found, unknown, sizes)


def _sizes_in(reader: Reader) -> dict[str, Any]:
    """{"vision": VisionConfig fields, "qformer": ...} that our .safetensors files carry along."""
    try:
        sizes = json.loads(reader.metadata.get("config", "{}"))
        return {part: dict(sizes[part]) for part in ("vision", "qformer") if sizes.get(part)}
    except (ValueError, TypeError, AttributeError) as e:
        raise UserError(f"{reader.label}: its metadata is damaged ({e})") from e


def _open_model_directory(option: str, folder: Path) -> tuple[Reader, dict[str, Any]]:
    """The vision and trained parts of a model directory, and of the ones it is based on."""
    if not (folder / "model.json").is_file():
        raise UserError(f"{option}: {folder} is a directory without model.json; expected a file")
    config = read_config(folder).to_dict()
    tensors: dict[str, Tensor] = {}
    files = []
    for part in model_chain(folder):
        for path in sorted(part.glob("*.safetensors")):
            if not path.name.startswith("llm"):
                opened = open_file(path)
                tensors = opened.tensors | tensors  # the first in the chain counts
                files += opened.files
    sizes = {part: config[part] for part in ("vision", "qformer", "lora") if config[part]}
    return Reader(str(folder), tensors, files), sizes


def llm_source(model: LanguageModel) -> Source:
    """The language model as a source."""
    found, unknown = match(model.table, model.reader.tensors)
    return Source("--llm", model.reader, model.table, found, unknown)


def packaged_encoder() -> Path:
    """The small demonstration encoder this package ships. UserError when it was left out."""
    import minigpt4_jax

    shipped = sorted((Path(minigpt4_jax.__file__).parent / "assets").glob("*.safetensors"))
    if not shipped:
        raise UserError("--vision=FILE is needed (for instance eva_vit_g.pth)")
    return shipped[0]
