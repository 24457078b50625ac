"""The rows that a report shows: which, and their pictures with boxes."""

import base64
import io
import random
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.images import open_image

WIDTH = 300  # pixels of a picture
PREDICTED, TRUE = (214, 40, 40), (22, 140, 70)

ScoreRow = Mapping[str, Any]  # an entry of scores.json's per_row


class ShownRow(NamedTuple):
    """picture: a data URL; "" without one."""

    id: str
    question: str
    answer: str
    truth: str
    score: float
    picture: str
    note: str


def worst(rows: Sequence[ScoreRow], count: int, *, higher_is_better: bool) -> list[ScoreRow]:
    """The rows with the worst scores, without right ones; of equal ones those with an error, then with the
    least IoU first, then in an order that mixes images."""
    right = 100.0 if higher_is_better else 0.0

    def key(row: ScoreRow) -> tuple[float, bool, float, int]:
        score = row["score"] if higher_is_better else -row["score"]
        mixed = zlib.crc32(str(row["id"]).encode())
        return score, "error" not in row, row.get("iou") or 0.0, mixed

    wrong = [row for row in rows if row["score"] != right or "error" in row]
    return sorted(wrong, key=key)[:count]


def sample(rows: Sequence[ScoreRow], count: int, seed: int = 0) -> list[ScoreRow]:
    """A random sample, the same for every report."""
    return random.Random(seed).sample(list(rows), min(count, len(rows)))


def show(row: ScoreRow) -> ShownRow:
    """A row of scores.json as a report shows it."""
    answer = row["answer"]
    if isinstance(answer, list) and row.get("kept_answer"):
        answer = row["kept_answer"]
    if isinstance(answer, dict) and "chosen" in row:
        answer = f"{row['chosen']} (losses {_text(answer)})"
    iou = row.get("iou")
    note = row.get("error", "") or ("" if iou is None else f"IoU {iou:.2f}")
    if row.get("hallucinated"):
        note = f"not in the image: {', '.join(row['hallucinated'])}"
    return ShownRow(
        str(row["id"]), str(row.get("question", "")), _text(answer), _text(row.get("truth", "")),
        row["score"], _picture(row), note,
    )  # fmt: skip


def _text(value: Any) -> str:
    if isinstance(value, dict):  # losses
        return ", ".join(f"{loss:.3f}" for loss in value.get("losses", []))
    return " | ".join(map(str, value)) if isinstance(value, list) else str(value)


def _picture(row: ScoreRow) -> str:
    """The image of a row with its predicted and true box, as a data URL; "" if it cannot be read."""
    if not row.get("image"):
        return ""
    try:
        picture = open_image(Path(row["image"]))
    except UserError:
        return ""
    scale = WIDTH / picture.width
    picture = picture.resize(
        (WIDTH, max(1, round(picture.height * scale))), Image.Resampling.BICUBIC
    )
    draw = ImageDraw.Draw(picture)
    for name, color in (("true_box", TRUE), ("predicted_box", PREDICTED)):
        if box := row.get(name):
            x1, y1, x2, y2 = (scale * v for v in box)
            draw.rectangle(
                (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)), outline=color, width=2
            )
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
