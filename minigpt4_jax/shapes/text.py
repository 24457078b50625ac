"""Wording of the dataset `shapes`: captions, descriptions, questions; and reading text back.

`short` and `detailed` say everything there is to say about a scene; `parse_description` reads such
text, also a model's imperfect version of it, and `matches` and `attribute_score` judge it. Few
tokens are spent: most words here are one token of SmolLM2's vocabulary.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable

import numpy as np

from minigpt4_jax.shapes.scene import (
    BACKGROUNDS,
    CELLS,
    COLOR_NAMES,
    HELDOUT_PAIRS,
    SHAPES,
    SIZES,
    Object,
    Scene,
)

NUMBERS = ("no", "one", "two", "three")
RELATIONS = ("above", "below", "left of", "right of")
_OPPOSITE = dict(zip(RELATIONS, ("below", "above", "right of", "left of"), strict=True))
_SAID = {
    "above": "above",
    "below": "below",
    "left of": "to the left of",
    "right of": "to the right of",
}

# ----------------------------------------------------------------------------------------- captions


def short(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """Stage-1 caption: every attribute in the fewest words, always worded the same (`rng` is not
    used)."""
    return f"{_join([f'a {_name(o)} {o.cell}' for o in scene.objects])} on {_ground(scene)}"


def detailed(scene: Scene, rng: np.random.Generator) -> str:
    """Stage-2 description in one of five phrasings: the count, the background, every attribute of
    each object, in the order of short captions. The last phrasing, one text in ten, adds how two
    objects stand to each other where that is beyond doubt."""
    relations = true_relations(scene)
    if not relations or rng.integers(10):
        return _PHRASINGS[rng.integers(len(_PHRASINGS))](scene)
    a, relation, b = relations[rng.integers(len(relations))]
    return f"{_PHRASINGS[0](scene)} The {a} is {_SAID[relation]} the {b}."


def phrasings(scene: Scene) -> list[str]:
    """Every text that `detailed` may give for this scene."""
    plain = [phrase(scene) for phrase in _PHRASINGS]
    related = [f"{plain[0]} The {a} is {_SAID[r]} the {b}." for a, r, b in true_relations(scene)]
    return plain + related


def _shows(scene: Scene) -> str:
    things = _join([f"a {_name(o)} {_at(o)}" for o in scene.objects])
    return f"The image shows {_count(scene)} on a {scene.background} background: {things}."


def _there_are(scene: Scene) -> str:
    verb = "is" if len(scene.objects) == 1 else "are"
    things = " ".join(f"A {_name(o)} is {_at(o)}." for o in scene.objects)
    return f"There {verb} {_count(scene)} on a {scene.background} background. {things}"


def _background_last(scene: Scene) -> str:
    things = _join([f"a {_name(o)} {_at(o)}" for o in scene.objects])
    subject = "It is" if len(scene.objects) == 1 else "They are"
    return f"I see {_count(scene)}: {things}. {subject} on a {scene.background} background."


def _background_first(scene: Scene) -> str:
    things = _join([f"the {_name(o)} is {_at(o)}" for o in scene.objects])
    things = things[0].upper() + things[1:]
    return f"The background is {scene.background}, with {_count(scene)}. {things}."


_PHRASINGS: tuple[Callable[[Scene], str], ...] = (
    _shows,
    _there_are,
    _background_last,
    _background_first,
)


def _name(thing: Object) -> str:
    return f"{thing.size} {thing.color} {thing.shape}"


def _at(thing: Object) -> str:
    """The place as an adverbial: "at the top left", "on the left", "in the center"."""
    return (
        f"{ {'left': 'on', 'right': 'on', 'center': 'in'}.get(thing.cell, 'at') } the {thing.cell}"
    )


def _count(scene: Scene) -> str:
    return f"{NUMBERS[len(scene.objects)]} shape{'s' * (len(scene.objects) > 1)}"


def _ground(scene: Scene) -> str:
    return "stripes" if scene.background == "striped" else scene.background


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


# ---------------------------------------------------------------------------------------- relations


def true_relations(scene: Scene) -> list[tuple[str, str, str]]:
    """(phrase, relation, phrase) for pairs in one row or one column of the grid whose names tell
    them apart."""
    phrases = [_unique_phrase(scene, o) for o in scene.objects]
    found = []
    for (a, x), (b, y) in itertools.permutations(zip(scene.objects, phrases, strict=True), 2):
        if x is None or y is None:
            continue
        if a.column == b.column:
            found.append((x, "above" if a.row < b.row else "below", y))
        elif a.row == b.row:
            found.append((x, "left of" if a.column < b.column else "right of", y))
    return found


def _unique_phrase(scene: Scene, thing: Object) -> str | None:
    """The fewest words that mean `thing` alone without its place: "circle", "red circle", "large
    red circle"."""
    for words in (
        (thing.shape,),
        (thing.color, thing.shape),
        (thing.size, thing.color, thing.shape),
    ):
        if sum(set(words) <= set(o.attributes[:3]) for o in scene.objects) == 1:
            return " ".join(words)
    return None


def references(scene: Scene) -> list[tuple[str, tuple[float, float, float, float]]]:
    """(phrase, box in pixels) of each object; the phrase fits no other object of the scene."""
    return [
        (f"the {_unique_phrase(scene, o) or f'{_name(o)} {_at(o)}'}", o.box) for o in scene.objects
    ]


# ---------------------------------------------------------------------------------------- questions


def questions(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """(question, short answer) pairs about colour, shape, size, place, count, background, existence
    and relation.

    Each has one right answer; of the yes-or-no questions as many are answered yes as no, in the
    mean.
    """
    found = [
        ("How many shapes are there?", NUMBERS[len(scene.objects)]),
        ("What is the background?", scene.background),
        _existence(scene, rng),
    ]
    for thing in scene.objects:
        found.append((f"What is {_at(thing)}?", f"a {_name(thing)}"))
        others = [o for o in scene.objects if o is not thing]
        if all(o.color != thing.color for o in others):
            found.append((f"What shape is the {thing.color} object?", thing.shape))
        if all(o.shape != thing.shape for o in others):
            found.append((f"What color is the {thing.shape}?", thing.color))
        phrase = _unique_phrase(scene, thing)
        if phrase is not None:
            found.append((f"Where is the {phrase}?", thing.cell))
        if all((o.color, o.shape) != (thing.color, thing.shape) for o in others):
            name = phrase if phrase and thing.size not in phrase else f"{thing.color} {thing.shape}"
            found.append((f"Is the {name} small or large?", thing.size))
    relations = true_relations(scene)
    if relations:
        a, relation, b = relations[rng.integers(len(relations))]
        yes = bool(rng.integers(2))
        said = _SAID[relation if yes else _OPPOSITE[relation]]
        found.append((f"Is the {a} {said} the {b}?", "yes" if yes else "no"))
    return found


def _existence(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A question like "Is there a red circle?", answered yes or no with equal chance. A wrong pair
    shares its colour or its shape with an object of the scene, and is never a held-out pair: those
    must stay unseen in text as well."""
    present = {(o.color, o.shape) for o in scene.objects}
    yes = bool(rng.integers(2))
    if yes:
        thing = scene.objects[rng.integers(len(scene.objects))]
        color, shape = thing.color, thing.shape
    else:
        thing = scene.objects[rng.integers(len(scene.objects))]
        near = [
            (c, s) for c in COLOR_NAMES for s in SHAPES if (c == thing.color) != (s == thing.shape)
        ]
        near = [pair for pair in near if pair not in present and pair not in HELDOUT_PAIRS]
        color, shape = near[rng.integers(len(near))]
    article = "an" if color == "orange" else "a"
    return f"Is there {article} {color} {shape}?", "yes" if yes else "no"


# ------------------------------------------------------------------------------------------ reading

Stated = tuple[
    str | None, str | None, str | None, str | None
]  # size, color, shape, place; None: not said or not clear


@dataclasses.dataclass(frozen=True)
class Parsed:
    """What a text claims. `count` is None without a claim and -1 where claims differ; a relation is
    (words of the first object, relation, words of the second)."""

    objects: tuple[Stated, ...]
    background: str | None
    count: int | None
    relations: tuple[tuple[str, str, str], ...]


_WORDS = {
    **{w: (0, w) for w in SIZES}, "big": (0, "large"), "little": (0, "small"), "tiny": (0, "small"),
    **{w: (1, w) for w in COLOR_NAMES},
    **{w: (2, w) for w in SHAPES}, "triangular": (2, "triangle"),
}  # fmt: skip
_ATTRIBUTE = "|".join(_WORDS)
_RUN = rf"(?:{_ATTRIBUTE})(?:\s+(?:{_ATTRIBUTE}))*"
_GROUND = r"white|black|gray|grey|striped|stripes"
_RELATION = re.compile(
    rf"\bthe ({_RUN}) (?:is|sits|lies|stands)(?: (?:directly|just))?"
    rf" (above|below|(?:to the |on the )?(?:left|right) of) the ({_RUN})\b"
)
_BACKGROUND = re.compile(
    r"\b(?:(?!the |a )(?P<a>\w+) background|background is (?:a )?(?P<b>\w+)"
    rf"|on (?:a )?(?P<c>{_GROUND})\b)"
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


def parse_description(text: str) -> Parsed:
    """What `text` claims about a scene. Reads this module's wordings and near variants of them;
    never raises."""
    text = re.sub(r"[ \t]+", " ", text.lower().replace("-", " "))
    relations = tuple(
        (m[1], m[2].removeprefix("to the ").removeprefix("on the "), m[3])
        for m in _RELATION.finditer(text)
    )
    text = _RELATION.sub(" ", text)
    grounds = {(m["a"] or m["b"] or m["c"]) for m in _BACKGROUND.finditer(text)}
    grounds = {{"grey": "gray", "stripes": "striped"}.get(g, g) for g in grounds}
    text = _BACKGROUND.sub(" ", text)
    counts = {_COUNTS[m[1]] if m[1] in _COUNTS else int(m[1][:6]) for m in _COUNT.finditer(text)}
    text = _COUNT.sub(" ", text)
    background = grounds.pop() if len(grounds) == 1 else None
    count = None if not counts else counts.pop() if len(counts) == 1 else -1
    return Parsed(
        _read_objects(text), background if background in BACKGROUNDS else None, count, relations
    )


def _read_objects(text: str) -> tuple[Stated, ...]:
    """Objects in the order of mention. A place belongs to the mention before it, or to the one
    after it in sentences that begin with a place. A place left over makes the last object's place
    unclear."""
    found: list[list[str | None]] = []
    waiting: str | None = None  # a place still without its object
    place_first: bool | None = None  # of this sentence; None until its first place or object
    for tag in _TAG.finditer(text + "."):
        if tag["run"]:
            thing = _read_run(tag["run"])
            if thing is None:
                continue
            place_first = False if place_first is None else place_first
            thing[3], waiting = waiting, None
            found.append(thing)
            continue
        if waiting is not None and found:  # the sentence ends, or names another place
            found[-1][3] = None
        waiting = None
        if tag["stop"]:
            place_first = None
            continue
        place = _PLACES.get(re.sub("centre|middle", "center", tag["place"]), "unclear")
        place_first = True if place_first is None else place_first
        if place_first:
            waiting = place
        elif found:
            found[-1][3] = place if found[-1][3] is None else "unclear"
    return tuple((t[0], t[1], t[2], None if t[3] == "unclear" else t[3]) for t in found)


def _read_run(run: str) -> list[str | None] | None:
    """[size, color, shape, None] from neighbouring attribute words; None if they are colours only,
    so no object."""
    words = [_WORDS[w] for w in run.split()]
    if all(kind == 1 for kind, _ in words):
        return None
    thing: list[str | None] = [None] * 4
    for kind in range(3):
        said = {word for k, word in words if k == kind}
        thing[kind] = said.pop() if len(said) == 1 else None
    return thing


# ------------------------------------------------------------------------------------------ judging


def matches(scene: Scene, text: str) -> bool:
    """True if `text` has every attribute of every object right, no object more, the background, and
    if what it says about the count and about relations is true."""
    said = parse_description(text)
    return (
        sorted(o.attributes for o in scene.objects)
        == sorted(tuple(w or "" for w in o) for o in said.objects)
        and said.background == scene.background
        and said.count in (None, len(scene.objects))
        and all(_holds(scene, *relation) for relation in said.relations)
    )


def attribute_score(scene: Scene, text: str) -> float:
    """Share of attributes that `text` has right, 0 to 1: four of each object and the background.
    Objects are paired so that the share is largest; an object too many counts as four attributes
    wrong."""
    said = parse_description(text)
    true = [o.attributes for o in scene.objects]
    right = [
        [sum(a == b for a, b in zip(t, s, strict=True)) for s in said.objects[:12]] for t in true
    ]
    columns = max(len(said.objects[:12]), len(true))
    right = [row + [0] * (columns - len(row)) for row in right]
    best = max(
        sum(right[i][j] for i, j in enumerate(order))
        for order in itertools.permutations(range(columns), len(true))
    )
    total = 4 * max(len(true), len(said.objects)) + 1
    return (best + (said.background == scene.background)) / total


def _holds(scene: Scene, first: str, relation: str, second: str) -> bool:
    """Whether the relation is true of two objects that its words single out, judged by rows and
    columns of the grid."""
    found = []
    for words in (first, second):
        stated = {_WORDS[w][1] for w in words.split()}
        fitting = [o for o in scene.objects if stated <= set(o.attributes[:3])]
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
