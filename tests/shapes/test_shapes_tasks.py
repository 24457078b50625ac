"""Questions of every task about `shapes` scenes: answers are true, and training takes them in order."""

from collections import Counter

import numpy as np
import pytest

from minigpt4_jax.processing import tasks
from minigpt4_jax.processing.boxes import iou, parse_boxes
from minigpt4_jax.shapes.scene import HELDOUT_PAIRS, scene_at
from minigpt4_jax.shapes.tasks import SHORT, Phase, task_questions, training_rows


def all_questions(split="train", count=30):
    for index in range(count):
        scene = scene_at(3, index, split)
        yield scene, list(task_questions(scene, np.random.default_rng(index)))


@pytest.mark.smoke
def test_every_task_is_asked_as_the_original_writes_it():
    for scene, found in all_questions():
        counts = Counter(a.task for a in found)
        assert set(counts) == set(tasks.TASKS)
        assert counts["refer"] == counts["identify"] == len(scene.objects)
        assert all(a.question.startswith(f"[{a.task}] ") for a in found)


def test_boxes_of_answers_are_those_of_the_objects_that_are_meant():
    for scene, found in all_questions():
        side = scene.image_size
        for a in found:
            boxes = parse_boxes(a.answer, side, side)
            if a.task == "refer":
                ((_, box),) = boxes
                assert iou(box, a.box) > 0.8 and a.box in [o.box for o in scene.objects]
                thing = next(o for o in scene.objects if o.box == a.box)
                assert thing.shape in a.question
            elif a.task == "grounding":
                for (phrase, box), o in zip(boxes, scene.objects, strict=True):
                    assert phrase == f"a {o.size} {o.color} {o.shape}" and iou(box, o.box) > 0.8
                assert a.answer.endswith(("white", "black", "gray", "stripes"))
            elif a.task == "detection":
                phrase = a.question.removeprefix("[detection] ")
                meant = [o for o in scene.objects if f"{o.color} {o.shape}".endswith(phrase)]
                assert [p for p, _ in boxes] == [phrase] * len(meant) and meant


def test_identify_asks_with_an_objects_box_and_names_it():
    for scene, found in all_questions():
        side = scene.image_size
        for a in (a for a in found if a.task == "identify"):
            ((_, box),) = parse_boxes(a.question, side, side)
            thing = max(scene.objects, key=lambda o: iou(o.box, box))
            assert a.answer == f"a {thing.size} {thing.color} {thing.shape}"


def test_training_never_speaks_of_a_held_out_pair():
    for _, found in all_questions(count=60):
        for a in found:
            for color, shape in HELDOUT_PAIRS:
                assert f"{color} {shape}" not in f"{a.question} {a.answer}"


def test_a_batch_has_one_long_task_or_short_ones_in_turn():
    scenes = [scene_at(3, index) for index in range(60)]
    phases = [
        Phase({"caption": 16, "detection": 8}, (1,)),
        Phase({"vqa": 72, "refer": 48, "identify": 24, "grounding": 20}, (2, 3)),
    ]
    rows = training_rows(scenes, phases, batch=4, turns=3)
    assert len(rows) == 24 + 144 // 3 + 20
    assert Counter(a.task for _, (a,) in rows[:24]) == {"caption": 16, "detection": 8}
    short = [row for _, row in rows[24:] if row[0].task in SHORT]
    counts = Counter(a.task for row in short for a in row)
    assert len(short) == 48 and counts["vqa"] > counts["refer"] > counts["identify"] > 0
    assert all(len(row) <= 3 and len(set(row)) == len(row) for row in short)
    for k in range(0, len(rows), 4):
        present = {a.task for _, row in rows[k : k + 4] for a in row}
        assert len(present) == 1 or present <= set(SHORT)
        counts = {len(scenes[i].objects) for i, _ in rows[k : k + 4]}
        assert counts == {1} if k < 24 else counts in ({2}, {3})
    kinds = [row[0].task in SHORT for _, row in rows[24::4]]
    assert kinds != sorted(kinds) and kinds != sorted(kinds, reverse=True)  # mixed
    assert training_rows(scenes, phases, 4, 3) == rows
    assert training_rows(scenes, phases, 4, 3, seed=1) != rows


def test_no_turn_of_a_row_tells_another_ones_box():
    scenes = [scene_at(3, index) for index in range(60)]
    rows = training_rows(scenes, [Phase({"refer": 120, "identify": 120}, (2, 3))], 4, 3)
    for _, row in rows:
        boxes = [a.box for a in row]
        assert len(set(boxes)) == len(boxes) and None not in boxes
    assert {len(row) for _, row in rows} == {2, 3}
