"""Converts the tokenizer in a GGUF file to the files that tokenizer libraries read.

Byte-level BPE ("gpt2") becomes tokenizer.json, LLaMA's sentencepiece ("llama") tokenizer.model.
"""

import json
import struct
from collections.abc import Callable
from typing import Any

from convert.formats.gguf import Gguf
from minigpt4_jax.errors import UserError
from minigpt4_jax.utils.text import shorten

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # as in sentencepiece
_TEMPLATE = "tokenizer.chat_template"


def _list_of(*kinds: type) -> Callable[[Any], bool]:
    return lambda values: isinstance(values, list) and all(type(v) in kinds for v in values)


# What the metadata that is read here may be.
_TYPES: list[tuple[tuple[str, ...], str, Callable[[Any], bool]]] = [
    (("ggml.model", "ggml.pre", "chat_template"), "a string", lambda v: isinstance(v, str)),
    (("ggml.tokens", "ggml.merges"), "a list of strings", _list_of(str)),
    (("ggml.token_type",), "a list of integers", _list_of(int)),
    (("ggml.scores",), "a list of numbers", _list_of(int, float)),
    (
        tuple(f"ggml.{name}_token_id" for name in ("bos", "eos", "unknown", "padding")),
        "an integer", lambda v: type(v) is int,
    ),
    (
        ("ggml.add_bos_token", "ggml.add_space_prefix", "ggml.remove_extra_whitespaces"),
        "true or false", lambda v: v in (False, True),
    ),
]  # fmt: skip


def tokenizer_files(source: Gguf) -> dict[str, bytes]:
    """File name -> content. UserError: the GGUF file has no tokenizer, or an unsupported one."""
    _check_types(source)
    model = source.field("tokenizer.ggml.model")
    tokens = source.field("tokenizer.ggml.tokens")
    if not model or not tokens:
        raise UserError(f"{source.path} has no tokenizer: give --tokenizer=DIR")
    if len(set(tokens)) != len(tokens):
        raise UserError(f"{source.path}: a token is twice in its vocabulary: give --tokenizer=DIR")
    if model not in ("gpt2", "llama"):
        raise UserError(
            f"{source.path}: tokenizer {model!r} is not supported: give --tokenizer=DIR"
        )
    token_types = _of_each_token(source, "token_type", tokens)
    if model == "gpt2":
        files = {"tokenizer.json": _byte_level(source, tokens, token_types).encode()}
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    else:
        scores = _of_each_token(source, "scores", tokens)
        prefix = source.field("tokenizer.ggml.add_space_prefix", True)
        strip = source.field("tokenizer.ggml.remove_extra_whitespaces", False)
        content = sentencepiece_model(tokens, scores, token_types, bool(prefix), bool(strip))
        files = {"tokenizer.model": content}
        # legacy: a space before the text behind a special token, as in most directories of this family
        config = {
            "tokenizer_class": "LlamaTokenizer", "legacy": True, "add_prefix_space": bool(prefix)
        }  # fmt: skip
    config |= _tokenizer_config(source, tokens)
    files["tokenizer_config.json"] = json.dumps(config, indent=1, ensure_ascii=False).encode()
    return files


def _check_types(source: Gguf) -> None:
    """UserError: metadata of the tokenizer that has another type than GGUF's specification says."""
    for names, expected, fits in _TYPES:
        for name in names:
            value = source.field(f"tokenizer.{name}")
            if value is not None and not fits(value):
                raise UserError(
                    f"{source.path}: tokenizer.{name} is {shorten(repr(value))}; expected {expected}: "
                    "give --tokenizer=DIR"
                )


def unsaid(source: Gguf) -> list[str]:
    """What the file does not say about its tokenizer, so that ids or prompts may differ from the
    training's."""
    named = [name for name in source.field_names() if name.startswith(f"{_TEMPLATE}.")]
    if named and not source.field(_TEMPLATE):
        return [f"has no {_TEMPLATE}, and {', '.join(named)} is not used", *_unsaid_of_ids(source)]
    return _unsaid_of_ids(source)


def _unsaid_of_ids(source: Gguf) -> list[str]:
    model = source.field("tokenizer.ggml.model")
    if model == "gpt2" and not source.field("tokenizer.ggml.pre"):
        return [
            "does not say how its tokenizer splits words (tokenizer.ggml.pre), so it may split them "
            "otherwise than in training"
        ]
    if model == "llama" and source.field(_TEMPLATE):
        return [
            "does not say whether its tokenizer puts a space before the text behind a special token "
            "(`legacy` in tokenizer_config.json); it does here"
        ]
    return []


def _of_each_token(source: Gguf, name: str, tokens: list[str]) -> list[Any]:
    """A list in the metadata with a value for each token. UserError: it is absent or of another length."""
    values = source.field(f"tokenizer.ggml.{name}")
    if not isinstance(values, list) or len(values) != len(tokens):
        found = f"{len(values)} values" if isinstance(values, list) else "no list"
        raise UserError(
            f"{source.path}: tokenizer.ggml.{name} has {found} for {len(tokens)} tokens: "
            "give --tokenizer=DIR"
        )
    return values


def _tokenizer_config(source: Gguf, tokens: list[str]) -> dict[str, Any]:
    """Fields of tokenizer_config.json: special tokens and the chat template."""
    config: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for name, gguf_name in names.items():
        i = source.field(f"tokenizer.ggml.{gguf_name}_token_id")
        if i is not None and 0 <= i < len(tokens):
            config[f"{name}_token"] = tokens[i]
        elif i is not None and name != "pad":  # padding is masked; some files say -1 for none
            raise UserError(
                f"{source.path}: tokenizer.ggml.{gguf_name}_token_id is {i}, but there are "
                f"{len(tokens)} tokens: give --tokenizer=DIR"
            )
    if (add := source.field("tokenizer.ggml.add_bos_token")) is not None:
        config["add_bos_token"] = bool(add)
    if template := source.field(_TEMPLATE):
        config["chat_template"] = template
    return config


# --- byte-level BPE -------------------------------------------------------------------------------

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = _ENGLISH + r"|\p{N}{1,3}" + _TAIL
_QWEN2 = _ENGLISH + r"|\p{N}" + _TAIL
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's tokenizer.ggml.pre -> regular expressions that split the text, in this order, before BPE.
PRE_TOKENIZERS = {
    **{n: [r"\p{N}", _GPT2] for n in ("smollm", "starcoder", "refact", "command-r", "codeshell")},
    **{n: [_LLAMA3] for n in ("llama-bpe", "llama3", "llama-v3", "falcon3", "smaug-bpe")},
    **{n: [_QWEN2] for n in ("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez")},
    **{n: [_GPT2] for n in ("gpt-2", "mpt", "olmo")},
    "tekken": [_TEKKEN],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
}
# Pre-tokenizers of models that use a whole word of the vocabulary instead of its merges. They put BOS
# before a text unless the file says otherwise, as in llama.cpp.
_IGNORE_MERGES = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")

# Pre-tokenizers of models whose tokenizers in transformers compose characters (NFC) first.
_COMPOSED = ("qwen2", "command-r", "mpt", "olmo")


def _byte_level(source: Gguf, tokens: list[str], token_types: list[int]) -> str:
    """tokenizer.json of a byte-level BPE tokenizer. token_types: from NORMAL to BYTE."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    pre = source.field("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise UserError(
            f"{source.path}: pre-tokenizer {pre!r} is not among {', '.join(PRE_TOKENIZERS)}: "
            "give --tokenizer=DIR with the model's tokenizer.json"
        )
    merges = [_parse_merge(m) for m in source.field("tokenizer.ggml.merges") or []]
    if not merges:
        raise UserError(f"{source.path} has no tokenizer.ggml.merges: give --tokenizer=DIR")
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        bpe = models.BPE(vocab, merges, ignore_merges=pre in _IGNORE_MERGES)
    except Exception as e:  # the library raises plain Exceptions
        raise UserError(
            f"{source.path}: its tokenizer is damaged ({e}): give --tokenizer=DIR"
        ) from e
    tokenizer = Tokenizer(bpe)
    if pre in _COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(r), "isolated") for r in PRE_TOKENIZERS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    for token, token_type in zip(tokens, token_types, strict=True):
        if token_type in (CONTROL, USER_DEFINED):
            tokenizer.add_tokens(
                [AddedToken(token, special=token_type == CONTROL, normalized=False)]
            )
    bos = source.field("tokenizer.ggml.bos_token_id")
    adds_bos = source.field("tokenizer.ggml.add_bos_token", pre in _IGNORE_MERGES)
    if adds_bos and bos in range(len(tokens)):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[tokens[bos], "$A"], special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer.to_str()


def _parse_merge(text: str) -> tuple[str, str]:
    left, _, right = text.partition(" ")
    return left, right


# --- sentencepiece --------------------------------------------------------------------------------


def sentencepiece_model(
    tokens: list[str],
    scores: list[float],
    token_types: list[int],
    prefix: bool,
    strip: bool = False,
) -> bytes:
    """A sentencepiece ModelProto (sentencepiece_model.proto) like LLaMA's: BPE, byte fallback and no
    normalization. prefix: whether a space is put before the text; strip: whether repeated spaces are
    removed."""
    pieces = []
    for token, score, token_type in zip(tokens, scores, token_types, strict=True):
        piece = _bytes(1, token.encode()) + b"\x15" + struct.pack("<f", score) + _int(3, token_type)
        pieces.append(_bytes(1, piece))
    unknown = token_types.index(UNKNOWN) if UNKNOWN in token_types else 0
    ids = {40: unknown, 41: _index(tokens, "<s>"), 42: _index(tokens, "</s>"), 43: -1}
    trainer = _int(3, 2) + _int(4, len(tokens)) + _int(35, BYTE in token_types)
    trainer += b"".join(_int(k, v) for k, v in ids.items())
    normalizer = _bytes(1, b"identity") + _int(3, prefix) + _int(4, strip) + _int(5, 1)
    return b"".join(pieces) + _bytes(2, trainer) + _bytes(3, normalizer)


def _index(tokens: list[str], token: str) -> int:
    return tokens.index(token) if token in tokens else -1


def _int(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(int(value) & 0xFFFFFFFFFFFFFFFF)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])
