"""The arrays of a batch, padded or packed, and the lengths they are padded to."""

from typing import NamedTuple

import numpy as np


class Padding(NamedTuple):
    """Lengths are rounded up to multiples of these, to limit the number of compiled programs."""

    tokens: int = 32  # of T
    answers: int = 16  # of A


PADDING = Padding()


class BatchArrays(NamedTuple):
    """Fields of models.minigpt.Batch."""

    pixels: np.ndarray  # [B, I, S, S, 3] uint8
    tokens: np.ndarray  # [B, T] int32
    lengths: np.ndarray  # [B] int32
    label_positions: np.ndarray  # [B, A] int32
    image_ids: np.ndarray | None = None  # [B] int32


class BatchLayout(NamedTuple):
    """The lengths of all examples of a batch across processes, known before images are opened.

    The example that replaces one with an unreadable image is never longer, if rows are packed.
    """

    lengths: tuple[int, ...]  # [B] tokens
    label_counts: tuple[int, ...]  # [B] labelled tokens
    rows: tuple[int, ...]  # the rows that this process makes


class PackedArrays(NamedTuple):
    """Fields of models.minigpt.Batch; R rows hold the B examples of a batch."""

    pixels: np.ndarray  # [B * I, 1, S, S, 3] uint8; [M, 0, S, S, 3] without images
    tokens: np.ndarray  # [R, T] int32
    lengths: np.ndarray  # [R] int32; tokens of a row that are not padding
    label_positions: np.ndarray  # [R, A] int32
    segments: np.ndarray  # [R, T] int32; number of the example in its row; padding has its own
    positions: np.ndarray  # [R, T] int32; from the start of the example
    visual_index: np.ndarray  # [R, T] int32; of an image slot among the B * I * P visual tokens
