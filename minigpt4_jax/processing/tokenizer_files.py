"""The JSON files of a tokenizer directory: special tokens, added tokens, settings."""

import json
from pathlib import Path
from typing import Any

from minigpt4_jax.errors import UserError
from minigpt4_jax.utils.text import one_line


def read_added_tokens(directory: Path, pieces: int) -> dict[str, int]:
    """Tokens beyond the sentencepiece model's pieces, such as Vicuna v0's [PAD] = 32000.

    They are listed in added_tokens.json, tokenizer_config.json or tokenizer.json, in some directories in one
    of them only.
    """
    path = directory / "added_tokens.json"
    added: dict[Any, Any] = dict(read_json_object(path))
    for token, i in added.items():
        if not token or type(i) is not int or i < 0:
            raise UserError(f"tokenizer: {path}: {token!r}: {i!r} is not a token with its id")
    by_id = read_json_object(directory / "tokenizer_config.json").get("added_tokens_decoder")
    if isinstance(by_id, dict):
        for i, token in by_id.items():
            content = token.get("content") if isinstance(token, dict) else token
            if str(i).isdigit():
                added.setdefault(content, int(i))
    entries = read_json_object(directory / "tokenizer.json").get("added_tokens")
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict):
            added.setdefault(entry.get("content"), entry.get("id"))
    return {
        token: i
        for token, i in added.items()
        if isinstance(token, str) and token and type(i) is int and i >= pieces
    }


def tokens_that_keep_space(path: Path) -> set[tuple[str, str]]:
    """(token, side) pairs where white space is kept: a token written as an object sets it by lstrip and
    rstrip; for a plain string, or a token not in the file, both sides are stripped (tokenize() of 4.30)."""
    kept = set()
    for value in read_json_object(path).values():
        if isinstance(value, dict) and isinstance(value.get("content"), str):
            kept |= {
                (value["content"], side)
                for side, strip in (("left", "lstrip"), ("right", "rstrip"))
                if not value.get(strip, False)
            }
    return kept


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} if there is no such file. UserError: it is damaged or no object."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"tokenizer: {path} is not JSON ({one_line(e)})") from None
    if not isinstance(values, dict):
        raise UserError(f"tokenizer: {path} holds a {type(values).__name__}; expected an object")
    return values
