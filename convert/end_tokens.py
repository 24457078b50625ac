"""Tokens besides EOS at which a language model's answers end, as its files name them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convert.formats.gguf import Gguf
from convert.formats.readers import read_json
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.tokenizer import Tokenizer

_GENERATION = "generation_config.json"


def directory_end_ids(folder: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json, or without that file of config.json, as transformers'
    generate stops. config: the content of config.json. UserError: it is no token id or list of them."""
    label, values = folder / "config.json", config
    if (folder / _GENERATION).is_file():
        label, values = folder / _GENERATION, read_json(folder / _GENERATION)
    given = values.get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise UserError(f"{label}: eos_token_id {given!r}: expected a token id, or a list of them")
    return tuple(ids)


def gguf_end_ids(source: Gguf) -> tuple[int, ...]:
    """The ends of a turn and of a message, at which llama.cpp stops too. UserError: they are
    no token ids."""
    ids = []
    for name in ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"):
        i = source.field(name)
        if i is not None and type(i) is not int:
            raise UserError(f"{source.path}: {name} is {i!r}; expected a token id")
        ids += [] if i is None else [i]
    return tuple(ids)


def other_end_ids(ids: Sequence[int], tokenizer: Tokenizer, notes: list[str]) -> tuple[int, ...]:
    """The ids that are not EOS, without duplicates; named in a note."""
    others = dict.fromkeys(i for i in ids if i != tokenizer.eos_id)
    known = tuple(i for i in others if 0 <= i < tokenizer.vocab_size)
    if known:
        tokens = ", ".join(tokenizer.decode([i], skip_special=False) for i in known)
        notes.append(f"an answer also ends at {tokens}, as the language model's files say")
    if unknown := [str(i) for i in others if i not in known]:
        notes.append(
            f"the end tokens {', '.join(unknown)} that the language model's files name are not used: its "
            f"tokenizer has {tokenizer.vocab_size} tokens"
        )
    return known
