"""Tokens of captions as pycocoevalcap makes them, without Java: Stanford's PTBTokenizer, lower case, and
without punctuation."""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

from minigpt4_jax.evaluation.metrics.ptb_rules import Compiled, compile_rules

# Removed by pycocoevalcap after tokenization. Brackets are -lrb- by then and stay.
PUNCTUATION = frozenset(
    [
        "''",
        "'",
        "``",
        "`",
        "-LRB-",
        "-RRB-",
        "-LCB-",
        "-RCB-",
        ".",
        "?",
        "!",
        ",",
        ":",
        "-",
        "--",
        "...",
        ";",
    ]
)
_FRACTIONS = {"\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3"}
_CURRENCIES = {
    "\u00a2": "cents",
    "\u00a3": "#",
    "\u0080": "$",
    "\u00a4": "$",
    "\u20a0": "$",
    "\u20ac": "$",
}
_BRACKETS = {"(": "-LRB-", ")": "-RRB-", "{": "-LCB-", "}": "-RCB-", "[": "-LSB-", "]": "-RSB-"}
_QUOTES = {
    "\u2018": "`", "\u2019": "'", "\u0091": "`", "\u0092": "'", "\u201c": "``", "\u201d": "''",
    "\u0093": "``", "\u0094": "''", "&apos;": "'", '"': "''", "&quot;": "''", "\u2039": "`", "\u203a": "'",
    "\u00ab": "``", "\u00bb": "''", "\u201b": "'", "\u201a": "'", "\u201e": "``", "\u201f": "``",
    "\u0082": "`", "\u0084": "``",
}  # fmt: skip
_QUOTE = re.compile("|".join(_QUOTES))
# Line breaks of Java within a caption are spaces here; the original takes the rest for the next caption.
_LINE_BREAKS = re.compile("[\n\r\x0b\x0c\x85\u2028\u2029]")
# Most of a caption: a word of letters before a space. No rule but those of _SPLIT_WORDS concerns it.
_PLAIN_WORD = re.compile(r"[A-Za-z]+(?=,?(?: |$))")
_SPLIT_WORDS = frozenset(["cannot", "gonna", "gotta", "lemme", "gimme", "wanna"])
_SPACES = re.compile(" +")


def tokenize(captions: Sequence[str]) -> list[str]:
    """The tokens of each caption, joined by spaces.

    Captions are tokenized as the lines of one text, as the original does: "No." at the end of a caption
    is one token if the next begins with a digit.
    """
    if not captions:
        return []
    lines = [_LINE_BREAKS.sub(" ", caption) for caption in captions]
    followers = ["\n" + line[:1] for line in lines[1:]] + [""]
    return [
        " ".join(token for token in _tokens(line, rest) if token not in PUNCTUATION)
        for line, rest in zip(lines, followers, strict=True)
    ]


def _tokens(line: str, follower: str) -> Iterator[str]:
    """All tokens of a line, in lower case, punctuation included. follower: what comes after it."""
    position, text = 0, line + follower
    while position < len(line):
        if spaces := _SPACES.match(line, position):
            position = spaces.end()
            continue
        plain = _PLAIN_WORD.match(line, position)
        if plain and plain[0].lower() not in _SPLIT_WORDS:
            yield plain[0].lower()
            position = plain.end()
            continue
        token, position = _next(text, position)
        # a token may hold spaces of its own (a telephone number)
        yield from (part for part in token.lower().split(" ") if part)


@lru_cache
def _rules() -> list[Compiled]:
    return compile_rules()


def _next(text: str, position: int) -> tuple[str, int]:
    """(the token at a position, where the next one begins); "" for a character that is in no token."""
    longest, best = 0, None
    for rule in _rules():
        if (match := rule.whole.match(text, position)) and match.end() - position > longest:
            longest, best = match.end() - position, rule
    if best is None:
        return "", position + 1
    end = _end_of_token(best, text, position, position + longest)
    token = text[position:end]
    return _apply(best.name, token, end)


def _end_of_token(rule: Compiled, text: str, start: int, stop: int) -> int:
    """Where the token ends and its context begins: as late as possible."""
    if rule.context is None:
        return stop
    for end in range(stop - 1, start, -1):
        if rule.context.fullmatch(text, end, stop) and rule.token.fullmatch(text, start, end):
            return end
    return stop


def _apply(name: str, token: str, end: int) -> tuple[str, int]:
    """What a rule makes of its token, and where the next one begins."""
    match name:
        case "push3":
            return token[:-3], end - 3
        case "push2":
            return token[:-2], end - 2
        case "acronym":
            return (token[:-1], end - 1) if len(token) == 2 else (token, end - 1)
        case "duplicate":
            return token, end - 1
        case "skip":
            return "", end
        case "word" | "number":
            return token.replace("\u00ad", ""), end
        case "nbsp":
            return token.replace(" ", "\u00a0"), end
        case "dash":
            return "--", end
        case "hyphens":
            return "--" if 3 <= len(token) <= 4 else token, end
        case "amp":
            return re.sub("&amp;", "&", token, flags=re.IGNORECASE), end
        case "fraction":
            return _FRACTIONS.get(token, token), end
        case "currency":
            return _CURRENCIES.get(token, token), end
        case "bracket":
            return _BRACKETS[token], end
        case "parens":
            return token.replace("(", "-LRB-").replace(")", "-RRB-"), end
        case "phone":
            return _apply("nbsp", _apply("parens", token, end)[0], end)
        case "less":
            return "<", end
        case "greater":
            return ">", end
        case "ellipsis":
            return "...", end
        case "quote":
            return _QUOTE.sub(lambda quote: _QUOTES[quote[0]], token), end
    return token, end
