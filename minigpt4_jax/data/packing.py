"""Packing: several short examples in a row, kept apart by segment numbers.

Captions fill a fraction of rows padded to the longest of a batch. Here the examples of a padded
batch are laid one behind the other into rows of a fixed length; in each a token sees those of its
own example alone and counts positions from that example's start, so losses and gradients are those
of the padded batch. NumPy alone: it runs where batches are made, and is a function of the batch, so
that order, resuming and the number of workers stay as they are.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from minigpt4_jax.config import IMAGE
from minigpt4_jax.data.batching import PADDING, Arrays, BatchLayout, Padding


class Packed(NamedTuple):
    """The fields of models.minigpt.Batch, in its order; R rows hold the B examples of a batch."""

    pixels: np.ndarray  # [B * I, 1, S, S, 3] uint8, in their order; [M, 0, S, S, 3] without images
    tokens: np.ndarray  # [R, T] int32
    lengths: np.ndarray  # [R] int32; tokens of a row that are not padding
    label_positions: np.ndarray  # [R, A] int32
    segments: np.ndarray  # [R, T] int32; the example in its row, padding is one of its own
    positions: np.ndarray  # [R, T] int32; from the start of the example
    visual: np.ndarray  # [R, T] int32; which of the B * I * P visual tokens goes into a slot


def first_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Numbers of the examples of each row: the longest first, each into the first row of `width`
    tokens that has room for it. One longer than that has a row to itself."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((n for n, free in enumerate(room) if lengths[i] <= free), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


def pack(
    batch: Arrays,
    width: int,
    visual_tokens: int,
    pad_id: int,
    *,
    micro_batches: int = 1,
    rows_multiple: int = 1,
    padding: Padding = PADDING,
    blocks: int = 1,
    plan: BatchLayout | None = None,
) -> Packed:
    """A padded batch with its examples packed into rows of `width` tokens, or of the longest
    example's where that is longer.

    visual_tokens: P of an image. micro_batches: the examples of each are packed among themselves,
    into as many rows as those of the others, a multiple of rows_multiple.
    Of several processes each packs the examples that it has, into its own rows of the whole: blocks
    is then into how many parts of equal size the whole batch is divided among them (each may hold
    several), and plan says how long all of its examples are, so that all lay out rows of one shape.
    """
    images = batch.pixels.shape[1]
    plan = plan or _plan_of(batch)
    examples, chunks = len(plan.lengths), micro_batches * blocks
    lengths, labels = plan.lengths, plan.labels
    width = max(width, -(-max(lengths) // padding.tokens) * padding.tokens)
    layouts, share = [], examples // chunks
    for first in range(0, examples, share):
        rows = first_fit(lengths[first : first + share], width)
        layouts.append([[first + i for i in row] for row in rows])
    count = -(-max(map(len, layouts)) // rows_multiple) * rows_multiple
    most = max(1, max(sum(labels[i] for i in row) for rows in layouts for row in rows))
    here = {number: at for at, number in enumerate(plan.rows)}  # example -> its row in `batch`
    mine = [rows + [[]] * (count - len(rows)) for rows in layouts if rows[0][0] in here]
    layout = [row for rows in mine for row in rows]
    # As many programs are compiled as there are shapes: a row's labels vary more than an example's.
    step = max(padding.answers, width // 8 // padding.answers * padding.answers)
    shape = (len(layout), width)
    tokens, segments = np.full(shape, pad_id, np.int32), np.zeros(shape, np.int32)
    positions, visual = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    answers = np.full((len(layout), -(-most // step) * step), -1, np.int32)
    used = np.zeros(len(layout), np.int32)
    for r, row in enumerate(layout):
        at, labelled = 0, 0
        for number, i in enumerate(row):
            n, its = int(batch.lengths[here[i]]), batch.label_positions[here[i]]
            its = its[its >= 0]
            part = slice(at, at + n)
            segments[r, part], positions[r, part] = number, np.arange(n)
            tokens[r, part] = batch.tokens[here[i], :n]
            slots = np.flatnonzero(tokens[r, part] == IMAGE)
            first = i % (examples // micro_batches) * images * visual_tokens
            visual[r, at + slots] = first + np.arange(len(slots))
            answers[r, labelled : labelled + len(its)] = at + its
            at, labelled = at + n, labelled + len(its)
        segments[r, at:], positions[r, at:], used[r] = len(row), np.arange(width - at), at
    stand = (len(plan.rows) * images, 1) if images else (len(mine), 0)
    pixels = batch.pixels.reshape(*stand, *batch.pixels.shape[2:])
    return Packed(pixels, tokens, used, answers, segments, positions, visual)


def _plan_of(batch: Arrays) -> BatchLayout:
    """Of a batch that is here as a whole."""
    labels = tuple(int((answers >= 0).sum()) for answers in batch.label_positions)
    lengths = tuple(int(n) for n in batch.lengths)
    return BatchLayout(lengths, labels, tuple(range(len(lengths))))
