"""The benchmark `shapes`, and its expressions in RefCOCO's layout."""

import numpy as np
import pytest
from helpers import shapes_as_refcoco

from minigpt4_jax.evaluation.benchmarks import find, shapes
from minigpt4_jax.evaluation.task import open_tasks
from minigpt4_jax.processing.boxes import format_box
from minigpt4_jax.shapes.dataset import read_scenes, write_dataset
from minigpt4_jax.shapes.text import description

COUNT = 6


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    write_dataset(
        folder / "shapes", train=0, heldout=COUNT, heldout_pairs=1, size=56, progress=False
    )
    return folder


def test_true_answers_have_all_points_and_others_none(root):
    rows = find("shapes").read(root / "shapes", "heldout")
    right = find("shapes").judge(rows, [row.truth.question.answer for row in rows])
    assert right.score == 100
    assert right.original == dict.fromkeys((*shapes.EVALUATED_TASKS, shapes.PRESENCE), 100)
    assert find("shapes").judge(rows, [""] * len(rows)).score == 0
    assert find("shapes").headline(right.per_row) == 100


def test_presence_asks_about_an_object_that_is_there_and_one_that_is_not(root):
    rows = find("shapes").read(root / "shapes", "heldout")
    presence = [row for row in rows if row.group == shapes.PRESENCE]
    assert [row.truth.question.answer for row in presence] == ["yes", "no"] * COUNT
    measures = find("shapes").judge(rows, ["yes"] * len(rows)).extra["files"][shapes.PRESENCE]
    assert (measures["precision"], measures["recall"], measures["yes_ratio"]) == (0.5, 1, 1)


def test_descriptions(root):
    rows = find("shapes_description").read(root / "shapes", "heldout")
    texts = [description(row.truth, np.random.default_rng(0)) for row in rows[:-1]]
    result = find("shapes_description").judge(rows, [*texts, "nothing"])
    assert result.score == pytest.approx(100 * (COUNT - 1) / COUNT)


def test_images_are_found_below_the_data_root(root):
    (task,) = open_tasks(["shapes"], root, ["heldout_pairs"])
    assert all(task.image(row).is_file() for row in task.rows)


def test_refcoco_of_the_same_expressions_has_the_same_score(root, tmp_path):
    """The original's reading and IoU agree with those of the demonstration where answers are boxes."""
    (task,) = open_tasks(["shapes"], root, ["heldout"])
    refer = shapes_as_refcoco.write(task, tmp_path)
    rng, answers = np.random.default_rng(0), []
    for row in refer:
        side, (x1, y1, x2, y2) = row.truth.scene.image_size, row.truth.question.box
        shift = rng.uniform(-0.4, 0.4) * (x2 - x1)
        left, right = np.clip([x1 + shift, x2 + shift], 0, side)
        answers.append(format_box((left, y1, right, y2), side, side))
    (as_refcoco,) = open_tasks(["refcoco"], tmp_path, ["val"])
    assert [row.question for row in as_refcoco.rows] == [row.question for row in refer]
    for row, original in zip(as_refcoco.rows, refer, strict=True):
        assert as_refcoco.image(row).read_bytes() == task.image(original).read_bytes()
    want = find("shapes").judge(refer, answers)
    got = find("refcoco").judge(as_refcoco.rows, answers)
    assert got.score == pytest.approx(want.original["refer"])
    assert 0 < got.score < 100
    assert [row["score"] for row in got.per_row] == [row["score"] for row in want.per_row]


def test_scenes_of_the_dataset_are_read_in_order(root):
    names = [path.stem for path, _ in read_scenes(root / "shapes" / "heldout")]
    rows = find("shapes").read(root / "shapes", "heldout")
    assert list(dict.fromkeys(row.id.rsplit("_", 1)[0] for row in rows)) == names
