"""Texts about scenes of the dataset `shapes`: captions, descriptions, referring phrases, questions.

`short_caption` and `description` state everything that is in a scene. Texts have few tokens: most words
here are one token of SmolLM2's vocabulary.
"""

import itertools
from collections.abc import Callable

import numpy as np

from minigpt4_jax.shapes.scene import COLOR_NAMES, HELDOUT_PAIRS, SHAPES, Object, Scene

NUMBERS = ("no", "one", "two", "three")
RELATIONS = ("above", "below", "left of", "right of")
_OPPOSITE = dict(zip(RELATIONS, ("below", "above", "right of", "left of"), strict=True))
_RELATION_PHRASES = {
    "above": "above",
    "below": "below",
    "left of": "to the left of",
    "right of": "to the right of",
}

# --- captions ---------------------------------------------------------------------------------------


def short_caption(scene: Scene) -> str:
    """The caption for stage 1: every attribute in as few words as possible, always in the same wording."""
    objects = _join([f"a {object_name(o)} {o.cell}" for o in scene.objects])
    return f"{objects} on {background_name(scene)}"


def description(scene: Scene, rng: np.random.Generator) -> str:
    """A description for stage 2: the count, the background, every attribute of each object.

    One of four phrasings; in a tenth of the texts the first of them with a sentence about how two objects
    are arranged, if a relation is unambiguous.
    """
    relations = true_relations(scene)
    if not relations or rng.integers(10):
        return _PHRASINGS[rng.integers(len(_PHRASINGS))](scene)
    a, relation, b = relations[rng.integers(len(relations))]
    return f"{_PHRASINGS[0](scene)} The {a} is {_RELATION_PHRASES[relation]} the {b}."


def phrasings(scene: Scene) -> list[str]:
    """Every text that `description` may return for this scene."""
    plain = [phrase(scene) for phrase in _PHRASINGS]
    related = [
        f"{plain[0]} The {a} is {_RELATION_PHRASES[r]} the {b}."
        for a, r, b in true_relations(scene)
    ]
    return plain + related


def _shows(scene: Scene) -> str:
    things = _join([f"a {object_name(o)} {_at(o)}" for o in scene.objects])
    return f"The image shows {_count(scene)} on a {scene.background} background: {things}."


def _there_are(scene: Scene) -> str:
    verb = "is" if len(scene.objects) == 1 else "are"
    things = " ".join(f"A {object_name(o)} is {_at(o)}." for o in scene.objects)
    return f"There {verb} {_count(scene)} on a {scene.background} background. {things}"


def _background_last(scene: Scene) -> str:
    things = _join([f"a {object_name(o)} {_at(o)}" for o in scene.objects])
    subject = "It is" if len(scene.objects) == 1 else "They are"
    return f"I see {_count(scene)}: {things}. {subject} on a {scene.background} background."


def _background_first(scene: Scene) -> str:
    things = _join([f"the {object_name(o)} is {_at(o)}" for o in scene.objects])
    things = things[0].upper() + things[1:]
    return f"The background is {scene.background}, with {_count(scene)}. {things}."


_PHRASINGS: tuple[Callable[[Scene], str], ...] = (
    _shows,
    _there_are,
    _background_last,
    _background_first,
)


def object_name(thing: Object) -> str:
    """An object without its place: "small red circle"."""
    return f"{thing.size} {thing.color} {thing.shape}"


def _at(thing: Object) -> str:
    """The place with its preposition: "at the top left", "on the left", "in the center"."""
    preposition = {"left": "on", "right": "on", "center": "in"}.get(thing.cell, "at")
    return f"{preposition} the {thing.cell}"


def _count(scene: Scene) -> str:
    return f"{NUMBERS[len(scene.objects)]} shape{'s' * (len(scene.objects) > 1)}"


def background_name(scene: Scene) -> str:
    """What follows "on" in captions."""
    return "stripes" if scene.background == "striped" else scene.background


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


# --- relations --------------------------------------------------------------------------------------


def true_relations(scene: Scene) -> list[tuple[str, str, str]]:
    """(phrase, relation, phrase) of all pairs of objects in one row or column of the grid that have
    unambiguous phrases."""
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
    """The shortest phrase that fits only this object of the scene: "circle", "red circle" or "large red
    circle"; None if it takes its place to tell it apart."""
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
        (f"the {_unique_phrase(scene, o) or f'{object_name(o)} {_at(o)}'}", o.box)
        for o in scene.objects
    ]


# --- questions --------------------------------------------------------------------------------------


def questions(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """(question, short answer) pairs about colour, shape, size, place, count, background, existence and
    relation.

    Each has a single right answer; yes and no are equally likely.
    """
    found = [
        ("How many shapes are there?", NUMBERS[len(scene.objects)]),
        ("What is the background?", scene.background),
        _existence(scene, rng),
    ]
    for thing in scene.objects:
        found.append((f"What is {_at(thing)}?", f"a {object_name(thing)}"))
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
        phrase = _RELATION_PHRASES[relation if yes else _OPPOSITE[relation]]
        found.append((f"Is the {a} {phrase} the {b}?", "yes" if yes else "no"))
    return found


def _existence(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A question such as "Is there a red circle?" with its answer.

    A pair that is not there shares its colour or its shape with an object of the scene. It is never one of
    HELDOUT_PAIRS, which must not occur in training texts either.
    """
    yes = bool(rng.integers(2))
    pair = _present_pair(scene, rng) if yes else _absent_pair(scene, rng)
    return _existence_question(*pair), "yes" if yes else "no"


def presence_questions(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Two questions such as "Is there a red circle?": one about an object of the scene, and one about an
    object that is not there but shares its colour or its shape with one that is."""
    return [
        (_existence_question(*_present_pair(scene, rng)), "yes"),
        (_existence_question(*_absent_pair(scene, rng)), "no"),
    ]


def _present_pair(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    thing = scene.objects[rng.integers(len(scene.objects))]
    return thing.color, thing.shape


def _absent_pair(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    present = {(o.color, o.shape) for o in scene.objects}
    thing = scene.objects[rng.integers(len(scene.objects))]
    near = [(c, s) for c in COLOR_NAMES for s in SHAPES if (c == thing.color) != (s == thing.shape)]
    near = [pair for pair in near if pair not in present and pair not in HELDOUT_PAIRS]
    return near[rng.integers(len(near))]


def _existence_question(color: str, shape: str) -> str:
    article = "an" if color == "orange" else "a"
    return f"Is there {article} {color} {shape}?"
