"""The tokenizer of an exported directory: its files, the token of an image, the ends of answers."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.bert_tokenizer import DECODE_TOKEN
from minigpt4_jax.processing.tokenizer import load_tokenizer
from minigpt4_jax.processing.tokenizer_files import read_json_object
from minigpt4_jax.utils.text import one_line

IMAGE_TOKEN = "<image>"  # Blip2Processor adds it to a tokenizer without it
_SETTINGS = "tokenizer_config.json"


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write an object to a new JSON file."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(directory: Path, source: Path, config: ModelConfig) -> None:
    """Copy the tokenizer's files from `source`. Its class is named, as transformers would take another
    one of a BLIP-2 model. UserError: they are missing or damaged."""
    load_tokenizer(source, config.tokenizer.kind)  # an error names this directory
    for path in sorted(source.iterdir()):
        if path.name != "config.json":  # of the language model, where it told the class
            shutil.copyfile(path, directory / path.name)
    settings = read_json_object(source / _SETTINGS)
    if config.is_stage1:
        defaults = {"tokenizer_class": "BertTokenizer", "bos_token": DECODE_TOKEN}
    elif "tokenizer_class" not in settings:
        defaults = {"tokenizer_class": type(_auto_tokenizer(source)).__name__}
    else:
        defaults = {}
    if defaults.keys() - settings.keys():
        write_json(directory / _SETTINGS, defaults | settings)


def _auto_tokenizer(directory: Path) -> Any:
    """The tokenizer as transformers reads it. UserError: it cannot."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as e:  # its parsers raise many types
        raise UserError(
            f"tokenizer: transformers cannot read that of the model ({one_line(e)})"
        ) from None


def choose_image_token(directory: Path, vocab: int, recorded: int | None, notes: list[str]) -> int:
    """The id that stands for a visual token in the input of a language model with `vocab` rows.

    recorded: that of the Hugging Face directory that the model was converted from. UserError: the embedding
    has no row for the token.
    """
    from transformers import AddedToken

    tokenizer = _auto_tokenizer(directory)
    token = AddedToken(IMAGE_TOKEN, normalized=False, special=True)
    tokenizer.add_tokens([token], special_tokens=True)  # as the processor does
    added = int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    if recorded is not None and recorded != added:
        notes.append(
            f"image_token_index is {recorded}, as in the directory that the model was converted from, but "
            f"{IMAGE_TOKEN} of its tokenizer is {added}: Blip2Processor does not fit this model"
        )
        return recorded
    if added >= vocab:
        raise UserError(
            f"--format=huggingface: {IMAGE_TOKEN} would be token {added}, and the language model's embedding "
            f"has {vocab} rows: transformers needs a row for it"
        )
    return added


def end_ids(directory: Path, config: ModelConfig, notes: list[str]) -> list[int]:
    """The ids that end an answer, first that of the end symbol."""
    tokenizer = load_tokenizer(directory, config.tokenizer.kind)
    ends = tokenizer.encode(config.end_symbol)
    if len(ends) != 1:
        notes.append(
            f"end_symbol {config.end_symbol!r} is {len(ends)} tokens, and transformers ends answers at one: "
            f"the eos_token_id is {tokenizer.eos_id}"
        )
        ends = []
    if config.ends_at_eos or not ends:
        ends.append(tokenizer.eos_id)
    return list(dict.fromkeys([*ends, *config.tokenizer.end_ids]))
