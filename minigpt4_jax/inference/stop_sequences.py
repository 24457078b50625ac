"""When an answer ends: stop sequences of ids in the compiled programs, stop texts on the host."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def stack_stops(stops: Sequence[Sequence[Sequence[int]]], count: int, width: int) -> np.ndarray:
    """Stop sequences of rows -> [B, R = count, W = width] int32, each at the right end, -1 before it."""
    table = np.full((len(stops), count, width), -1, np.int32)
    for row, sequences in zip(table, stops, strict=True):
        for place, ids in zip(row, sequences, strict=False):
            if ids:
                place[width - len(ids) :] = ids
    return table


def completing(ids: jax.Array, made: jax.Array, stops: jax.Array) -> jax.Array:
    """The next tokens that would end a row: [B, R], -1 where a stop sequence has not begun.

    ids [B, N] generated so far, of which made [B] count; stops [B, R, W].
    """
    before = stops.shape[2] - 1
    at = made[:, None] - before + jnp.arange(before)  # [B, W - 1]
    tail = jnp.take_along_axis(ids, jnp.maximum(at, 0), axis=1)
    tail = jnp.where(at >= 0, tail, -2)  # nothing generated there
    begun = (stops[:, :, :-1] == tail[:, None]) | (stops[:, :, :-1] == -1)
    return jnp.where(jnp.all(begun, axis=2), stops[:, :, -1], -1)


def certain_part(text: str, endings: Sequence[str]) -> str:
    """The part of a text that what follows cannot change: without the beginning of an ending, of a
    character whose other bytes are to come, or white space, which an answer does not end with."""
    text = text.rstrip("\ufffd")
    begun = max(
        (n for end in endings for n in range(1, len(end)) if text.endswith(end[:n])), default=0
    )
    return text[: len(text) - begun].rstrip()
