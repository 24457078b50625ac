"""Scores of answers that need no reference: length, repetition, how they end, boxes that cannot be read."""

from collections.abc import Mapping, Sequence
from typing import Any

from minigpt4_jax.evaluation.metrics.referring import clean, is_acceptable
from minigpt4_jax.evaluation.metrics.statistics import ratio

NGRAM = 4


def answer_form(lines: Sequence[Mapping[str, Any]], *, boxes: bool) -> dict[str, float]:
    """Of the answers in lines {"answer", "finish_reason"}; answers that are no text are left out.

    words: mean number. repetition: mean share of an answer's 4-grams that it has already had. stopped:
    share that ended by itself, not at the limit of tokens. empty: share without any text. box_errors:
    share that does not begin with a box, where boxes are asked for.
    """
    texts = [line["answer"] for line in lines if isinstance(line.get("answer"), str)]
    if not texts:
        return {}
    ended = [line["finish_reason"] == "stop" for line in lines if "finish_reason" in line]
    figures = {
        "words": sum(len(text.split()) for text in texts) / len(texts),
        "repetition": sum(map(repetition, texts)) / len(texts),
        "empty": sum(not text.strip() for text in texts) / len(texts),
    }
    if ended:
        figures["stopped"] = sum(ended) / len(ended)
    if boxes:
        figures["box_errors"] = sum(not is_acceptable(clean(text)) for text in texts) / len(texts)
    return figures


def repetition(text: str) -> float:
    """The share of a text's 4-grams of words that stand before in it; 0 for a text of fewer words."""
    words = text.split()
    ngrams = [tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)]
    return ratio(len(ngrams) - len(set(ngrams)), len(ngrams))
