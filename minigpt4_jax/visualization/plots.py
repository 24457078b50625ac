"""Draws contact sheets (images beside a model's answers) and loss curves."""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from minigpt4_jax.errors import UserError
from minigpt4_jax.storage.atomic import write_error
from minigpt4_jax.visualization.drawing import save_picture, truncate_text, wrap_text
from minigpt4_jax.visualization.fonts import load_font

_RIGHT, _WRONG, _NEUTRAL = (22, 140, 70), (205, 42, 42), (150, 150, 150)
_TEXT, _MUTED, _BACKGROUND, _CARD_COLOR = (
    (28, 28, 32),
    (105, 105, 112),
    (240, 241, 244),
    (255, 255, 255),
)
_BORDER = (225, 225, 228)  # beside an image that is not square
_CURVES = ("#1f6fb4", "#d9741a", "#2b9348", "#a03c9a", "#8c6239", "#4a4a4a")
_VALIDATION_KEYS = ("val_loss", "valid_loss", "validation_loss", "eval_loss")

Picture = np.ndarray | Image.Image | str | os.PathLike[str]

# --- contact sheet ----------------------------------------------------------------------------------


def contact_sheet(
    images: Sequence[Picture | Sequence[Picture]],
    captions: Sequence[str],
    right: Sequence[bool | None],
    path: str | os.PathLike[str],
    *,
    truths: Sequence[str] | None = None,
    title: str = "",
    columns: int = 2,
    side: int = 168,
) -> Path:
    """Save a PNG with every image, `side` pixels wide, beside its caption; returns its path.

    images: uint8 arrays [H, W, 3], PIL images or files, of any size, or several beside one caption.
    right: whether a caption is right (green frame), wrong (red) or not evaluated (None, gray). truths:
    the true texts, written under wrong captions. UserError: the lists are empty or differ in length, or
    the file cannot be written.
    """
    lengths = {len(images), len(captions), len(right), len(images if truths is None else truths)}
    if lengths == {0} or len(lengths) > 1:
        raise UserError(
            f"contact sheet: {len(images)} images, {len(captions)} captions, {len(right)} verdicts"
            f"{'' if truths is None else f', {len(truths)} truths'}: expected one of each, and some"
        )
    text_width, gap = 380, 14
    cards = []
    for i, picture in enumerate(images):
        truth = truths[i] if truths is not None and right[i] is False else ""
        cards.append(_card(picture, captions[i], right[i], truth, side, text_width))
    columns = min(columns, len(cards))
    rows = [cards[i : i + columns] for i in range(0, len(cards), columns)]
    heights = [max(card.height for card in row) for row in rows]
    width = columns * (cards[0].width + gap) + gap
    heading = _heading(title, right)
    top = 58 if heading else gap
    sheet = Image.new("RGB", (width, top + sum(h + gap for h in heights)), _BACKGROUND)
    if heading:
        font = load_font(22)
        font.draw(
            ImageDraw.Draw(sheet),
            (gap + 4, 16),
            truncate_text(heading, width - 3 * gap, font),
            _TEXT,
        )
    for row, height in zip(rows, heights, strict=True):
        for i, card in enumerate(row):
            left = gap + i * (card.width + gap)
            sheet.paste(_CARD_COLOR, (left, top, left + card.width, top + height))
            sheet.paste(card, (left, top))
        top += height + gap
    return _save(path, lambda out: sheet.save(out, format="PNG"))


def _card(
    picture: Picture | Sequence[Picture],
    caption: str,
    right: bool | None,
    truth: str,
    side: int,
    text_width: int,
) -> Image.Image:
    """An image in a frame of its verdict's color, with its caption at the right."""
    color = _NEUTRAL if right is None else _RIGHT if right else _WRONG
    verdict = "" if right is None else "right" if right else "wrong"
    lines = [
        (line, _TEXT) for line in wrap_text(caption or "(nothing)", text_width, load_font(17), 9)
    ]
    if truth:
        lines += [
            (line, _MUTED) for line in wrap_text(f"true: {truth}", text_width, load_font(15), 4)
        ]
    gap = 8 if truth else 0
    frame, pad, line_height = 4, 10, 22
    text_top = pad + 4 + (26 if verdict else 0)
    height = max(side + 2 * frame, text_top + len(lines) * line_height + gap + pad)
    card = Image.new("RGB", (side + 2 * frame + 2 * pad + text_width, height), _CARD_COLOR)
    draw = ImageDraw.Draw(card)
    draw.rectangle((0, 0, side + 2 * frame - 1, side + 2 * frame - 1), color)
    pictures = picture if isinstance(picture, (list, tuple)) else [picture]
    card.paste(_fit_all(pictures, side), (frame, frame))
    x, y = side + 2 * frame + pad + 2, pad
    if verdict:
        _draw_verdict(draw, x, y + 3, bool(right), color)
        load_font(16).draw(draw, (x + 22, y), verdict, color)
    for i, (line, text_color) in enumerate(lines):
        y = text_top + i * line_height + (gap if text_color == _MUTED else 0)
        load_font(17 if text_color == _TEXT else 15).draw(draw, (x, y), line, text_color)
    return card


def _draw_verdict(
    draw: ImageDraw.ImageDraw, x: int, y: int, right: bool, color: tuple[int, ...]
) -> None:
    """A tick or a cross, 14 pixels wide, for readers who do not tell red from green."""
    if right:
        draw.line([(x, y + 7), (x + 5, y + 13), (x + 14, y + 1)], color, 3, joint="curve")
    else:
        draw.line([(x + 1, y + 1), (x + 13, y + 13)], color, 3)
        draw.line([(x + 1, y + 13), (x + 13, y + 1)], color, 3)


def _heading(title: str, right: Sequence[bool | None]) -> str:
    judged = [r for r in right if r is not None]
    score = f"{sum(judged)} of {len(judged)} right" if judged else ""
    return " · ".join(part for part in (title, score) if part)


def _fit_all(pictures: Sequence[Any], side: int) -> Image.Image:
    """Pictures as an RGB image of side x side pixels: line by line, in as many columns as lines."""
    columns, gap = math.ceil(len(pictures) ** 0.5), 2
    cell = (side - gap * (columns - 1)) // columns
    lines = math.ceil(len(pictures) / columns)
    top = (side - lines * cell - gap * (lines - 1)) // 2
    whole = Image.new("RGB", (side, side), _BORDER)
    for i, picture in enumerate(pictures):
        line, column = divmod(i, columns)
        whole.paste(_fit(picture, cell), (column * (cell + gap), top + line * (cell + gap)))
    return whole


def _fit(picture: Picture, side: int) -> Image.Image:
    """The picture as an RGB image of side x side pixels, with gray borders if it is not square."""
    if isinstance(picture, (str, os.PathLike)):
        try:
            with Image.open(picture) as opened:
                image = opened.convert("RGB")
        except (OSError, ValueError) as e:
            raise UserError(f"contact sheet: cannot read the image {picture}: {e}") from e
    else:
        image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    framed = Image.new("RGB", (side, side), _BORDER)
    framed.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    return framed


def _save(path: str | os.PathLike[str], write: Callable[[Path], None]) -> Path:
    """Write a file atomically, creating its directory. UserError: it cannot be written."""
    out = Path(path)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise write_error(out, e) from e
    save_picture(out, write)
    return out


# --- curves -----------------------------------------------------------------------------------------

Records = str | os.PathLike[str] | Iterable[Mapping[str, Any]]


def loss_plot(
    runs: Records | Mapping[str, Records],
    path: str | os.PathLike[str],
    *,
    title: str = "Training loss",
) -> Path:
    """Save a PNG of the loss by step, smoothed over the raw values; returns its path.

    runs: one run, or several by name (stages, seeds). A run is a JSONL file or records with "step" and
    "loss", "val_loss" or both; other records are skipped. UserError: there is no loss to draw, or the
    file cannot be written.
    """
    from matplotlib.figure import Figure  # slow to import

    named = runs if isinstance(runs, Mapping) else {"loss": runs}
    curves = {name: _curves(records) for name, records in named.items()}
    curves = {name: pair for name, pair in curves.items() if len(pair[0]) or len(pair[1])}
    if not curves:
        raise UserError(f"loss plot: no record with a step and a finite loss in {', '.join(named)}")
    figure = Figure(figsize=(8, 4.5), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    for i, (name, (train, validation)) in enumerate(curves.items()):
        color = _CURVES[i % len(_CURVES)]
        if len(train):
            smooth = _smooth(train[:, 1])
            dots = "." if len(train) == 1 else ""
            axes.plot(*train.T, color=color, alpha=0.25, linewidth=0.8, marker=dots)
            axes.plot(train[:, 0], smooth, color=color, linewidth=1.9, label=name)
        if len(validation):
            axes.plot(*validation.T, "o--", color=color, ms=5, lw=1, label=f"{name}, validation")
    losses = np.concatenate([part[:, 1] for pair in curves.values() for part in pair])
    if losses.min() > 0 and losses.max() / losses.min() > 20:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set(title=title, xlabel="step", ylabel="loss")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return _save(path, lambda out: figure.savefig(out, format="png"))


def _curves(records: Records) -> tuple[np.ndarray, np.ndarray]:
    """(step, loss) [N, 2] of training and of validation: the finite values, ordered by step."""
    if isinstance(records, (str, os.PathLike)):
        records = _read(records)
    train, validation = [], []
    for record in records:
        if not _is_number(record.get("step")):
            continue
        step = float(record["step"])
        if _is_number(record.get("loss")):
            train.append((step, float(record["loss"])))
        for key in _VALIDATION_KEYS:
            if _is_number(record.get(key)):
                validation.append((step, float(record[key])))
    return _by_step(train), _by_step(validation)


def _by_step(points: list[tuple[float, float]]) -> np.ndarray:
    """[N, 2], sorted. If a step was logged twice, by a run that was interrupted, the later value counts."""
    return np.array(sorted(dict(points).items()), float).reshape(-1, 2)


def _read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The objects of a JSONL file. Other lines, such as an incomplete last one, are skipped."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"loss plot: cannot read {path}: {e}") from e
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        return False
    return math.isfinite(value)


def _smooth(values: np.ndarray) -> np.ndarray:
    """The running mean over a twentieth of the curve, or over less at its ends."""
    reach = min(len(values) // 40, 50)  # values at each side
    total = np.concatenate([[0.0], np.cumsum(values)])
    center = np.arange(len(values))
    first = np.maximum(center - reach, 0)
    after = np.minimum(center + np.minimum(center, reach), len(values) - 1) + 1
    means: np.ndarray = (total[after] - total[first]) / (after - first)
    return means
