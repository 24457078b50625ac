"""Opens a language model from a Hugging Face directory or GGUF file, with Vicuna delta and tokenizer."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from convert.end_tokens import directory_end_ids, directory_start_id, gguf_end_ids
from convert.formats.gguf import PERMUTED, Gguf
from convert.formats.gguf_tokenizer import tokenizer_files, unsaid
from convert.formats.readers import Reader, combine, open_directory, read_json
from convert.key_mapping import LLM, KeyTable, gguf_table, map_keys
from convert.llm_keys import llm_table
from minigpt4_jax.errors import UserError
from minigpt4_jax.storage.hub import NOT_FOUND

TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "vocab.txt", "spiece.model",
    "chat_template.json",
)  # fmt: skip
_VOCABULARY_FILES = ("tokenizer.model", "tokenizer.json", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer files of a model: name -> path or content. origin: the directory or file they
    come from."""

    files: Mapping[str, Path | bytes]
    origin: str


@dataclass
class LanguageModelFiles:
    """Weights, the content of config.json, and tokenizer files (name -> path or content).

    tokenizer_origin: the directory or file they come from. config_label: of the configuration, in messages.
    end_ids: tokens at which an answer ends.
    """

    reader: Reader
    table: KeyTable
    config: dict[str, Any]
    tokenizer: Mapping[str, Path | bytes]
    tokenizer_origin: str
    config_label: str
    end_ids: tuple[int, ...] = ()
    notes: list[str] = field(default_factory=list)  # messages for the user

    def chat_template(self) -> str:
        """The model's own chat template (Jinja), "" if it has none."""
        template = self._chat_templates()
        if isinstance(template, list):  # several named templates
            template = _named(template).get("default")
        return template if isinstance(template, str) else ""

    def unused_templates(self) -> list[str]:
        """The names of its chat templates if it has several, none of which is the default."""
        template = self._chat_templates()
        named = _named(template) if isinstance(template, list) else {}
        return [] if "default" in named else [str(name) for name in named]

    def _chat_templates(self) -> Any:
        if "chat_template.jinja" in self.tokenizer:
            return _text(self.tokenizer["chat_template.jinja"])
        return self._tokenizer_setting("chat_template")

    def _tokenizer_setting(self, name: str) -> Any:
        """A value in tokenizer_config.json, None if there is none."""
        if "tokenizer_config.json" not in self.tokenizer:
            return None
        try:
            return json.loads(_text(self.tokenizer["tokenizer_config.json"])).get(name)
        except (ValueError, AttributeError):
            return None

    def other_eos(self) -> bool:
        """Whether tokenizer_config.json names another EOS token than LLaMA's `</s>`."""
        eos = self._tokenizer_setting("eos_token")
        eos = eos.get("content") if isinstance(eos, dict) else eos
        return isinstance(eos, str) and eos != "</s>"


def _named(templates: list[Any]) -> dict[Any, Any]:
    """Named chat templates, as tokenizer_config.json lists them: name -> template."""
    return {t.get("name"): t.get("template") for t in templates if isinstance(t, dict)}


def _text(content: Path | bytes) -> str:
    return (content if isinstance(content, bytes) else content.read_bytes()).decode(
        "utf-8", "replace"
    )


def open_llm(
    path: Path, delta: Path | None = None, tokenizer: Path | None = None
) -> LanguageModelFiles:
    """Open --llm; delta is added to its weights, tokenizer replaces its own.

    UserError: a file is missing, damaged, or of an unsupported format.
    """
    if not path.exists():
        raise UserError(f"--llm: {path} {NOT_FOUND}")
    if path.is_dir() and not (path / "config.json").is_file():
        if len(gguf_files := sorted(path.glob("*.gguf"))) == 1:
            path = gguf_files[0]
        else:
            raise UserError(
                f"--llm: {path} has no config.json; expected a Hugging Face model directory"
            )
    if path.is_dir():
        return _open_hf(path, delta, tokenizer)
    if delta is not None:
        raise UserError(
            f"--llm-delta needs --llm to be a Hugging Face directory, but {path} is a file"
        )
    return _open_gguf(path, tokenizer)


def _open_gguf(path: Path, tokenizer: Path | None) -> LanguageModelFiles:
    source = Gguf(path)
    config = source.hf_config()
    notes = []
    if unused := source.unused_fields():
        notes.append(f"{path}: {', '.join(unused)}: metadata that is not known here and not used")
    if tokenizer is None:
        notes += [
            f"{path} {what}; --tokenizer=DIR gives the model's own" for what in unsaid(source)
        ]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    table = gguf_table(heads, kv_heads, source.architecture in PERMUTED)
    files = find_tokenizer(tokenizer) if tokenizer else tokenizer_files(source)
    return LanguageModelFiles(
        source.reader, table, config, files, str(tokenizer or path), str(path), gguf_end_ids(source),
        notes,
    )  # fmt: skip


def _open_hf(path: Path, delta: Path | None, tokenizer: Path | None) -> LanguageModelFiles:
    reader = open_directory(path)
    config_file = path / "config.json"
    folders = [path]
    if delta is not None:
        if not delta.is_dir():
            raise UserError(f"--llm-delta: {delta} is not a directory")
        reader = _add_delta(path, reader, delta)
        folders.insert(0, delta)
        if (delta / "config.json").is_file():
            config_file = delta / "config.json"
    config = read_json(config_file)
    if config.get("model_type") == "t5":
        start = directory_start_id(config_file.parent, config)
        config |= {} if start is None else {"decoder_start_token_id": start}
    if tokenizer is not None:
        folders = [tokenizer]
    folder = next((f for f in folders if _has_vocabulary(f)), folders[-1])
    return LanguageModelFiles(
        reader, llm_table(config.get("model_type")), config, find_tokenizer(folder), str(folder),
        str(config_file), directory_end_ids(config_file.parent, config),
    )  # fmt: skip


def _has_vocabulary(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _VOCABULARY_FILES)


def find_tokenizer(folder: Path) -> dict[str, Path | bytes]:
    """The tokenizer files in a directory, by name. UserError when there is no tokenizer."""
    if not folder.is_dir():
        raise UserError(f"tokenizer: {folder} is not a directory")
    if not _has_vocabulary(folder):
        raise UserError(
            f"{folder} has no tokenizer (tokenizer.model or tokenizer.json): copy the language "
            "model's tokenizer files there, or give --tokenizer=DIR"
        )
    files: dict[str, Path | bytes] = {
        name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()
    }
    settings = (
        read_json(folder / "tokenizer_config.json") if "tokenizer_config.json" in files else {}
    )
    processor = files.pop("chat_template.json", None)  # of a multimodal model
    if processor and "chat_template.jinja" not in files and not settings.get("chat_template"):
        template = read_json(folder / "chat_template.json").get("chat_template")
        files |= {"chat_template.jinja": template.encode()} if isinstance(template, str) else {}
    if "tokenizer_class" not in settings and (folder / "config.json").is_file():
        files["config.json"] = folder / "config.json"  # its model_type names the tokenizer class
    return files


def drop_added_tokens(language: LanguageModelFiles, vocab: int) -> list[str]:
    """Drop tokens from added_tokens.json that the embedding has no row for; returns them.

    Some LLaMA directories name such a pad token.
    """
    path = language.tokenizer.get("added_tokens.json")
    if not isinstance(path, Path):
        return []
    added = read_json(path)
    dropped = [token for token, i in added.items() if isinstance(i, int) and i >= vocab]
    if dropped:
        remaining = {token: i for token, i in added.items() if token not in dropped}
        content = json.dumps(remaining).encode()
        language.tokenizer = {**language.tokenizer, "added_tokens.json": content}
    return dropped


# --- Vicuna deltas --------------------------------------------------------------------------------


def _add_delta(path: Path, base: Reader, delta_path: Path) -> Reader:
    """base + delta, tensor by tensor. Vicuna v0 has one token more than LLaMA: zeros in the base."""
    delta = open_directory(delta_path)
    base_keys, unknown_base = map_keys(LLM, base.tensors)
    delta_keys, unknown_delta = map_keys(LLM, delta.tensors)
    problems = [f"{path} has an unknown key {k}" for k in unknown_base]
    problems += [f"{delta_path} has an unknown key {k}" for k in unknown_delta]
    for name in sorted(base_keys.keys() ^ delta_keys.keys()):
        problems.append(f"{name} is in {'the base' if name in base_keys else 'the delta'} only")
    for name in sorted(base_keys.keys() & delta_keys.keys()):
        base_shape = base.tensors[base_keys[name].key].shape
        delta_shape = delta.tensors[delta_keys[name].key].shape
        may_have_more_rows = name in ("llm.embed", "llm.head.weight")
        if base_shape != delta_shape and not (
            may_have_more_rows
            and base_shape[1:] == delta_shape[1:]
            and base_shape[0] <= delta_shape[0]
        ):
            problems.append(f"{name} is {base_shape} in the base, {delta_shape} in the delta")
    if problems:
        more = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise UserError("--llm-delta does not belong to --llm: " + "; ".join(problems[:6]) + more)
    names = {delta_keys[n].key: base_keys[n].key for n in delta_keys}
    return combine(f"{path} + {delta_path}", base, delta, add_delta, names)


def add_delta(base: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """base + delta, rounded once to the base's dtype; rows that the base lacks count as zero."""
    out = delta.astype(np.float32)
    out[: base.shape[0]] += base.astype(np.float32)
    return out.astype(base.dtype)
