"""Questions of every task about `shapes` scenes: answers are true, and training takes them in order."""

from collections import Counter

import numpy as np
import pytest

from minigpt4_jax import tasks
from minigpt4_jax.boxes import iou, parse_boxes
from minigpt4_jax.data.shapes import HELDOUT_PAIRS, scene_at
from minigpt4_jax.data.shapes_tasks import Phase, asked, training_rows


def all_asked(split="train", count=30):
    for index in range(count):
        scene = scene_at(3, index, split)
        yield scene, list(asked(scene, np.random.default_rng(index)))


@pytest.mark.smoke
def test_every_task_is_asked_as_the_original_writes_it():
    for scene, found in all_asked():
        counts = Counter(a.task for a in found)
        assert set(counts) == set(tasks.TASKS)
        assert counts["refer"] == counts["identify"] == len(scene.objects)
        assert all(a.question.startswith(f"[{a.task}] ") for a in found)


def test_boxes_of_answers_are_those_of_the_objects_that_are_meant():
    for scene, found in all_asked():
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
    for scene, found in all_asked():
        side = scene.image_size
        for a in (a for a in found if a.task == "identify"):
            ((_, box),) = parse_boxes(a.question, side, side)
            thing = max(scene.objects, key=lambda o: iou(o.box, box))
            assert a.answer == f"a {thing.size} {thing.color} {thing.shape}"


def test_training_never_speaks_of_a_held_out_pair():
    for _, found in all_asked(count=60):
        for a in found:
            for color, shape in HELDOUT_PAIRS:
                assert f"{color} {shape}" not in f"{a.question} {a.answer}"


def test_a_batch_has_one_task_and_scenes_with_as_many_objects():
    scenes = [scene_at(3, index) for index in range(60)]
    phases = [
        Phase({"caption": 16, "refer": 8}, (1,)), Phase({"vqa": 40, "grounding": 20}, (2, 3))
    ]  # fmt: skip
    rows = training_rows(scenes, phases, batch=4)
    assert Counter(a.task for _, a in rows[:24]) == {"caption": 16, "refer": 8}
    assert Counter(a.task for _, a in rows[24:]) == {"vqa": 40, "grounding": 20}
    for k in range(0, len(rows), 4):
        assert len({a.task for _, a in rows[k : k + 4]}) == 1
        counts = {len(scenes[i].objects) for i, _ in rows[k : k + 4]}
        assert counts == {1} if k < 24 else counts in ({2}, {3})
    tasks_in_order = [rows[k][1].task for k in range(24, 84, 4)]
    assert tasks_in_order != sorted(tasks_in_order)  # mixed
    assert training_rows(scenes, phases, batch=4) == rows
    assert training_rows(scenes, phases, batch=4, seed=1) != rows


def test_a_scene_comes_again_after_all_others_and_is_asked_something_else():
    scenes = [scene_at(3, index, counts=(2,)) for index in range(4)]
    rows = training_rows(scenes, [Phase({"vqa": 40}, (2,))], batch=4)
    assert [i for i, _ in rows] == [0, 1, 2, 3] * 10
    assert len({a.question for i, a in rows if i == 0}) > 3
