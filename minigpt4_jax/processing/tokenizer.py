"""Tokenizers: LLaMA's sentencepiece model exactly as the original used it, or transformers' own.

The original used the slow `LlamaTokenizer` of transformers 4.30 in legacy mode. Current tokenizers
treat leading and double spaces differently, so `SentencePieceTokenizer` implements it on sentencepiece.
Models with a chat template of their own are read by `transformers.AutoTokenizer`.
"""

import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.lavis_tokenizers import restore_rules
from minigpt4_jax.processing.tokenizer_files import read_added_tokens, tokens_that_keep_space
from minigpt4_jax.utils.text import one_line

PAD_PIECE = "$$"  # the original's pad_token: id 3997 in LLaMA's vocabulary
HF_FILES = (
    "tokenizer.json",
    "vocab.json",
    "spiece.model",
)  # any is for AutoTokenizer


class Tokenizer(Protocol):
    """The interface of both tokenizers."""

    kind: str
    bos_id: int | None
    eos_id: int
    pad_id: int
    bos: str  # the text of bos_id, "" where there is none
    vocab_size: int

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Ids of one text. bos: BOS comes first. UserError: an unpaired surrogate."""
        ...

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ids. Special tokens are skipped or written out. Ids outside of the vocabulary (padded
        embedding rows) are skipped."""
        ...


def _check_characters(text: str) -> None:
    """UserError: an unpaired surrogate, such as JSON's \\ud83d or undecodable command-line bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise UserError(
            f"the text {text[:40]!a} has half of a character at {e.start} (an unpaired surrogate); "
            "expected text that UTF-8 can encode"
        ) from None


def load_tokenizer(directory: str | Path, kind: str | None = None) -> Tokenizer:
    """Read the tokenizer in `directory`.

    kind: "sentencepiece" (tokenizer.model of LLaMA 1/2 and Vicuna, as the original used it), "hf" (any
    files that AutoTokenizer reads) or "bert" (vocab.txt of a Q-Former); None prefers a readable
    tokenizer.model.
    UserError: no tokenizer, or a damaged one.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"tokenizer: {directory} is not a directory")
    model = directory / "tokenizer.model"
    has_hf = any((directory / name).is_file() for name in HF_FILES)
    if kind not in (None, "sentencepiece", "hf", "bert"):
        raise UserError(f"tokenizer: kind {kind!r}; expected 'sentencepiece', 'hf' or 'bert'")
    if kind == "bert":
        from minigpt4_jax.processing.bert_tokenizer import BertTokenizer

        return BertTokenizer(directory)
    if kind == "hf" or (kind is None and not model.is_file() and has_hf):
        if not has_hf and not model.is_file():
            raise UserError(
                f"tokenizer: {directory} has no tokenizer.json; "
                "copy the language model's tokenizer files there"
            )
        return HfTokenizer(directory)
    if not model.is_file():
        raise UserError(
            f"tokenizer: {directory} has no tokenizer.model and no tokenizer.json; "
            "copy the language model's tokenizer files there"
        )
    try:
        return SentencePieceTokenizer(directory)
    except UserError:
        if kind is None and has_hf:  # LLaMA 3 ships a tokenizer.model that is not sentencepiece
            return HfTokenizer(directory)
        raise


class SentencePieceTokenizer:
    """The legacy slow LLaMA tokenizer (tokenization_llama.py, tokenization_utils.py of 4.30).

    The text is first split at special tokens, and white space next to them is dropped. Each chunk
    between them is encoded separately, so each gets its own leading-space piece.
    """

    kind = "sentencepiece"

    def __init__(self, directory: Path):
        import sentencepiece

        path = directory / "tokenizer.model"
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
            pieces = self._model.get_piece_size()
        except (OSError, RuntimeError, ValueError, TypeError) as e:
            raise UserError(
                f"tokenizer: {path} is not a sentencepiece model ({one_line(e)})"
            ) from None
        bos, eos, unk = self._model.bos_id(), self._model.eos_id(), self._model.unk_id()
        if pieces == 0 or eos < 0:
            raise UserError(
                f"tokenizer: {path} has no end-of-sequence piece; expected LLaMA's tokenizer.model"
            )
        self.bos_id = bos if bos >= 0 else None
        self.eos_id = eos
        self.bos = self._model.id_to_piece(bos) if bos >= 0 else ""
        self.pad_id = self._model.piece_to_id(PAD_PIECE)  # unk without it, as in the original
        self._special = {self._model.id_to_piece(i): i for i in (bos, eos, unk) if i >= 0}
        self._added = read_added_tokens(directory, pieces)
        self._added_by_id = {i: token for token, i in self._added.items()}
        self.vocab_size = max([pieces, *(i + 1 for i in self._added.values())])
        self._keep_space = tokens_that_keep_space(directory / "special_tokens_map.json")
        split_out = sorted([*self._special, *self._added], key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, split_out)) + ")")
        # skip_special skips the pad piece too, since pad_token is a special token
        self._skipped = {*self._special.values(), self.pad_id}
        self._spelled = {*self._special, PAD_PIECE}

    def encode(self, text: str, bos: bool = False) -> list[int]:
        _check_characters(text)
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        parts = self._split.split(text)  # special and added tokens have odd indices
        for n, part in enumerate(parts):
            if n % 2:
                ids.append(self._special[part] if part in self._special else self._added[part])
                continue
            chunk = part
            if n > 0 and (parts[n - 1], "right") not in self._keep_space:
                chunk = chunk.lstrip()
            if n + 1 < len(parts) and (parts[n + 1], "left") not in self._keep_space:
                chunk = chunk.rstrip()
            if chunk:
                ids.extend(self._model.encode(chunk))
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        chunks: list[list[str] | str] = [[]]  # lists of pieces, and added tokens
        for i in map(int, ids):
            if i in self._added_by_id:
                chunks += [self._added_by_id[i], []]
            elif 0 <= i < self._model.get_piece_size() and not (
                skip_special and i in self._skipped
            ):
                chunks[-1].append(self._model.id_to_piece(i))  # type: ignore[union-attr]
        return " ".join(c if isinstance(c, str) else self._join(c) for c in chunks if c)

    def _join(self, pieces: list[str]) -> str:
        """Pieces to text, with a space before special tokens (convert_tokens_to_string of 4.30)."""
        out, run, after_special = "", [], False
        for n, piece in enumerate(pieces):
            if piece not in self._spelled:
                run.append(piece)
                after_special = False
                continue
            if n > 0 and not after_special:
                out += " "
            out += self._model.decode(run) + piece
            run, after_special = [], True
        return out + str(self._model.decode(run))


class HfTokenizer:
    """What `transformers.AutoTokenizer` reads from local files, with the model's own chat template."""

    kind = "hf"

    def __init__(self, directory: Path):
        # transformers warns that PyTorch is missing; tokenizers do not need it.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import AutoTokenizer  # takes seconds to import

        try:
            self._model: Any = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
            restore_rules(self._model, directory)
            self.vocab_size = len(self._model)
        except Exception as e:  # its parsers raise many types
            raise UserError(
                f"tokenizer: cannot read the tokenizer in {directory} ({one_line(e)})"
            ) from None
        if self._model.eos_token_id is None:
            raise UserError(
                f"tokenizer: {directory} names no eos_token; set it in its tokenizer_config.json"
            )
        self.bos_id: int | None = self._model.bos_token_id
        self.eos_id: int = self._model.eos_token_id
        self.pad_id: int = (
            self.eos_id if self._model.pad_token_id is None else self._model.pad_token_id
        )
        self.bos: str = self._model.bos_token or ""
        self.eos: str = self._model.eos_token
        self.special_tokens: frozenset[str] = frozenset(self._model.all_special_tokens) | {
            token.content for token in self._model.added_tokens_decoder.values() if token.special
        }

    def encode(self, text: str, bos: bool = False) -> list[int]:
        _check_characters(text)
        ids = list(self._model.encode(text, add_special_tokens=False)) if text else []
        # chat templates of these families start with the BOS token: never two of them
        if bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[int]]:
        """(ids, where each token starts in the text). No special token is added."""
        _check_characters(text)
        if not text:
            return [], []
        encoded = self._model(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(encoded["input_ids"]), [start for start, _ in encoded["offset_mapping"]]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        known = [int(i) for i in ids if 0 <= i < self.vocab_size]
        text: str = self._model.decode(
            known, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
        )
        return text

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the tokenizer itself puts BOS before a text."""
        return self.bos_id is not None and self._model.encode("a")[:1] == [self.bos_id]

    @property
    def has_chat_template(self) -> bool:
        return bool(self._model.chat_template)

    def apply_chat_template(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool
    ) -> str:
        """The text of a dialogue by the tokenizer's own template.

        messages: with "role" and "content". UserError: what the template says against them.
        """
        try:
            text: str = self._model.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
            return text
        except Exception as e:  # Jinja's errors, and those that templates raise
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"the tokenizer's chat template cannot render the messages {roles}: {one_line(e)}"
            ) from None
