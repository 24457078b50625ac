"""Tokens besides EOS at which a language model's answers end, as its files name them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from convert.formats.gguf import Gguf
from convert.formats.readers import read_json
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.tokenizer import Tokenizer

_GENERATION = "generation_config.json"
_START = ("decoder_start_token_id", "bos_token_id")  # the first that is there


def directory_end_ids(folder: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json, or without that file of config.json, as transformers'
    generate stops. config: the content of config.json. UserError: it is no token id or list of them."""
    label, values = _generation_values(folder, config)
    return _ids(values.get("eos_token_id"), label)


def directory_start_id(folder: Path, config: dict[str, Any]) -> Any:
    """What transformers' generate begins an answer of an encoder-decoder with; None if no file says it.
    Otherwise as `directory_end_ids`; not checked."""
    _, values = _generation_values(folder, config)
    return next((values[n] for n in _START if values.get(n) is not None), None)


def text_config_end_ids(
    config: Mapping[str, Any], folder: Path, notes: list[str]
) -> tuple[int, ...]:
    """`eos_token_id` of the text_config of a BLIP-2 or InstructBLIP directory, by default that of
    transformers' class: where its generate stops, which does not use generation_config.json.

    config: the text_config. Other ids in generation_config.json are named in a note. UserError: it is no
    token id or list of them."""
    from transformers import AutoConfig

    default = AutoConfig.for_model(config["model_type"]).eos_token_id
    ids = _ids(config.get("eos_token_id", default), f"{folder / 'config.json'}: text_config")
    if (folder / _GENERATION).is_file():
        label, values = _generation_values(folder, {})
        unused = [i for i in _ids(values.get("eos_token_id"), label) if i not in ids]
        if unused:
            notes.append(
                f"{label}: eos_token_id {', '.join(map(str, unused))}: not used, as in transformers, which "
                "ends an answer of BLIP-2 where text_config says"
            )
    return ids


def _generation_values(folder: Path, config: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The file that says how to generate, generation_config.json or else config.json, and its values."""
    if (folder / _GENERATION).is_file():
        return folder / _GENERATION, read_json(folder / _GENERATION)
    return folder / "config.json", config


def _ids(given: Any, label: Path | str) -> tuple[int, ...]:
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


def other_end_ids(
    ids: Sequence[int], own: int | None, tokenizer: Tokenizer, notes: list[str]
) -> tuple[int, ...]:
    """The ids without duplicates, and without the end that the model has in any case; named in a note."""
    others = dict.fromkeys(i for i in ids if i != own)
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
