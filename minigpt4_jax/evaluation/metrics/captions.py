"""Caption scores: BLEU 1-4, ROUGE-L and CIDEr-D, equal to those of pycocoevalcap 1.2.

Captions are tokens joined by spaces, as `ptb_tokenizer.tokenize` returns them.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

MAX_N = 4
ROUGE_BETA = 1.2
CIDER_SIGMA = 6.0

Ngram = tuple[str, ...]
Vector = dict[Ngram, float]


class Scores(NamedTuple):
    """overall: metric -> score. per_caption: metric -> the score of each caption. Fractions; CIDEr is
    ten times the similarity, as usual."""

    overall: dict[str, float]
    per_caption: dict[str, list[float]]


def caption_scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """Bleu_1 to Bleu_4, ROUGE_L and CIDEr of a caption for each image. references: of each image, one or
    more. CIDEr's document frequencies come from these references: a subset has other scores, and a single
    image has 0."""
    overall, per_caption = bleu(captions, references)
    rouge = [rouge_l(c, r) for c, r in zip(captions, references, strict=True)]
    cider = cider_d(captions, references)
    for name, values in (("ROUGE_L", rouge), ("CIDEr", cider)):
        overall[name], per_caption[name] = sum(values) / len(values), values
    return Scores(overall, per_caption)


# --- BLEU -------------------------------------------------------------------------------------------


class _BleuCounts(NamedTuple):
    length: int
    reference_length: int  # of the reference of the closest length, the shorter of two
    correct: list[int]  # n-grams that a reference has, for n = 1..4
    guessed: list[int]  # n-grams


def bleu(
    captions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """(overall, of each caption), by metric."""
    counts = [_bleu_counts(c, r) for c, r in zip(captions, references, strict=True)]
    total = _BleuCounts(
        sum(c.length for c in counts), sum(c.reference_length for c in counts),
        [sum(c.correct[n] for c in counts) for n in range(MAX_N)],
        [sum(c.guessed[n] for c in counts) for n in range(MAX_N)],
    )  # fmt: skip
    names = [f"Bleu_{n}" for n in range(1, MAX_N + 1)]
    rows = [_bleu_of(c) for c in counts]
    overall = dict(zip(names, _bleu_of(total), strict=True))
    return overall, {name: [row[n] for row in rows] for n, name in enumerate(names)}


def _bleu_counts(caption: str, references: Sequence[str]) -> _BleuCounts:
    words = caption.split()
    others = [reference.split() for reference in references]
    lengths = [len(reference) for reference in others]
    closest = min((abs(length - len(words)), length) for length in lengths)[1]
    most: Counter[Ngram] = Counter()
    for reference in others:
        most |= _ngrams(reference)
    correct = [0] * MAX_N
    for ngram, count in _ngrams(words).items():
        correct[len(ngram) - 1] += min(count, most[ngram])
    guessed = [max(0, len(words) - n) for n in range(MAX_N)]
    return _BleuCounts(len(words), closest, correct, guessed)


def _bleu_of(counts: _BleuCounts) -> list[float]:
    tiny, small = 1e-15, 1e-9  # against 0 / 0
    product, scores = 1.0, []
    for n in range(MAX_N):
        product *= (counts.correct[n] + tiny) / (counts.guessed[n] + small)
        scores.append(product ** (1.0 / (n + 1)))
    ratio = (counts.length + tiny) / (counts.reference_length + small)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return [score * penalty for score in scores]


def _ngrams(words: Sequence[str]) -> Counter[Ngram]:
    return Counter(
        tuple(words[i : i + n]) for n in range(1, MAX_N + 1) for i in range(len(words) - n + 1)
    )


# --- ROUGE-L ----------------------------------------------------------------------------------------


def rouge_l(caption: str, references: Sequence[str]) -> float:
    """F of the longest common subsequence, with the best precision and the best recall over references.

    Words are what single spaces separate, so an empty caption has one empty word, and is equal to an empty
    reference."""
    words = caption.split(" ")
    precision = recall = 0.0
    for reference in references:
        others = reference.split(" ")
        common = _common_subsequence(words, others)
        precision = max(precision, common / len(words))
        recall = max(recall, common / len(others))
    if not (precision and recall):
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    lengths = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            above = lengths[j]
            lengths[j] = diagonal + 1 if word == other else max(above, lengths[j - 1])
            diagonal = above
    return lengths[-1]


# --- CIDEr-D ----------------------------------------------------------------------------------------


class _Weighted(NamedTuple):
    vectors: list[Vector]  # tf-idf by n
    norms: list[float]
    bigrams: int  # which the length penalty compares, not words


def cider_d(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption."""
    counted = [[_ngrams(reference.split()) for reference in of_image] for of_image in references]
    frequency: Counter[Ngram] = Counter()
    for of_image in counted:
        frequency.update({ngram for counts in of_image for ngram in counts})
    log_images = math.log(len(captions))

    def weigh(counts: Counter[Ngram]) -> _Weighted:
        vectors: list[Vector] = [{} for _ in range(MAX_N)]
        for ngram, count in counts.items():
            idf = log_images - math.log(max(1, frequency[ngram]))
            vectors[len(ngram) - 1][ngram] = count * idf
        norms = [math.sqrt(sum(w * w for w in vector.values())) for vector in vectors]
        return _Weighted(vectors, norms, sum(n for ngram, n in counts.items() if len(ngram) == 2))

    scores = []
    for caption, of_image in zip(captions, counted, strict=True):
        own = weigh(_ngrams(caption.split()))
        total = sum(_similarity(own, weigh(reference)) for reference in of_image)
        scores.append(10 * total / len(of_image))
    return scores


def _similarity(a: _Weighted, b: _Weighted) -> float:
    """The mean over n of the clipped cosine, with the penalty for different lengths."""
    penalty = math.exp(-((a.bigrams - b.bigrams) ** 2) / (2 * CIDER_SIGMA**2))
    total = 0.0
    for n in range(MAX_N):
        other = b.vectors[n]
        value = sum(
            min(weight, other[ngram]) * other[ngram]
            for ngram, weight in a.vectors[n].items()
            if ngram in other
        )
        norms = a.norms[n] * b.norms[n]
        total += (value / norms if norms else value) * penalty
    return total / MAX_N
