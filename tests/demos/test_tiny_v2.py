"""Parts of tiny_v2; `python -m minigpt4_jax.tiny_v2` runs all of it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minigpt4_jax.data.json_records import read_sources
from minigpt4_jax.demos import tiny_v2
from minigpt4_jax.errors import UserError
from minigpt4_jax.evaluation.benchmarks import shapes as benchmark
from minigpt4_jax.evaluation.task import open_tasks
from minigpt4_jax.shapes.dataset import read_scenes, write_dataset
from minigpt4_jax.shapes.scene import scene_at
from minigpt4_jax.shapes.tasks import TaskQuestion, task_questions
from minigpt4_jax.training.config_cli import read_config_file
from minigpt4_jax.training.config_values import from_mapping

SCENE = scene_at(3, 1, counts=(3,))


def questions_of(task):
    return [a for a in task_questions(SCENE, np.random.default_rng(0)) if a.task == task]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny_v2") / "shapes"
    write_dataset(out, train=40, heldout=12, heldout_pairs=1, size=56, progress=False)
    return out


def test_training_reads_the_rows_it_is_given(shapes, monkeypatch):
    monkeypatch.setattr(
        tiny_v2, "PHASES", (({"grounding": 8, "caption": 8}, (1,)), ({"vqa": 12}, (2, 3)))
    )
    out = shapes.parent / "rows.jsonl"
    tiny_v2.write_rows(shapes / "train", out, 0)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    examples = read_sources(out)
    assert len(examples) == 20 and Path(examples[0].images[0]).is_file()
    scenes = {path.name: scene for path, scene in read_scenes(shapes / "train")}
    for row, example in zip(rows, examples, strict=True):
        scene = scenes[Path(row["image"]).name]
        texts = {
            (a.question, a.answer)
            for s in range(60)
            for a in task_questions(scene, np.random.default_rng(s))
        }
        questions = [q.removeprefix("<Img><ImageHere></Img> ") for q in example.questions]
        assert set(zip(questions, example.answers, strict=True)) <= texts
    turns = [len(example.questions) for example in examples[16:]]
    assert turns == [3, 3, 3, 3]


def test_the_phases_fill_the_steps_of_the_configuration(shapes):
    c = from_mapping(read_config_file("tiny_v2"))
    rows = tiny_v2.write_rows(shapes / "train", shapes.parent / "all.jsonl", 0)
    assert rows == c.steps * c.batch_size and not c.data.shuffle


@pytest.mark.parametrize("task", tiny_v2.EVALUATED_TASKS)
def test_the_true_answer_is_right_and_another_is_wrong(task):
    for a in questions_of(task):
        assert benchmark.score_answer(SCENE, a, a.answer) == 1
        assert benchmark.score_answer(SCENE, a, "") == 0
        assert benchmark.score_answer(SCENE, a, "a large thing at {<0><0><100><100>}") == 0


def test_grounding_scores_the_share_of_located_objects():
    (a,) = questions_of("grounding")
    phrases = a.answer.split(" and ")
    assert benchmark.score_answer(SCENE, a, " and ".join(phrases[:1] * 1)) == pytest.approx(1 / 3)
    moved = a.answer.replace(phrases[0].split("</p>")[1], " {<0><0><1><1>}")
    assert benchmark.score_answer(SCENE, a, moved) == pytest.approx(2 / 3)
    assert benchmark.score_answer(
        SCENE, a, a.answer + " <p>a cat</p> {<1><2><3><4>}"
    ) == pytest.approx(3 / 4)


def test_a_referred_box_needs_an_iou_over_one_half():
    refer = questions_of("refer")[0]
    x1, y1, x2, y2 = refer.box
    side = SCENE.image_size

    def box(width):
        hundredths = (100 * v / side for v in (x1, y1, x1 + width * (x2 - x1), y2))
        return "{" + "".join(f"<{round(v)}>" for v in hundredths) + "}"

    assert benchmark.score_answer(SCENE, refer, box(0.7)) == 1
    assert benchmark.score_answer(SCENE, refer, box(0.3)) == 0


def test_evaluation_has_every_task_and_a_few_vqa_questions():
    for index in range(10):
        scene = scene_at(3, index, "heldout")
        questions = benchmark.evaluation_questions(scene, index)
        counts = {task: sum(a.task == task for a in questions) for task in tiny_v2.EVALUATED_TASKS}
        assert counts["vqa"] == benchmark.VQA_QUESTIONS and counts["refer"] == len(scene.objects)
        assert counts["caption"] == counts["grounding"] == 1
        assert sum(counts.values()) == len(questions)


def test_the_scores_of_the_benchmark_are_tabled_and_shown(shapes, tmp_path):
    """refer and caption are answered right, everything else with nothing."""
    (task,) = open_tasks(["shapes"], shapes.parent, ["heldout"])
    rows = task.first_images(12).used_rows
    assert len({row.images for row in rows}) == 12
    texts = [row.truth.question.answer if row.group in ("refer", "caption") else "" for row in rows]
    result = benchmark.judge(rows, texts)
    scores = {"original": result.original, "per_row": result.per_row}
    assert tiny_v2.task_scores(scores) == {
        "refer": 1, "identify": 0, "vqa": 0, "caption": 1, "grounding": 0, "presence": 0
    }  # fmt: skip
    answers = tiny_v2.scored_answers(task, scores)
    assert [a.answer for a in answers] == texts and all(a.image.is_file() for a in answers)
    tiny_v2.write_sheet(answers, tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape[1] > 1200 and sheet.shape[0] > 6 * 240


def test_only_the_first_images_are_asked_about(shapes):
    (task,) = open_tasks(["shapes"], shapes.parent, ["heldout"])
    two = task.first_images(2)
    assert {row.images for row in two.used_rows} == {row.images for row in two.rows[: two.num_rows]}
    assert len({row.images for row in two.used_rows}) == 2
    assert two.rows[two.num_rows].images not in {row.images for row in two.used_rows}
    assert task.first_images(99).num_rows == len(task.rows)


def test_boxes_of_the_answer_or_else_of_the_question_are_drawn(shapes):
    path = read_scenes(shapes / "heldout")[0][0]
    with_box, bare = "{<10><10><90><90>}", TaskQuestion("vqa", "[vqa] how many?", "one")
    plain = tiny_v2.image_with_boxes(tiny_v2.ScoredAnswer(path, bare, "one", 1.0))
    drawn = tiny_v2.image_with_boxes(tiny_v2.ScoredAnswer(path, bare, with_box, 1.0))
    identify = TaskQuestion("identify", f"[identify] what is this {with_box}", "a circle")
    question = tiny_v2.image_with_boxes(tiny_v2.ScoredAnswer(path, identify, "a circle", 1.0))
    assert plain == path and drawn.size == question.size == (500, 500)
    assert np.array_equal(np.asarray(drawn), np.asarray(question))


def test_the_report_has_every_figure(capsys):
    figures = {"refer": 0.815, "identify": 0.5, "vqa": 0.25, "caption": 0.125, "grounding": 0.75,
               "presence": 0.5}  # fmt: skip
    results = {
        "before": {"heldout": dict.fromkeys(figures, 0.0)},
        "after": {"heldout": figures, "heldout_pairs": dict.fromkeys(figures, 1.0)},
    }
    tiny_v2.print_report({"results": results, "seconds": 1700.2, "seed": 3, "images": 60})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if line.startswith("refer")] == [
        ["refer", "0.0%", "81.5%", "100.0%"]
    ]
    assert "1700 seconds, seed 3, 60 held-out images" in lines[-1]


@pytest.mark.parametrize("wrong", ["--images=5", "--judged=0", "--judged=999"])
def test_wrong_numbers_change_nothing(monkeypatch, tmp_path, wrong):
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(sys, "argv", ["tiny_v2", f"--workdir={tmp_path}", wrong])
    with pytest.raises(UserError, match=wrong.split("=")[0]):
        tiny_v2.main()
    assert (tmp_path / "run").is_dir()
