"""What a set of descriptions is like: length, repetition, vocabulary, unconfirmed objects."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from minigpt4_jax.curation.filters import repetition, sentences_of, words_of
from minigpt4_jax.curation.objects import Vocabulary, unconfirmed
from minigpt4_jax.curation.rows import Row


def image_key(row: Row) -> str:
    """Equal for rows of the same image."""
    return f"{row.get('shard', row.get('image', row.get('file_name')))} {row.get('offset', '')}"


def statistics(rows: Sequence[Row], vocabulary: Vocabulary) -> dict[str, Any]:
    """Numbers about the captions of rows. Rows without a caption are only counted.

    words, sentences: of a text, mean and percentiles. repetition: share of 4-grams that occurred before in
    the text. vocabulary: different words, also of 1,000 words on average. first_words: share of texts that
    begin with the most frequent three words. objects: only of rows with "references" or "objects".
    """
    texts = [row["caption"] for row in rows if "caption" in row]
    words = [words_of(text) for text in texts]
    all_words = Counter(word for of_text in words for word in of_text)
    openings = Counter(" ".join(of_text[:3]) for of_text in words if of_text)
    result: dict[str, Any] = {
        "rows": len(rows),
        "images": len({image_key(row) for row in rows}),
        "described": len(texts),
        "words": _spread([len(of_text) for of_text in words]),
        "sentences": _spread([len(sentences_of(text)) for text in texts]),
        "repetition": round(float(np.mean([repetition(t) for t in texts])), 4) if texts else 0.0,
        "texts_with_repetition": sum(repetition(text) > 0 for text in texts),
        "vocabulary": len(all_words),
        "equal_texts": len(texts) - len({*texts}),
    }
    if per_thousand := _words_per_thousand(words):
        result["vocabulary_per_1000_words"] = per_thousand
    if openings:
        opening, count = openings.most_common(1)[0]
        result["first_words"] = {"most_frequent": opening, "share": round(count / len(texts), 4)}
    if objects := _objects(rows, vocabulary):
        result["objects"] = objects
    return result


def _spread(values: Sequence[int]) -> dict[str, float]:
    if not values:
        return {}
    low, median, high = np.percentile(values, [5, 50, 95])
    return {
        "mean": round(float(np.mean(values)), 2), "p5": float(low), "median": float(median),
        "p95": float(high),
    }  # fmt: skip


def _words_per_thousand(words: Sequence[Sequence[str]]) -> float:
    """Different words in a thousand, averaged over the texts, which compares sets of other sizes; 0: there
    are fewer words."""
    flat = [word for of_text in words for word in of_text]
    chunks = [flat[i : i + 1000] for i in range(0, len(flat) - 999, 1000)]
    return round(float(np.mean([len({*chunk}) for chunk in chunks])), 1) if chunks else 0.0


def confirmable(row: Row) -> bool:
    """Whether something is known about the objects in a row's image."""
    return bool(row.get("references") or row.get("objects") is not None) and "caption" in row


def _objects(rows: Sequence[Row], vocabulary: Vocabulary) -> dict[str, Any]:
    """As CHAIR: the share of mentions, and of texts, with an unconfirmed object."""
    known = [row for row in rows if confirmable(row)]
    if not known:
        return {}
    counts: Counter[str] = Counter()
    named = texts = 0
    for row in known:
        number, missing = row_objects(row, vocabulary)
        named += number
        texts += bool(missing)
        counts.update(missing)
    return {
        "rows": len(known),
        "named": named,
        "unconfirmed": counts.total(),
        "unconfirmed_share": round(counts.total() / named, 4) if named else 0.0,
        "texts_with_unconfirmed": round(texts / len(known), 4),
        "most_frequent": dict(counts.most_common(10)),
    }


def row_objects(row: Row, vocabulary: Vocabulary) -> tuple[int, list[str]]:
    """(number of objects that a row's caption names, those that are not confirmed)."""
    return unconfirmed(
        row["caption"], row.get("references") or [], row.get("objects") or [], vocabulary
    )


def table(before: dict[str, Any] | None, after: dict[str, Any]) -> str:
    """The numbers as lines of text, before and after."""
    columns = [_flat(values) for values in (before, after) if values is not None]
    names = list(dict.fromkeys(name for column in columns for name in column))
    width = max(map(len, names))
    head = ["before", "after"][2 - len(columns) :]
    lines = [f"{'':{width}}" + "".join(f"{title:>24}" for title in head)]
    for name in names:
        cells = "".join(f"  {column.get(name, ''):>22}" for column in columns)
        lines.append(f"{name:{width}}{cells}")
    return "\n".join(lines)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in values.items():
        if name == "most_frequent" and isinstance(value, dict):
            continue
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name} ")
        else:
            form = {int: ",", float: "g"}.get(type(value), "")
            flat[f"{prefix}{name}".replace("_", " ")] = format(value, form)
    return flat
