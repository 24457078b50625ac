"""BERT's WordPiece tokenizer with BLIP-2's `[DEC]`, the token that begins a caption of the Q-Former."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.clean_up_spaces import clean_up_spaces
from minigpt4_jax.processing.tokenizer_files import read_json_object
from minigpt4_jax.utils.text import one_line

VOCABULARY = "vocab.txt"
QFORMER_VOCABULARY = "qformer_vocab.txt"  # beside the tokenizer of a language model (InstructBLIP)
DECODE_TOKEN = "[DEC]"


class BertTokenizer:
    """Reads vocab.txt, or another file of a directory. A text for the Q-Former is `[CLS]`, its pieces,
    `[SEP]` (`encode_text`)."""

    kind = "bert"

    def __init__(self, directory: Path, vocabulary: str = VOCABULARY):
        from tokenizers import BertWordPieceTokenizer, decoders

        path = directory / vocabulary
        settings: dict[str, Any] = {}
        if vocabulary == VOCABULARY:  # otherwise they are the language model's
            settings = read_json_object(directory / "tokenizer_config.json")
        try:
            self._model = BertWordPieceTokenizer(
                os.fspath(path), lowercase=bool(settings.get("do_lower_case", True))
            )
        except Exception as e:  # its parser raises Exception itself
            raise UserError(
                f"tokenizer: {path} is no WordPiece vocabulary ({one_line(e)})"
            ) from None
        self._model._tokenizer.decoder = decoders.WordPiece(cleanup=False)
        for token in ("[CLS]", "[SEP]", "[PAD]", "[UNK]"):
            if self._model.token_to_id(token) is None:
                raise UserError(
                    f"tokenizer: {path} has no {token}; expected the vocabulary of BERT"
                )
        if self._model.token_to_id(DECODE_TOKEN) is None:
            self._model.add_special_tokens([DECODE_TOKEN])
        self.bos = DECODE_TOKEN
        self.bos_id: int | None = self._id(DECODE_TOKEN)
        self.eos_id = self._id("[SEP]")
        self.pad_id = self._id("[PAD]")
        self.cls_id = self._id("[CLS]")
        self.vocab_size = self._model.get_vocab_size()

    def _id(self, token: str) -> int:
        return int(self._model.token_to_id(token))

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """As `Tokenizer.encode`: without `[CLS]` and `[SEP]`; bos: `[DEC]` comes first."""
        try:
            ids = list(self._model.encode(text, add_special_tokens=False).ids)
        except TypeError:
            raise UserError(f"the text {text[:40]!a} is not valid Unicode") from None
        return [self._id(DECODE_TOKEN), *ids] if bos else ids

    def encode_text(
        self, text: str, max_length: int | None = None, *, cut_left: bool = False
    ) -> list[int]:
        """`[CLS]`, the pieces, `[SEP]`; cut to max_length ids, of which the last is `[SEP]`. cut_left: the
        first pieces are dropped, instead of the last."""
        ids = self.encode(text)
        if max_length is not None:
            kept = max(0, max_length - 2)
            ids = ids[max(0, len(ids) - kept) :] if cut_left else ids[:kept]
        return [self.cls_id, *ids, self.eos_id]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """As `Tokenizer.decode`."""
        known = [int(i) for i in ids if 0 <= i < self.vocab_size]
        text = str(self._model.decode(known, skip_special_tokens=skip_special))
        return clean_up_spaces(text)
