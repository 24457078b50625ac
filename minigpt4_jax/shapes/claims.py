"""What a text claims about a scene of the dataset `shapes`, and whether it is true.

`parse_description` reads the texts of text.py and a model's imperfect versions of them; `matches` and
`attribute_score` compare what they say with the scene.
"""

import dataclasses
import itertools
import re

from minigpt4_jax.shapes.scene import BACKGROUNDS, CELLS, COLOR_NAMES, SHAPES, SIZES, Scene

# Size, color, shape and place of an object; None: not stated or ambiguous
ObjectClaim = tuple[str | None, str | None, str | None, str | None]


@dataclasses.dataclass(frozen=True)
class Claims:
    """What a text says about a scene."""

    objects: tuple[ObjectClaim, ...]  # in the order of the text
    background: str | None
    count: int | None  # of objects; None: not stated, -1: contradictory
    relations: tuple[tuple[str, str, str], ...]  # (first object, relation, second object)


_WORDS = {
    **{w: (0, w) for w in SIZES}, "big": (0, "large"), "little": (0, "small"), "tiny": (0, "small"),
    **{w: (1, w) for w in COLOR_NAMES},
    **{w: (2, w) for w in SHAPES}, "triangular": (2, "triangle"),
}  # fmt: skip
_ATTRIBUTE = "|".join(_WORDS)
_RUN = rf"(?:{_ATTRIBUTE})(?:\s+(?:{_ATTRIBUTE}))*"
_BACKGROUND_WORD = r"white|black|gray|grey|striped|stripes"
_RELATION = re.compile(
    rf"\bthe ({_RUN}) (?:is|sits|lies|stands)(?: (?:directly|just))?"
    rf" (above|below|(?:to the |on the )?(?:left|right) of) the ({_RUN})\b"
)
_BACKGROUND = re.compile(
    r"\b(?:(?!the |a )(?P<a>\w+) background|background is (?:a )?(?P<b>\w+)"
    rf"|on (?:a )?(?P<c>{_BACKGROUND_WORD})\b)"
)
_COUNT = re.compile(
    r"\b(\d+|no|an?|one|single|two|three|four|five|six|seven|eight|nine|ten)"
    r" (?:\w+ )?(?:shape|object|thing|figure|item)s?\b"
)
_COUNTS = {"no": 0, "a": 1, "an": 1, "one": 1, "single": 1, "two": 2, "three": 3, "four": 4}
_COUNTS |= {"five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_PLACE_WORD = r"(?:top|bottom|left|right|center|centre|middle)"
_PLACES = {name: name for name in CELLS} | {
    "top center": "top", "bottom center": "bottom", "center left": "left", "center right": "right",
}  # fmt: skip
_TAG = re.compile(
    rf"\b(?P<place>{_PLACE_WORD}(?: {_PLACE_WORD})*)\b|\b(?P<run>{_RUN})\b|(?P<stop>[.:;!?\n])"
)


def parse_description(text: str) -> Claims:
    """What a text says about a scene. Recognizes the wordings of text.py and similar ones; never raises."""
    text = re.sub(r"[ \t]+", " ", text.lower().replace("-", " "))
    relations = tuple(
        (m[1], m[2].removeprefix("to the ").removeprefix("on the "), m[3])
        for m in _RELATION.finditer(text)
    )
    text = _RELATION.sub(" ", text)
    backgrounds = {(m["a"] or m["b"] or m["c"]) for m in _BACKGROUND.finditer(text)}
    backgrounds = {{"grey": "gray", "stripes": "striped"}.get(b, b) for b in backgrounds}
    text = _BACKGROUND.sub(" ", text)
    counts = {_COUNTS[m[1]] if m[1] in _COUNTS else int(m[1][:6]) for m in _COUNT.finditer(text)}
    text = _COUNT.sub(" ", text)
    background = backgrounds.pop() if len(backgrounds) == 1 else None
    count = None if not counts else counts.pop() if len(counts) == 1 else -1
    return Claims(
        _read_objects(text), background if background in BACKGROUNDS else None, count, relations
    )


def _read_objects(text: str) -> tuple[ObjectClaim, ...]:
    """Objects in the order of the text.

    A place belongs to the object before it, or to the one after it in a sentence that begins with a place.
    A place without an object makes the last object's place ambiguous.
    """
    found: list[list[str | None]] = []
    pending: str | None = None  # a place whose object has not been read yet
    place_first: bool | None = None  # of this sentence; None until its first place or object
    for tag in _TAG.finditer(text + "."):
        if tag["run"]:
            thing = _read_run(tag["run"])
            if thing is None:
                continue
            place_first = False if place_first is None else place_first
            thing[3], pending = pending, None
            found.append(thing)
            continue
        if pending is not None and found:  # the sentence ends, or names another place
            found[-1][3] = None
        pending = None
        if tag["stop"]:
            place_first = None
            continue
        place = _PLACES.get(re.sub("centre|middle", "center", tag["place"]), "unclear")
        place_first = True if place_first is None else place_first
        if place_first:
            pending = place
        elif found:
            found[-1][3] = place if found[-1][3] is None else "unclear"
    return tuple((t[0], t[1], t[2], None if t[3] == "unclear" else t[3]) for t in found)


def _read_run(run: str) -> list[str | None] | None:
    """[size, color, shape, None] of adjacent attribute words; None if they are only colours, which is no
    object."""
    words = [_WORDS[w] for w in run.split()]
    if all(kind == 1 for kind, _ in words):
        return None
    thing: list[str | None] = [None] * 4
    for kind in range(3):
        values = {word for k, word in words if k == kind}
        thing[kind] = values.pop() if len(values) == 1 else None
    return thing


def matches(scene: Scene, text: str) -> bool:
    """Whether a text states every attribute of every object and the background correctly, no other
    object, and nothing wrong about the count and about relations."""
    claims = parse_description(text)
    return (
        sorted(o.attributes for o in scene.objects)
        == sorted(tuple(w or "" for w in o) for o in claims.objects)
        and claims.background == scene.background
        and claims.count in (None, len(scene.objects))
        and all(_is_true(scene, *relation) for relation in claims.relations)
    )


def attribute_score(scene: Scene, text: str) -> float:
    """The share of attributes that a text states correctly, 0 to 1: four of each object and the
    background. Objects are matched so that the share is largest; an extra object counts as four wrong
    attributes."""
    claims = parse_description(text)
    true = [o.attributes for o in scene.objects]
    right = [
        [sum(a == b for a, b in zip(t, s, strict=True)) for s in claims.objects[:12]] for t in true
    ]
    columns = max(len(claims.objects[:12]), len(true))
    right = [row + [0] * (columns - len(row)) for row in right]
    best = max(
        sum(right[i][j] for i, j in enumerate(order))
        for order in itertools.permutations(range(columns), len(true))
    )
    total = 4 * max(len(true), len(claims.objects)) + 1
    return (best + (claims.background == scene.background)) / total


def _is_true(scene: Scene, first: str, relation: str, second: str) -> bool:
    """Whether a relation is true. False if its words do not identify two objects; rows and columns of the
    grid decide."""
    found = []
    for phrase in (first, second):
        words = {_WORDS[w][1] for w in phrase.split()}
        fitting = [o for o in scene.objects if words <= set(o.attributes[:3])]
        if len(fitting) != 1:
            return False
        found.append(fitting[0])
    a, b = found
    return {
        "above": a.row < b.row,
        "below": a.row > b.row,
        "left of": a.column < b.column,
        "right of": a.column > b.column,
    }[relation]
