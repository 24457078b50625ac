"""The tokenizer inside a GGUF file, written as the files that tokenizer libraries read.

Byte-level BPE ("gpt2") becomes tokenizer.json, LLaMA's sentencepiece ("llama") tokenizer.model.
"""

import json
import struct
from typing import Any

from convert.formats.gguf import Gguf
from minigpt4_jax.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # as in sentencepiece


def tokenizer_files(source: Gguf) -> dict[str, bytes]:
    """File name -> content. UserError when the file has no tokenizer or one of an unknown kind."""
    model = source.field("tokenizer.ggml.model")
    tokens = source.field("tokenizer.ggml.tokens")
    if not model or not tokens:
        raise UserError(f"{source.path} has no tokenizer inside: give --tokenizer=DIR")
    if len(set(tokens)) != len(tokens):
        raise UserError(f"{source.path}: its vocabulary names a token twice: give --tokenizer=DIR")
    kinds = source.field("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if model == "gpt2":
        files = {"tokenizer.json": _byte_level(source, tokens, kinds).encode()}
        config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    elif model == "llama":
        scores = source.field("tokenizer.ggml.scores") or [0.0] * len(tokens)
        prefix = source.field("tokenizer.ggml.add_space_prefix", True)
        files = {"tokenizer.model": sentencepiece_model(tokens, scores, kinds, bool(prefix))}
        config = {"tokenizer_class": "LlamaTokenizer"}
    else:
        raise UserError(
            f"{source.path}: tokenizer {model!r} is not supported: give --tokenizer=DIR"
        )
    config |= _special(source, tokens)
    files["tokenizer_config.json"] = json.dumps(config, indent=1, ensure_ascii=False).encode()
    return files


def _special(source: Gguf, tokens: list[str]) -> dict[str, Any]:
    config: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for ours, theirs in names.items():
        i = source.field(f"tokenizer.ggml.{theirs}_token_id")
        if i is not None and 0 <= i < len(tokens):
            config[f"{ours}_token"] = tokens[i]
    if (add := source.field("tokenizer.ggml.add_bos_token")) is not None:
        config["add_bos_token"] = bool(add)
    if template := source.field("tokenizer.chat_template"):
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
# llama.cpp's tokenizer.ggml.pre -> expressions that cut a text one after another before BPE.
PRE_TOKENIZERS = {
    **{n: [r"\p{N}", _GPT2] for n in ("smollm", "starcoder", "refact", "command-r", "codeshell")},
    **{n: [_LLAMA3] for n in ("llama-bpe", "llama3", "llama-v3", "falcon3", "smaug-bpe")},
    **{n: [_QWEN2] for n in ("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez")},
    **{n: [_GPT2] for n in ("gpt-2", "mpt", "olmo")},
    "tekken": [_TEKKEN],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
}
# Here a whole word in the vocabulary wins over its merges.
_IGNORE_MERGES = (
    "llama-bpe",
    "llama3",
    "llama-v3",
    "falcon3",
    "tekken",
)  # a whole word in the vocabulary wins


def _byte_level(source: Gguf, tokens: list[str], kinds: list[int]) -> str:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    pre = source.field("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise UserError(
            f"{source.path}: pre-tokenizer {pre!r} is not among {', '.join(PRE_TOKENIZERS)}: "
            "give --tokenizer=DIR with the model's tokenizer.json"
        )
    merges = [_merge(m) for m in source.field("tokenizer.ggml.merges") or []]
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        bpe = models.BPE(vocab, merges, ignore_merges=pre in _IGNORE_MERGES)
    except Exception as e:  # the library raises its own base class
        raise UserError(
            f"{source.path}: its tokenizer is damaged ({e}): give --tokenizer=DIR"
        ) from e
    made = Tokenizer(bpe)
    cuts = [pre_tokenizers.Split(Regex(r), "isolated") for r in PRE_TOKENIZERS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
    made.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (CONTROL, USER_DEFINED):
            made.add_tokens([AddedToken(token, special=kind == CONTROL, normalized=False)])
    return made.to_str()


def _merge(text: str) -> tuple[str, str]:
    left, _, right = text.partition(" ")
    return left, right


# --- sentencepiece --------------------------------------------------------------------------------


def sentencepiece_model(
    tokens: list[str], scores: list[float], kinds: list[int], prefix: bool
) -> bytes:
    """A sentencepiece ModelProto (sentencepiece_model.proto) of LLaMA's kind: BPE, byte fallback,
    no normalization, and (prefix) a space before the text."""
    pieces = []
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        piece = _bytes(1, token.encode()) + b"\x15" + struct.pack("<f", score) + _int(3, kind)
        pieces.append(_bytes(1, piece))
    unknown = kinds.index(UNKNOWN) if UNKNOWN in kinds else 0
    ids = {40: unknown, 41: _find(tokens, "<s>"), 42: _find(tokens, "</s>"), 43: -1}
    trainer = _int(3, 2) + _int(4, len(tokens)) + _int(35, BYTE in kinds)
    trainer += b"".join(_int(k, v) for k, v in ids.items())
    normalizer = _bytes(1, b"identity") + _int(3, prefix) + _int(4, 0) + _int(5, 1)
    return b"".join(pieces) + _bytes(2, trainer) + _bytes(3, normalizer)


def _find(tokens: list[str], token: str) -> int:
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
