"""The referring expressions of the generated dataset `shapes`, written in RefCOCO's layout."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from minigpt4_jax.evaluation.benchmark import Row
from minigpt4_jax.evaluation.task import Task


def write(task: Task, root: Path) -> list[Row]:
    """refcoco/refcoco/refcoco_val.json and coco/train2014 below a data root, of the questions of a task of
    `shapes` that ask for a box. Returns these rows, in the order of the file.

    The pictures keep their pixels: they are PNG files with the names of RefCOCO's JPEG files."""
    rows = [row for row in task.used_rows if row.group == "refer"]
    entries, numbers = [], {}
    for k, row in enumerate(rows):
        source = task.image(row)
        number = numbers.setdefault(source, len(numbers))
        name = f"COCO_train2014_{number:012d}"
        entries.append({"img_id": f"{name}_{k}", "sents": _phrase(row), **_true_box(row)})
        picture = root / "coco" / "train2014" / f"{name}.jpg"
        picture.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, picture)
    file = root / "refcoco" / "refcoco" / "refcoco_val.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(entries))
    return rows


def _phrase(row: Row) -> str:
    return row.question.rsplit(" location of ", 1)[1]


def _true_box(row: Row) -> dict[str, int | Sequence[float]]:
    side, (x1, y1, x2, y2) = row.truth.scene.image_size, row.truth.question.box
    return {"bbox": [x1, y1, x2 - x1, y2 - y1], "height": side, "width": side}
