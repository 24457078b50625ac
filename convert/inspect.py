"""python -m convert inspect: prints what a model directory contains and where it came from."""

import json
import math
from pathlib import Path
from typing import Any

from convert.output import combined_sources
from convert.usage import describe_usage, usage_lines
from minigpt4_jax.checkpoint.model_directory import Tensors, model_chain, read_config
from minigpt4_jax.checkpoint.parameters import part_of
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.storage.paths import parse_path
from minigpt4_jax.storage.safetensors_header import DTYPES

_PARTS = ("vit", "qformer", "projection", "lora", "llm")
# part -> the options of `build` that it may come from; the first that was recorded counts
_ORIGINS = {
    "vit": ("vision",),
    "qformer": ("qformer",),
    "projection": ("checkpoint",),
    "lora": ("lora", "checkpoint"),
    "llm": ("llm",),
}


def inspect(model_dir: Path, *, base: Path | None = None, as_json: bool = False) -> dict[str, Any]:
    """Print describe() as a table or JSON. UserError: not a model directory."""
    description = describe(model_dir, base)
    print(json.dumps(description, indent=1) if as_json else _table(description))
    return description


def describe(model_dir: Path, base: Path | None = None) -> dict[str, Any]:
    """Variant, configuration, origins, the parameters, dtypes and bytes of each part, and what is
    needed to use the model (usage.py). base: the directory of its base, if that is no longer where
    model.json says."""
    model_dir = parse_path("model directory", model_dir)
    config = read_config(model_dir)
    chain = model_chain(model_dir, base)
    sources = combined_sources(chain)
    parts = _parts(Tensors(model_dir, base))
    for name, part in parts.items():
        origin = next((sources[o] for o in _ORIGINS[name] if o in sources), None)
        if len(part["directories"]) and part["directories"] != [str(chain[-1])]:
            origin = {"file": part["directories"][0], "note": "trained here"}
        part["source"] = origin
    return {
        "model": str(model_dir),
        "base": [str(folder) for folder in chain[1:]],
        "variant": config.variant,
        "visual_tokens": config.visual_tokens,
        "parameters": sum(p["parameters"] for p in parts.values()),
        "bytes": sum(p["bytes"] for p in parts.values()),
        "parts": parts,
        "config": config.to_dict(),
        "usage": describe_usage(model_dir, config, base),
        "sources": sources,
    }


def _parts(tensors: Tensors) -> dict[str, dict[str, Any]]:
    """Part -> parameters, bytes, dtypes, files and directories."""
    parts: dict[str, dict[str, Any]] = {}
    for name in tensors:
        empty = {"parameters": 0, "bytes": 0, "dtypes": [], "files": [], "directories": []}
        part = parts.setdefault(part_of(name), empty)
        dtype, count = DTYPES[tensors.dtype(name)], math.prod(tensors.shape(name))
        dtype_name = dtype.name
        if dtype_name == "uint8":  # packed int4: two parameters in a byte
            part["parameters"] += 2 * count
            dtype_name = "int4"
        elif not name.endswith(("_scale", "_offset")):  # of a quantized weight
            part["parameters"] += count
        part["bytes"] += count * dtype.itemsize
        path = tensors.path(name)
        values = {"dtypes": dtype_name, "files": path.name, "directories": str(path.parent)}
        for key, value in values.items():
            if value not in part[key]:
                part[key].append(value)
    return {name: parts[name] for name in _PARTS if name in parts}


def _table(description: dict[str, Any]) -> str:
    config = ModelConfig.from_dict(description["config"])
    lines = [f"{description['model']}: {description['variant']}"]
    lines += [f"  trained part of {folder}" for folder in description["base"]]
    lines += ["", f"{'part':12}{'parameters':>16}{'bytes':>12}  {'types':20}from"]
    rows = [(name, p, _origin(p["source"])) for name, p in description["parts"].items()]
    total = {"parameters": description["parameters"], "bytes": description["bytes"], "dtypes": []}
    for name, p, origin in [*rows, ("total", total, "")]:
        size, types = f"{p['bytes'] / 1e6:,.1f} MB", ", ".join(p["dtypes"])
        lines.append(f"{name:12}{p['parameters']:>16,}{size:>12}  {types:20}{origin}".rstrip())
    lines += ["", *_configuration(config), "", *usage_lines(description["usage"])]
    lines += ["", "sources"]
    for option, source in description["sources"].items():
        lines += _source_lines(option, source)
    return "\n".join(lines)


def _configuration(c: ModelConfig) -> list[str]:
    v, q, m, t = c.vision, c.qformer, c.llm, c.tokenizer
    rows = {
        "vision": f"{v.image_size} px, patch {v.patch_size}, {v.depth} blocks, width {v.width}, "
        f"{v.heads} heads, MLP {v.mlp}",
        "qformer": "none"
        if q is None
        else f"{q.queries} queries, {q.layers} layers, width {q.hidden}, {q.heads} heads, "
        f"FFN {q.ffn}",
        "visual tokens": f"{c.visual_tokens} per image"
        + (f" ({c.merge_patches} patches concatenated)" if c.merge_patches > 1 else ""),
        "projection": f"{c.projection_in} -> {m.width}",
        "llm": f"{m.model_type}, {m.layers} layers, width {m.width}, {m.heads} heads "
        f"({m.kv_heads} key/value), FFN {m.ffn}, vocabulary {m.vocab}"
        + (", tied embedding" if m.tie else ""),
        "lora": "none"
        if c.lora is None
        else f"rank {c.lora.rank}, alpha {c.lora.alpha:g}, on {', '.join(c.lora.targets)}, "
        f"dropout {c.lora.dropout:g}",
        "tokenizer": f"{t.kind}, bos {t.bos_id}, eos {t.eos_id}, pad {t.pad_id}",
        "prompt template": repr(c.prompt_template),
        "chat template": c.chat_template,
        "end symbol": repr(c.end_symbol),
        "max text length": str(c.max_text_length),
        "max context": str(c.max_context),
    }
    return [f"{name:16}{value}" for name, value in rows.items()]


def _origin(source: dict[str, Any] | None) -> str:
    """One line for an entry of model.json's sources."""
    if source is None:
        return "not recorded"
    file, note = source.get("hub") or source.get("file"), source.get("note")
    if not file:
        return str(note or ", ".join(f"{k} {v}" for k, v in source.items()))
    return f"{file} ({note})" if note is not None else str(file)


def _source_lines(option: str, source: dict[str, Any]) -> list[str]:
    digest = f"  sha256 {source['sha256']}" if "sha256" in source else ""
    lines = [f"  {option:11}{_origin(source)}{digest}"]
    return lines + [f"    {digest}  {name}" for name, digest in source.get("files", {}).items()]
