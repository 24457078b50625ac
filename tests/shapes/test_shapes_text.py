"""Texts of the dataset `shapes`: descriptions of scenes, and how answers are parsed and scored."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_jax.shapes import claims
from minigpt4_jax.shapes import scene as shapes_scene
from minigpt4_jax.shapes import text as shapes_text
from minigpt4_jax.shapes.scene import BACKGROUNDS, CELLS, COLOR_NAMES, SHAPES, SIZES, SPLITS


def scenes(count, split="train", seed=7, **kwargs):
    return [shapes_scene.scene_at(seed, i, split, **kwargs) for i in range(count)]


def all_splits(count, **kwargs):
    return [scene for split in SPLITS for scene in scenes(count, split, **kwargs)]


def _single(attributes):
    size, color, shape, cell, background = attributes
    thing = shapes_scene.Object(shape, color, size, cell, (0, 0, 1, 1), 0.0, (0, 0, 0))
    return shapes_scene.Scene((thing,), background)


def test_captions_are_right_and_not_long():
    for scene in all_splits(200):
        for text in [shapes_text.short_caption(scene), *shapes_text.phrasings(scene)]:
            assert claims.matches(scene, text), text
            assert claims.attribute_score(scene, text) == 1, text
            said = claims.parse_description(text)
            assert said.background == scene.background
            assert said.count == (
                None if text == shapes_text.short_caption(scene) else len(scene.objects)
            )
            assert len(text.split()) <= 50
        assert len(shapes_text.short_caption(scene).split()) <= 7 * len(scene.objects) + 2


def test_wording():
    cases = [
        shapes_scene.Object("circle", "red", "large", "top left", (0, 0, 9, 9), 0, (0, 0, 0)),
        shapes_scene.Object("square", "blue", "small", "bottom left", (0, 90, 9, 99), 0, (0, 0, 0)),
        shapes_scene.Object(
            "square", "orange", "small", "bottom right", (90, 90, 99, 99), 0, (0, 0, 0)
        ),
    ]
    scene = shapes_scene.Scene(tuple(cases), "striped")
    assert shapes_text.short_caption(scene) == (
        "a large red circle top left, a small blue square bottom left and "
        "a small orange square bottom right on stripes"
    )
    assert shapes_text.phrasings(scene)[-1] == (
        "The image shows three shapes on a striped background: a large red circle at the top left, "
        "a small blue square at the bottom left and a small orange square at the bottom right. "
        "The orange square is to the right of the blue square."
    )
    assert [phrase for phrase, _ in shapes_text.references(scene)] == [
        *("the circle", "the blue square", "the orange square"),
    ]
    one = shapes_scene.Scene(tuple(cases[:1]), "black")
    assert shapes_text.phrasings(one) == [
        "The image shows one shape on a black background: a large red circle at the top left.",
        "There is one shape on a black background. A large red circle is at the top left.",
        "I see one shape: a large red circle at the top left. It is on a black background.",
        "The background is black, with one shape. The large red circle is at the top left.",
    ]


def test_descriptions_use_every_phrasing():
    rng = np.random.default_rng(0)
    scene = next(s for s in scenes(100) if shapes_text.true_relations(s))
    assert {shapes_text.description(scene, rng) for _ in range(200)} == set(
        shapes_text.phrasings(scene)
    )


def changed_scenes(scene):
    """Every scene that differs in one attribute, in the background, or in lacking one object."""
    for background in BACKGROUNDS:
        yield dataclasses.replace(scene, background=background)
    for i, thing in enumerate(scene.objects):
        taken = {o.cell for o in scene.objects}
        for name, values in (("color", COLOR_NAMES), ("shape", SHAPES), ("size", SIZES)):
            for value in values:
                yield _replaced(scene, i, dataclasses.replace(thing, **{name: value}))
        for cell in set(CELLS) - taken:
            yield _replaced(scene, i, dataclasses.replace(thing, cell=cell))
        if len(scene.objects) > 1:
            left = scene.objects[:i] + scene.objects[i + 1 :]
            yield dataclasses.replace(scene, objects=left)


def _replaced(scene, i, thing):
    objects = list(scene.objects)
    objects[i] = thing
    objects.sort(key=lambda o: CELLS.index(o.cell))
    return dataclasses.replace(scene, objects=tuple(objects))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(SPLITS))
def test_any_single_change_is_noticed(index, split):
    scene = shapes_scene.scene_at(1, index, split)
    for other in changed_scenes(scene):
        if shapes_scene.signature(other) == shapes_scene.signature(scene):
            continue
        for text in [shapes_text.short_caption(other), *shapes_text.phrasings(other)]:
            assert not claims.matches(scene, text), text
            assert claims.attribute_score(scene, text) < 1, text


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.data())
def test_a_false_count_or_relation_is_noticed(index, data):
    scene = shapes_scene.scene_at(2, index)
    text = data.draw(st.sampled_from(shapes_text.phrasings(scene)))
    number = shapes_text.NUMBERS[len(scene.objects)]
    other = data.draw(st.sampled_from([w for w in ("one", "two", "three", "four") if w != number]))
    assert not claims.matches(scene, text.replace(f"{number} shape", f"{other} shape"))
    for said in ("above", "below", "to the left of", "to the right of"):
        for instead in ("above", "below", "to the left of", "to the right of"):
            if said != instead and f" {said} the " in text:
                assert not claims.matches(scene, text.replace(f" {said} the ", f" {instead} the "))


def test_a_text_cut_short_does_not_match():
    for scene in scenes(60):
        for text in [*shapes_text.phrasings(scene)[:4], shapes_text.short_caption(scene)]:
            words = text.rstrip(".").split()
            stop = len(words) - (2 if words[-2] == "on" else 1)
            for k in range(stop):
                assert not claims.matches(scene, " ".join(words[:k])), " ".join(words[:k])


@pytest.mark.parametrize(
    "text",
    [
        "A large red circle is in the top-left corner. The background is black.",
        "There is 1 object on a plain black background: a big red circle at the top left.",
        "On black there's a single shape. At the top left, a large red circle.",
        "a large red circle top left on black",
    ],
)
def test_near_wordings_are_understood(text):
    scene = _single(("large", "red", "circle", "top left", "black"))
    assert claims.matches(scene, text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle top left on black",
        "a large red circle on black",
        "a large red circle top left",
        "a large red circle top left and a small green on black",
        "a large red blue circle top left on black",
        "a large red circle top left on black and a large red circle top left",
        "a large crimson circle top left on black",
        "a large red circle top left on black on white",
        "a large red circle top left left on black",
        "A large red circle is at the top left. A star is on a black background.",
        "Two shapes: a large red circle top left on black",
        "No shapes: one shape, a large red circle top left on black",
        "A large red circle is at the top left. The circle is above the square. On black.",
    ],
)
def test_faults_are_noticed(text):
    scene = _single(("large", "red", "circle", "top left", "black"))
    assert not claims.matches(scene, text)


_FILLING = (
    ". , : the a at on in is are and background shape shapes above below to of left right 7 ٣ \n"
)
_VOCABULARY = [*SIZES, *COLOR_NAMES, *SHAPES, *CELLS, *BACKGROUNDS, *_FILLING.split(" ")]


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from(_VOCABULARY)).map(" ".join)))
def test_reading_never_fails(text):
    said = claims.parse_description(text)
    assert isinstance(said.objects, tuple)
    for scene in scenes(3):
        score = claims.attribute_score(scene, text)
        assert 0 <= score <= 1
        assert score == 1 or not claims.matches(scene, text)


def test_score_counts_attributes():
    scene = _single(("large", "red", "circle", "top left", "black"))
    assert claims.attribute_score(scene, "") == 0
    assert claims.attribute_score(scene, "a large blue circle top left on black") == 4 / 5
    assert claims.attribute_score(scene, "a small blue ring top left on white") == 1 / 5
    two = "a large red circle top left and a small blue ring top on black"
    assert claims.attribute_score(scene, two) == 5 / 9
    assert claims.attribute_score(scene, "a small red ring left. " * 40 + two) < 0.1


def _answer(scene, question):
    """The answer to a question, worked out another way than the questions are made."""
    words = question.rstrip("?").replace(" an ", " a ").split()
    name = question.rstrip("?")
    things = scene.objects

    def the(phrase):
        found = [o for o in things if set(phrase.split()) <= {o.size, o.color, o.shape}]
        assert len(found) == 1, question
        return found[0]

    if name == "How many shapes are there":
        return shapes_text.NUMBERS[len(things)]
    if name == "What is the background":
        return scene.background
    if name.startswith("Is there a"):
        return "yes" if any((o.color, o.shape) == tuple(words[3:]) for o in things) else "no"
    if name.startswith("What is "):
        (there,) = [o for o in things if o.cell == name.split(" the ")[1]]
        return f"a {there.size} {there.color} {there.shape}"
    if name.startswith("What shape"):
        return the(words[4]).shape
    if name.startswith("What color"):
        return the(words[4]).color
    if name.startswith("Where"):
        return the(" ".join(words[3:])).cell
    if name.endswith("small or large"):
        return the(" ".join(words[2:-3])).size
    for said, holds in {
        " above the ": lambda a, b: a.box[3] < b.box[1],
        " below the ": lambda a, b: a.box[1] > b.box[3],
        " to the left of the ": lambda a, b: a.box[2] < b.box[0],
        " to the right of the ": lambda a, b: a.box[0] > b.box[2],
    }.items():
        if said in name:
            a, b = name.removeprefix("Is the ").split(said)
            return "yes" if holds(the(a), the(b)) else "no"
    raise AssertionError(question)


def test_answers_are_right_and_balanced():
    rng = np.random.default_rng(0)
    verdicts = {"Is there": [], "Is the ": []}
    for scene in all_splits(500):
        asked = shapes_text.questions(scene, rng)
        assert len({q for q, _ in asked}) == len(asked) >= 4
        for question, answer in asked:
            assert answer == _answer(scene, question), question
            if answer in ("yes", "no"):
                verdicts[question[: 8 if "Is there" in question else 7]].append(answer)
    for answers in verdicts.values():
        assert len(answers) > 300
        assert answers.count("yes") / len(answers) == pytest.approx(0.5, abs=0.06)


def test_training_text_never_names_a_heldout_pair():
    rng = np.random.default_rng(0)
    forbidden = [f"{color} {shape}" for color, shape in shapes_scene.HELDOUT_PAIRS]
    for scene in scenes(600) + scenes(200, "heldout"):
        texts = [t for pair in shapes_text.questions(scene, rng) for t in pair]
        texts += [shapes_text.short_caption(scene), *shapes_text.phrasings(scene)]
        for text in texts:
            assert not any(pair in text for pair in forbidden), text


def test_references_single_out_their_object():
    for scene in all_splits(200):
        found = shapes_text.references(scene)
        assert [box for _, box in found] == [o.box for o in scene.objects]
        assert len({phrase for phrase, _ in found}) == len(scene.objects)
        for (phrase, _), thing in zip(found, scene.objects, strict=True):
            words = set(phrase.replace("the ", "").split()) & {*SIZES, *COLOR_NAMES, *SHAPES}
            fitting = [o for o in scene.objects if words <= set(o.attributes[:3])]
            assert thing in fitting
            assert len(fitting) == 1 or phrase.endswith(thing.cell)
