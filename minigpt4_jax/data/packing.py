"""Packing: several short examples in a row, kept apart by segment numbers.

Captions fill only a fraction of rows that are padded to the longest one of a batch. Here the examples of
a padded batch are concatenated into rows of a fixed length. A token attends only to its own example
and counts positions from that example's start, so losses and gradients are those of the padded batch.

Packing uses only NumPy and runs where batches are made. It is a function of the batch, so the order of
the data, resuming and the number of workers are not affected.
"""

from collections.abc import Sequence

import numpy as np

from minigpt4_jax.config import IMAGE
from minigpt4_jax.data.arrays import PADDING, BatchArrays, BatchLayout, PackedArrays, Padding
from minigpt4_jax.utils.rounding import round_up


def first_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Assign examples to rows of `width` tokens: the longest first, each to the first row with enough
    space. An example longer than that has a row to itself. -> the examples of each row."""
    rows: list[list[int]] = []
    free: list[int] = []  # tokens left in each row
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((n for n, space in enumerate(free) if lengths[i] <= space), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(width)
        rows[row].append(i)
        free[row] -= lengths[i]
    return rows


def pack(
    batch: BatchArrays,
    width: int,
    visual_tokens: int,
    pad_id: int,
    *,
    micro_batches: int = 1,
    rows_multiple: int = 1,
    padding: Padding = PADDING,
    blocks: int = 1,
    layout: BatchLayout | None = None,
) -> PackedArrays:
    """Pack the examples of a padded batch into rows of `width` tokens, or of the longest example's
    length if that is more.

    visual_tokens: P, per image. micro_batches: the examples of each are packed among themselves, into
    the same number of rows, a multiple of rows_multiple.
    With several processes, each packs its own examples. blocks: the number of equal parts that the whole
    batch is divided into (a process may have several). layout: the lengths of all examples, so that all
    processes make rows of the same shape; None: the batch is complete.
    """
    layout = layout or _layout_of(batch)
    width = max(width, round_up(max(layout.lengths), padding.tokens))
    rows, max_labels, num_chunks = _assign_rows(
        layout, width, micro_batches * blocks, rows_multiple
    )
    # Labels per row vary more than labels per example: larger steps limit the number of programs.
    step = max(padding.answers, width // 8 // padding.answers * padding.answers)
    images = batch.pixels.shape[1]
    examples_per_micro_batch = len(layout.lengths) // micro_batches
    batch_index = {example: i for i, example in enumerate(layout.rows)}
    shape = (len(rows), width)
    tokens, segments = np.full(shape, pad_id, np.int32), np.zeros(shape, np.int32)
    positions, visual_index = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    label_positions = np.full((len(rows), round_up(max_labels, step)), -1, np.int32)
    lengths = np.zeros(len(rows), np.int32)
    for r, examples in enumerate(rows):
        start, num_labels = 0, 0
        for segment, example in enumerate(examples):
            i = batch_index[example]
            n, labels = int(batch.lengths[i]), batch.label_positions[i]
            labels = labels[labels >= 0]
            span = slice(start, start + n)
            segments[r, span], positions[r, span] = segment, np.arange(n)
            tokens[r, span] = batch.tokens[i, :n]
            slots = np.flatnonzero(tokens[r, span] == IMAGE)
            first_visual = example % examples_per_micro_batch * images * visual_tokens
            visual_index[r, start + slots] = first_visual + np.arange(len(slots))
            label_positions[r, num_labels : num_labels + len(labels)] = start + labels
            start, num_labels = start + n, num_labels + len(labels)
        segments[r, start:], positions[r, start:] = len(examples), np.arange(width - start)
        lengths[r] = start
    pixels_shape = (len(layout.rows) * images, 1) if images else (num_chunks, 0)
    pixels = batch.pixels.reshape(*pixels_shape, *batch.pixels.shape[2:])
    return PackedArrays(pixels, tokens, lengths, label_positions, segments, positions, visual_index)


def _assign_rows(
    layout: BatchLayout, width: int, num_chunks: int, rows_multiple: int
) -> tuple[list[list[int]], int, int]:
    """Pack each of num_chunks equal parts of the batch into the same number of rows.

    -> (the examples of each row that this process makes, the most labels in any row of the batch, the
    number of chunks that this process makes)
    """
    chunk = len(layout.lengths) // num_chunks
    chunks = []
    for first in range(0, len(layout.lengths), chunk):
        rows = first_fit(layout.lengths[first : first + chunk], width)
        chunks.append([[first + i for i in row] for row in rows])
    num_rows = round_up(max(map(len, chunks)), rows_multiple)
    max_labels = max(sum(layout.label_counts[i] for i in row) for rows in chunks for row in rows)
    local = set(layout.rows)
    local_chunks = [rows for rows in chunks if rows[0][0] in local]
    local_rows = [row for rows in local_chunks for row in rows + [[]] * (num_rows - len(rows))]
    return local_rows, max(1, max_labels), len(local_chunks)


def _layout_of(batch: BatchArrays) -> BatchLayout:
    """The layout of a batch that this process makes completely."""
    label_counts = tuple(int((labels >= 0).sum()) for labels in batch.label_positions)
    lengths = tuple(int(n) for n in batch.lengths)
    return BatchLayout(lengths, label_counts, tuple(range(len(lengths))))
