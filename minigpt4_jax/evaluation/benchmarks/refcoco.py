"""RefCOCO, RefCOCO+ and RefCOCOg: where is what an expression names? (eval_ref.py)"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from minigpt4_jax.data.annotations import field_of, number_of, text_of
from minigpt4_jax.errors import UserError
from minigpt4_jax.evaluation.benchmark import Answer, Benchmark, DataFile, Result, Row
from minigpt4_jax.evaluation.benchmarks.common import of_paper, row_result
from minigpt4_jax.evaluation.layout import find_file, read_rows
from minigpt4_jax.evaluation.metrics import referring
from minigpt4_jax.evaluation.metrics.statistics import mean_percent

PICTURE_NAME = 27  # characters of img_id that name the picture; "_" and a number follow


class RefcocoTarget(NamedTuple):
    """expression: as annotated. box: x1, y1, x2, y2 in pixels of an image of width x height."""

    expression: str
    box: tuple[float, float, float, float]
    width: float
    height: float


def read(data: Path, split: str, *, name: str, splits: Sequence[str]) -> list[Row]:
    """{folder}/{name}/{name}_{split}.json or the same file directly in the folder: a list of {"img_id",
    "sents", "bbox" [x, y, w, h], "height", "width"}, an entry for each expression."""
    split = split or splits[0]
    if split not in splits:
        raise UserError(f"--split={split}: {name} has the splits {', '.join(splits)}")
    file = f"{name}_{split}.json"
    path = find_file(data, (f"{name}/{file}", file), name)
    rows = []
    for where, row in read_rows(path):
        image = text_of(row, "img_id", where)
        # "sents" as one text tells these files from the refs files of the RefCOCO authors
        target = RefcocoTarget(
            text_of(row, "sents", where), referring.true_box(_bbox(row, where)),
            number_of(row, "width", where), number_of(row, "height", where),
        )  # fmt: skip
        picture = f"coco/train2014/{image[:PICTURE_NAME]}.jpg"
        question = referring.question_of_round(target.expression, 0)
        rows.append(
            Row(
                image,
                question,
                (picture, picture.replace("train2014/COCO_train2014_", "train2017/")),
                target,
            )
        )
    return rows


def _bbox(row: dict[str, Any], where: str) -> list[float]:
    bbox = field_of(row, "bbox", where)
    numbers = [v for v in bbox if type(v) in (int, float)] if isinstance(bbox, list) else []
    if len(numbers) != 4 or len(bbox) != 4:
        raise UserError(f'{where}: "bbox" is {bbox!r:.60}; expected [x, y, width, height]')
    return numbers


def judge(rows: Sequence[Row], answers: Sequence[Answer]) -> Result:
    """Share of expressions whose box has an IoU above 0.5. An answer that is a list has the rounds of
    resampling, which `score` then follows."""
    rounds = [_rounds(answer) for answer in answers]
    resampled = any(isinstance(answer, list) for answer in answers)
    once = [_judge_row(row, r, resample=False) for row, r in zip(rows, rounds, strict=True)]
    original: dict[str, Any] = {"no_resample": _figures(once)}
    per_row = once
    if resampled:
        per_row = [_judge_row(row, r, resample=True) for row, r in zip(rows, rounds, strict=True)]
        original["resample"] = _figures(per_row)
    score = original["resample" if resampled else "no_resample"]["accuracy"]
    return Result(score, {"accuracy": score, **original}, {}, per_row)


def _figures(per_row: Sequence[dict[str, Any]]) -> dict[str, Any]:
    ious = [entry["iou"] for entry in per_row if entry["iou"] is not None]
    return {
        "accuracy": mean_percent([entry["hit"] for entry in per_row]),
        "mean_iou": sum(ious) / len(per_row),
        "dropped": sum(entry["kept_answer"] is None for entry in per_row),
        "unreadable": sum(entry["predicted_box"] is None for entry in per_row),
    }


def _rounds(answer: Answer) -> list[str]:
    rounds = answer if isinstance(answer, list) else [answer]
    texts = [text for text in rounds if isinstance(text, str)]
    if not texts or len(texts) != len(rounds):
        raise UserError(f"an answer is {answer!r}; expected text, or a list of the rounds' texts")
    return texts


def _judge_row(row: Row, rounds: Sequence[str], *, resample: bool) -> dict[str, Any]:
    target: RefcocoTarget = row.truth
    reading = referring.read_answers(rounds, resample=resample)
    box = iou = None
    if reading.answer is not None:
        box = referring.predicted_box(reading.answer, target.width, target.height)
        iou = referring.iou(box, target.box) if box else None
    hit = iou is not None and iou > referring.THRESHOLD
    return row_result(
        row, rounds[0] if len(rounds) == 1 else list(rounds), hit, hit=hit, iou=iou,
        kept_answer=reading.answer, accepted_in_round=reading.round, predicted_box=box,
        true_box=target.box, expression=target.expression,
    )  # fmt: skip


def _benchmark(name: str, title: str, published: dict[str, float]) -> Benchmark:
    splits = tuple(published)
    return Benchmark(
        name=name, title=title, kind="box", metric="accuracy at IoU 0.5", folder="refcoco",
        files=(DataFile((f"refcoco/{name}/{name}_{{split}}.json", f"refcoco/{name}_{{split}}.json"),
                        "eval_scripts/eval_data of github.com/Vision-CAIR/MiniGPT-4"),),
        images=(DataFile(("coco/train2014", "coco/train2017"),
                         "http://images.cocodataset.org/zips/train2014.zip"),),
        read=partial(read, name=name, splits=splits), judge=judge, splits=splits,
        published=tuple(of_paper(score, split) for split, score in published.items()),
    )  # fmt: skip


BENCHMARKS = (
    _benchmark("refcoco", "RefCOCO", {"val": 88.69, "testA": 91.65, "testB": 85.33}),
    _benchmark("refcoco+", "RefCOCO+", {"val": 79.97, "testA": 85.12, "testB": 74.45}),
    _benchmark("refcocog", "RefCOCOg", {"val": 84.44, "test": 84.66}),
)
