"""A language model from a Hugging Face directory or GGUF file, with Vicuna delta and tokenizer."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.formats.gguf import PERMUTED, Gguf
from convert.formats.gguf_tokenizer import tokenizer_files
from convert.formats.readers import Reader, combined, open_directory, read_json
from convert.key_mapping import LLM, Table, gguf_table, match
from minigpt4_jax.errors import UserError

TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
_VOCABULARIES = ("tokenizer.model", "tokenizer.json", "vocab.json")


@dataclass
class LanguageModel:
    """Weights, what config.json says, and tokenizer files (name -> path or content)."""

    reader: Reader
    table: Table
    config: dict[str, Any]
    tokenizer: Mapping[str, Path | bytes]
    tokenizer_origin: str

    def chat_template(self) -> str:
        """The model's own chat format (a Jinja template), "" when it has none."""
        if "chat_template.jinja" in self.tokenizer:
            return _text(self.tokenizer["chat_template.jinja"])
        if "tokenizer_config.json" not in self.tokenizer:
            return ""
        try:
            template = json.loads(_text(self.tokenizer["tokenizer_config.json"])).get(
                "chat_template"
            )
        except (ValueError, AttributeError):
            return ""
        if isinstance(template, list):  # several, each with a name
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default")
        return template if isinstance(template, str) else ""


def _text(content: Path | bytes) -> str:
    return (content if isinstance(content, bytes) else content.read_bytes()).decode(
        "utf-8", "replace"
    )


def open_llm(path: Path, delta: Path | None = None, tokenizer: Path | None = None) -> LanguageModel:
    """Open --llm (with --llm-delta added and --tokenizer instead of its own, when given)."""
    if not path.exists():
        raise UserError(f"--llm: {path} does not exist")
    if path.is_dir() and not (path / "config.json").is_file():
        if len(found := sorted(path.glob("*.gguf"))) == 1:
            path = found[0]
        else:
            raise UserError(
                f"--llm: {path} has no config.json; expected a Hugging Face model directory"
            )
    if path.is_dir():
        return _open_hf(path, delta, tokenizer)
    if delta is not None:
        raise UserError(f"--llm-delta needs --llm to be a Hugging Face directory, {path} is a file")
    return _open_gguf(path, tokenizer)


def _open_gguf(path: Path, tokenizer: Path | None) -> LanguageModel:
    source = Gguf(path)
    config = source.hf_config()
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    table = gguf_table(heads, kv_heads, source.architecture in PERMUTED)
    files = find_tokenizer(tokenizer) if tokenizer else tokenizer_files(source)
    return LanguageModel(source.reader, table, config, files, str(tokenizer or path))


def _open_hf(path: Path, delta: Path | None, tokenizer: Path | None) -> LanguageModel:
    reader = open_directory(path)
    config = read_json(path / "config.json")
    homes = [path]
    if delta is not None:
        if not delta.is_dir():
            raise UserError(f"--llm-delta: {delta} is not a directory")
        reader = _add_delta(path, reader, delta)
        homes.insert(0, delta)
        if (delta / "config.json").is_file():
            config = read_json(delta / "config.json")
    if tokenizer is not None:
        homes = [tokenizer]
    home = next((h for h in homes if _has_vocabulary(h)), homes[-1])
    return LanguageModel(reader, LLM, config, find_tokenizer(home), str(home))


def _has_vocabulary(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _VOCABULARIES)


def find_tokenizer(folder: Path) -> dict[str, Path | bytes]:
    """The tokenizer's files in a directory. UserError when there is no tokenizer."""
    if not folder.is_dir():
        raise UserError(f"tokenizer: {folder} is not a directory")
    if not _has_vocabulary(folder):
        raise UserError(
            f"{folder} has no tokenizer (tokenizer.model or tokenizer.json): copy the language "
            "model's tokenizer files there, or give --tokenizer=DIR"
        )
    found: dict[str, Path | bytes] = {
        name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()
    }
    settings = (
        read_json(folder / "tokenizer_config.json") if "tokenizer_config.json" in found else {}
    )
    if "tokenizer_class" not in settings and (folder / "config.json").is_file():
        found["config.json"] = folder / "config.json"  # names the tokenizer's class by model_type
    return found


def drop_added_tokens(language: LanguageModel, vocab: int) -> list[str]:
    """Leave out of added_tokens.json what the model has no row for (some LLaMA files name such a
    pad token); returns those tokens."""
    content = language.tokenizer.get("added_tokens.json")
    if not isinstance(content, Path):
        return []
    added = read_json(content)
    dropped = [token for token, i in added.items() if isinstance(i, int) and i >= vocab]
    if dropped:
        kept = {token: i for token, i in added.items() if token not in dropped}
        files = {**language.tokenizer, "added_tokens.json": json.dumps(kept).encode()}
        language.tokenizer = files
    return dropped


# --- Vicuna deltas --------------------------------------------------------------------------------


def _add_delta(path: Path, base: Reader, delta_path: Path) -> Reader:
    """base + delta, tensor by tensor. Vicuna v0 has a token more than LLaMA: zeros in the base."""
    delta = open_directory(delta_path)
    (mine, odd), (theirs, odd_delta) = match(LLM, base.tensors), match(LLM, delta.tensors)
    problems = [f"{path} has an unknown key {k}" for k in odd]
    problems += [f"{delta_path} has an unknown key {k}" for k in odd_delta]
    for name in sorted(mine.keys() ^ theirs.keys()):
        problems.append(f"{name} is in {'the base' if name in mine else 'the delta'} only")
    for name in sorted(mine.keys() & theirs.keys()):
        have, more = base.tensors[mine[name].key].shape, delta.tensors[theirs[name].key].shape
        padded = name in ("llm.embed", "llm.head.weight") and more[0] >= have[0]
        if have[1:] != more[1:] or (have != more and not padded):
            problems.append(f"{name} is {have} in the base, {more} in the delta")
    if problems:
        more_text = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise UserError(
            "--llm-delta does not belong to --llm: " + "; ".join(problems[:6]) + more_text
        )
    names = {theirs[n].key: mine[n].key for n in theirs}
    return combined(f"{path} + {delta_path}", base, delta, add_delta, names)


def add_delta(base: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """base + delta, rounded once to the base's type; rows that the base lacks count as zero."""
    out = delta.astype(np.float32)
    out[: base.shape[0]] += base.astype(np.float32)
    return out.astype(base.dtype)
