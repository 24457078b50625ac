"""Filters for descriptions: each finds one kind of bad text.

The paper names apologies, repetition, meaningless characters and text that is not English (section 3.2 and
the authors' script); thresholds are ours.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources

MIN_CHARACTERS = 50  # of the authors' script

_APOLOGY = re.compile(
    r"\bI(?:'|\u2019)?\s?a?m (?:\w+ )?sorry\b|\bsorry (?:for|about|if|but)\b|\bI (?:do |must )?apologi[sz]e\b"
    r"|\bmy apologies\b|\bI (?:have )?made a mistake\b|\bas an? (?:AI|language model)\b"
    r"|\bI (?:can ?not|can(?:'|\u2019)t|am unable to|am not able to) (?:see|view|describe|help|assist)\b",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
# What templates and tokenizers leave behind, and runs of one character
_MARKUP = re.compile(
    r"###|</?s>|<unk>|<pad>|</?Img>|<ImageHere>|<\|\w+\|>|\[/?INST\]|https?://", re.IGNORECASE
)
_RUN = re.compile(r"([^\w\s.\-])\1{2,}|([.\-_])\2{5,}|([^\W\d_])\3{4,}")
_LONGEST_WORD = 35
_MIN_ENGLISH = 0.2  # share of English function words
_MIN_WORDS = 12  # fewer words say nothing about the language
_MIN_LATIN = 0.95  # share of letters


@dataclass(frozen=True)
class FilterLimits:
    """What the filters tolerate.

    min_characters: of a text. ngram: length of the word sequences that are counted. max_repetition: share
    of them that occurred before in the text.
    """

    min_characters: int = MIN_CHARACTERS
    ngram: int = 4
    max_repetition: float = 0.2


@cache
def _function_words() -> frozenset[str]:
    """Words that about half of any English prose consists of; other languages in Latin letters have few."""
    return frozenset(
        (resources.files("minigpt4_jax") / "assets/function_words.txt").read_text().split()
    )


def repetition(text: str, n: int = 4) -> float:
    """The share of n-grams of words that occurred before in the text: 0 if none is repeated."""
    words = [word.lower() for word in _WORD.findall(text)]
    ngrams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    return 1 - len(ngrams) / ngrams.total() if ngrams else 0.0


def words_of(text: str) -> list[str]:
    """The words of a text in lower case."""
    return [word.lower() for word in _WORD.findall(text)]


def sentences_of(text: str) -> list[str]:
    return [part.strip() for part in _SENTENCE_END.split(text) if part.strip()]


def _is_short(text: str, limits: FilterLimits) -> bool:
    return len(text) < limits.min_characters


def _apologizes(text: str, limits: FilterLimits) -> bool:
    return _APOLOGY.search(text) is not None


def _repeats(text: str, limits: FilterLimits) -> bool:
    sentences = [" ".join(words_of(sentence)) for sentence in sentences_of(text)]
    long = [sentence for sentence in sentences if sentence.count(" ") >= 2]
    return len({*long}) < len(long) or repetition(text, limits.ngram) > limits.max_repetition


def _is_meaningless(text: str, limits: FilterLimits) -> bool:
    if _MARKUP.search(text) or _RUN.search(text):
        return True
    if any(len(word) > _LONGEST_WORD for word in text.split()):
        return True
    # Cc control, Co private use, Cn not assigned, Cs surrogates
    broken = any(
        unicodedata.category(c) in ("Cc", "Co", "Cn", "Cs") for c in text if c not in "\n\t"
    )
    letters = sum(c.isalnum() or c.isspace() for c in text)
    return broken or "\ufffd" in text or letters < 0.75 * len(text)


def _is_not_english(text: str, limits: FilterLimits) -> bool:
    letters = [c for c in text if c.isalpha()]
    latin = sum(unicodedata.name(c, "").startswith("LATIN") for c in letters)
    if latin < _MIN_LATIN * len(letters):
        return True
    words = words_of(text)
    english = sum(word in _function_words() for word in words)
    return len(words) >= _MIN_WORDS and english < _MIN_ENGLISH * len(words)


# In this order: a text is counted under the first that finds it.
FILTERS: dict[str, Callable[[str, FilterLimits], bool]] = {
    "apology": _apologizes,
    "language": _is_not_english,
    "meaningless": _is_meaningless,
    "repetition": _repeats,
    "short": _is_short,
}


def find_fault(
    text: str, limits: FilterLimits, without: frozenset[str] = frozenset()
) -> str | None:
    """The name of the first filter that removes a text, or None. without: filters that are not used."""
    for name, finds in FILTERS.items():
        if name not in without and finds(text, limits):
            return name
    return None
