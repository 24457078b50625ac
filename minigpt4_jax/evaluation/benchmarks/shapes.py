"""`shapes`, the generated dataset: MiniGPT-v2's tasks, presence of objects, and descriptions.

The demonstrations `tiny_v2` and `quickstart` take their figures from here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minigpt4_jax.errors import UserError
from minigpt4_jax.evaluation.benchmark import Answer, Benchmark, DataFile, Result, Row
from minigpt4_jax.evaluation.benchmarks.common import row_result
from minigpt4_jax.evaluation.metrics import yes_no
from minigpt4_jax.evaluation.metrics.statistics import mean_percent
from minigpt4_jax.evaluation.predictions import texts
from minigpt4_jax.processing import tasks
from minigpt4_jax.processing.boxes import iou, parse_boxes
from minigpt4_jax.processing.chat_templates import STAGE2_PROMPTS
from minigpt4_jax.shapes.claims import attribute_score, matches
from minigpt4_jax.shapes.dataset import read_scenes
from minigpt4_jax.shapes.scene import Scene
from minigpt4_jax.shapes.tasks import TaskQuestion, task_questions
from minigpt4_jax.shapes.text import presence_questions

SPLITS = ("heldout", "heldout_pairs")
EVALUATED_TASKS = ("refer", "identify", "vqa", "caption", "grounding")
PRESENCE = "presence"  # is an object there? One that is and one that is not, of each scene
VQA_QUESTIONS = 4  # of each image
NEW_TOKENS, DESCRIPTION_TOKENS = 96, 72


class ShapesTarget(NamedTuple):
    """A question about a scene with its true answer."""

    scene: Scene
    question: TaskQuestion


def read(data: Path, split: str) -> list[Row]:
    """All questions about the images of a split. data: the dataset's folder."""
    return [
        row
        for i, (path, scene) in enumerate(_scenes(data, split))
        for row in rows_of(path, scene, i)
    ]


def read_descriptions(data: Path, split: str) -> list[Row]:
    """The images of a split, to be described as in the second stage of training."""
    return description_rows(_scenes(data, split))


def description_rows(scenes: Sequence[tuple[Path, Scene]]) -> list[Row]:
    """A row for each (image, scene), in order."""
    return [Row(path.stem, STAGE2_PROMPTS[0], _places(path), scene) for path, scene in scenes]


def _scenes(data: Path, split: str) -> list[tuple[Path, Scene]]:
    split = split or SPLITS[0]
    if split not in SPLITS:
        raise UserError(f"--split={split}: shapes has the splits {', '.join(SPLITS)}")
    if not data.is_dir():
        draw = "python -m minigpt4_jax.shapes --out=DIR"
        raise UserError(f"--data={data}: there is no such folder; draw the dataset: {draw}")
    return read_scenes(data / split)


def _places(path: Path) -> tuple[str, ...]:
    """The path below the data root, or the path itself where the dataset is elsewhere."""
    return ("/".join(("shapes", *path.parts[-3:])), str(path.resolve()))


def rows_of(path: Path, scene: Scene, index: int) -> list[Row]:
    """The questions about one image, those of EVALUATED_TASKS first. index: of the image in its split."""
    questions = evaluation_questions(scene, index)
    rng = np.random.default_rng([index, 7])
    questions += [
        TaskQuestion(PRESENCE, tasks.vqa(question), answer)
        for question, answer in presence_questions(scene, rng)
    ]
    return [
        Row(
            f"{path.stem}_{k}",
            question.question,
            _places(path),
            ShapesTarget(scene, question),
            group=question.task,
        )
        for k, question in enumerate(questions)
    ]


def evaluation_questions(scene: Scene, seed: int) -> list[TaskQuestion]:
    """All questions of EVALUATED_TASKS about a scene, but of vqa only VQA_QUESTIONS."""
    rng = np.random.default_rng([seed, 5])
    questions = [q for q in task_questions(scene, rng) if q.task in EVALUATED_TASKS]
    vqa = [q for q in questions if q.task == "vqa"]
    chosen = set(rng.permutation(len(vqa))[:VQA_QUESTIONS].tolist())
    others = [q for q in questions if q.task != "vqa"]
    return others + [q for i, q in enumerate(vqa) if i in chosen]


def score_answer(scene: Scene, question: TaskQuestion, answer: str) -> float:
    """1 for a right answer, 0 for a wrong one; for grounding the share of objects named and located.

    refer: the first box has an IoU over 0.5 with the true one; caption: every attribute is right;
    vqa, identify and presence: the exact words.
    """
    if question.task == "caption":
        return float(matches(scene, answer))
    if question.task in ("vqa", "identify", PRESENCE):
        return float(answer.strip().lower() == question.answer.lower())
    side = scene.image_size
    boxes = parse_boxes(answer, side, side)
    if question.task == "refer" and question.box is not None:
        return float(bool(boxes) and iou(boxes[0][1], question.box) > 0.5)
    true_boxes = parse_boxes(question.answer, side, side)
    hits = sum(
        any(p == phrase and iou(b, box) > 0.5 for p, b in boxes) for phrase, box in true_boxes
    )
    return hits / max(len(true_boxes), len(boxes))


def judge(rows: Sequence[Row], answers: Sequence[Answer]) -> Result:
    """The mean score of each task. score: their mean. Presence is also judged as POPE is."""
    given = texts(answers, "shapes")
    scores = [
        score_answer(row.truth.scene, row.truth.question, answer)
        for row, answer in zip(rows, given, strict=True)
    ]
    per_row = [_entry(row, answer, s) for row, answer, s in zip(rows, given, scores, strict=True)]
    by_task = _by_task(per_row)
    extra: dict[str, Any] = {}
    presence = [entry for entry in per_row if "label" in entry]
    if presence:
        readings = [entry["reading"] for entry in presence]
        labels = [entry["label"] for entry in presence]
        extra["files"] = {PRESENCE: yes_no.measures(readings, labels)}

    return Result(headline(per_row), by_task, {}, per_row, extra)


def headline(per_row: Sequence[Mapping[str, Any]]) -> float:
    """The mean of the tasks' mean scores, in percent."""
    by_task = _by_task(per_row)
    return sum(by_task.values()) / len(by_task)


def _by_task(per_row: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    scores: dict[str, list[float]] = {}
    for entry in per_row:
        scores.setdefault(entry["group"], []).append(entry["score"] / 100)
    return {task: mean_percent(values) for task, values in scores.items()}


def _entry(row: Row, answer: str, score: float) -> dict[str, Any]:
    target: ShapesTarget = row.truth
    fields: dict[str, Any] = {"truth": target.question.answer, "group": row.group}
    if row.group == PRESENCE:
        fields |= {"label": target.question.answer, "reading": yes_no.read_pope(answer)}
    if row.group == "refer":
        side = target.scene.image_size
        boxes = parse_boxes(answer, side, side)
        fields |= {"true_box": target.question.box, "predicted_box": boxes[0][1] if boxes else None}
    return row_result(row, answer, score, **fields)


def judge_descriptions(rows: Sequence[Row], answers: Sequence[Answer]) -> Result:
    """score: the share of images of which every attribute is described rightly; attributes: the share of
    right attributes."""
    given = texts(answers, "shapes_description")
    pairs = [(row.truth, answer) for row, answer in zip(rows, given, strict=True)]
    exact = [matches(scene, answer) for scene, answer in pairs]
    attributes = [attribute_score(scene, answer) for scene, answer in pairs]
    per_row = [
        row_result(row, answer, hit, attributes=share)
        for row, answer, hit, share in zip(rows, given, exact, attributes, strict=True)
    ]
    figures: Mapping[str, float] = {
        "exact": mean_percent(exact), "attributes": mean_percent(attributes),
    }  # fmt: skip
    return Result(figures["exact"], figures, {}, per_row)


_FILES = (
    DataFile(("shapes/{split}/scenes.jsonl",), "python -m minigpt4_jax.shapes --out=DATA/shapes"),
)
BENCHMARKS = (
    Benchmark(
        name="shapes", title="shapes, tasks", kind="text", metric="mean over tasks", folder="shapes",
        files=_FILES, images=(), read=read, judge=judge, splits=SPLITS, max_new_tokens=NEW_TOKENS,
        headline=headline,
    ),
    Benchmark(
        name="shapes_description", title="shapes, descriptions", kind="caption",
        metric="images entirely right", folder="shapes", files=_FILES, images=(),
        read=read_descriptions, judge=judge_descriptions, splits=SPLITS,
        max_new_tokens=DESCRIPTION_TOKENS,
    ),
)  # fmt: skip
