"""OPT's and T5's tokenizers as LAVIS reads them, with transformers 4.33.

Later versions of transformers build both from the same files with other rules for white space: at the end of
a text and around special tokens.
"""

from pathlib import Path
from typing import Any

from minigpt4_jax.processing.tokenizer_files import read_json_object, tokens_that_keep_space

_SPECIAL = "special_tokens_map.json"
_WHOLE = "tokenizer.json"  # it has all rules; without it they follow from the tokenizer's class


def restore_rules(tokenizer: Any, directory: Path) -> None:
    """Give a tokenizer of transformers, read from a directory, the rules of 4.33; only OPT's and T5's."""
    from transformers import GPT2Tokenizer, T5Tokenizer

    if isinstance(tokenizer, T5Tokenizer):
        _restore_t5(tokenizer.backend_tokenizer, directory)
    elif isinstance(tokenizer, GPT2Tokenizer) and not (directory / _WHOLE).is_file():
        _restore_opt(tokenizer, directory)


def _restore_t5(backend: Any, directory: Path) -> None:
    """White space becomes one piece boundary, also at the end of a text."""
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

    if (directory / _WHOLE).is_file():
        whole = Tokenizer.from_file(str(directory / _WHOLE))
        if whole.normalizer is not None:
            backend.normalizer = whole.normalizer
        backend.pre_tokenizer = whole.pre_tokenizer
        return
    joined = normalizers.Replace(Regex(" {2,}"), " ")
    before = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([*before, joined])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")


def _restore_opt(tokenizer: Any, directory: Path) -> None:
    """Special tokens that special_tokens_map.json writes as plain strings swallow white space around
    them."""
    from tokenizers import AddedToken

    if not read_json_object(directory / _SPECIAL):
        return
    kept = tokens_that_keep_space(directory / _SPECIAL)
    tokenizer.backend_tokenizer.add_special_tokens(
        [
            AddedToken(
                token, lstrip=(token, "left") not in kept, rstrip=(token, "right") not in kept,
                normalized=False, special=True,
            )
            for token in tokenizer.all_special_tokens
        ]
    )  # fmt: skip
