"""The files a model is made of: each opened, recognised, and matched against its table."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert.llm import LanguageModel
from convert.readers import Reader, open_file, read_json
from convert.tables import BLIP2, EVA, FINE_TUNED, LLM, OWN, Match, Table, match
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


def open_source(option: str, path: Path, accepted: tuple[Table, ...]) -> Source:
    """Open a checkpoint and recognise it by its keys. UserError when it is something else."""
    sizes = {}
    if path.is_dir():  # a model directory of this project
        config = read_json(path / "model.json").get("config", {})
        sizes = {k: config[k] for k in ("vision", "qformer") if isinstance(config.get(k), dict)}
        reader = _open_own_directory(path)
    else:
        reader = open_file(path)
        if "config" in reader.metadata:
            sizes = json.loads(reader.metadata["config"])
    counts = {t.name: len(match(t, reader.tensors)[0]) for t in (OWN, EVA, BLIP2, LLM, FINE_TUNED)}
    best = max(counts, key=lambda name: counts[name])
    table = next((t for t in accepted if t.name == best), None)
    if table is None or counts[best] == 0:
        what = _WHAT[best] if counts[best] else f"unknown (its first keys: {', '.join(list(reader.tensors)[:3])})"
        raise UserError(f"{option}: {path} is {what}; expected {' or '.join(t.name for t in accepted)}")
    found, unknown = match(table, reader.tensors)
    return Source(option, reader, table, found, unknown, sizes)


def _open_own_directory(folder: Path) -> Reader:
    parts = [open_file(p) for p in sorted(folder.glob("*.safetensors")) if not p.name.startswith("llm")]
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    return Reader(str(folder), tensors, [f for part in parts for f in part.files])


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
