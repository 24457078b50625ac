"""CHAIR: objects that captions mention and that are not in the image (arXiv 1809.02156)."""

from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import NamedTuple

from minigpt4_jax.evaluation.metrics.coco_objects import (
    ANIMALS,
    IRREGULAR_PLURALS,
    NOT_OBJECTS,
    YOUNG,
    object_words,
)  # fmt: skip
from minigpt4_jax.evaluation.metrics.ptb_tokenizer import tokenize
from minigpt4_jax.evaluation.metrics.statistics import ratio

LONGEST_PHRASE = 4  # words


class Mentions(NamedTuple):
    """The COCO classes that a caption mentions, in order and with repetitions, and those of them that
    are not in the image."""

    objects: list[str]
    hallucinated: list[str]


def mentions(captions: Sequence[str], true_objects: Sequence[Collection[str]]) -> list[Mentions]:
    """What each caption mentions. true_objects: the classes that are in its image."""
    found = [find_objects(caption) for caption in tokenize(captions)]
    return [
        Mentions(objects, [name for name in objects if name not in true])
        for objects, true in zip(found, true_objects, strict=True)
    ]


def figures(of_captions: Sequence[Mentions]) -> dict[str, float]:
    """CHAIRi: hallucinated mentions / mentions; CHAIRs: captions with any / captions (fractions)."""
    mentioned = sum(len(m.objects) for m in of_captions)
    hallucinated = sum(len(m.hallucinated) for m in of_captions)
    captions = sum(bool(m.hallucinated) for m in of_captions)
    return {
        "CHAIRi": ratio(hallucinated, mentioned),
        "CHAIRs": ratio(captions, len(of_captions)),
        "mentions_per_caption": ratio(mentioned, len(of_captions)),
    }


def find_objects(tokens: str) -> list[str]:
    """The COCO classes in a tokenized caption. The longest phrase counts: a "hot dog" is no dog."""
    words = tokens.split()
    singular = [_singular(word) for word in words]
    table, excluded = _tables()
    found: list[str] = []
    i = 0
    while i < len(words):
        for length in range(min(LONGEST_PHRASE, len(words) - i), 0, -1):
            forms = (tuple(words[i : i + length]), tuple(singular[i : i + length]))
            if any(form in excluded for form in forms):
                break
            name = next((table[form] for form in forms if form in table), None)
            if name and not (
                name == "person" and _is_young_animal(words[i], singular[i + 1 : i + 2])
            ):
                found.append(name)
                break
        else:
            length = 1
        i += length
    return found


def _is_young_animal(word: str, following: Sequence[str]) -> bool:
    """Whether "baby" and the like only qualify an animal: "a baby elephant"."""
    table, _ = _tables()
    return word in YOUNG and bool(following) and table.get((following[0],)) in ANIMALS


@lru_cache
def _tables() -> tuple[dict[tuple[str, ...], str], frozenset[tuple[str, ...]]]:
    return object_words(), frozenset(
        tuple(phrase.split()) for phrase in NOT_OBJECTS if phrase.split()
    )


def _singular(word: str) -> str:
    if word in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[word]
    if len(word) > 3 and word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "sses", "xes", "oes")):
        return word[:-2]
    if len(word) > 2 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word
