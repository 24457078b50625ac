"""Stop sequences of token ids in the compiled programs, and stop texts on the host."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def stack_stop_sequences(
    rows: Sequence[Sequence[Sequence[int]]], num_stops: int, width: int
) -> np.ndarray:
    """Stop sequences of each row -> [B, R = num_stops, W = width] int32, right-aligned, -1 before."""
    stacked = np.full((len(rows), num_stops, width), -1, np.int32)
    for target_row, sequences in zip(stacked, rows, strict=True):
        for target, ids in zip(target_row, sequences, strict=False):
            if ids:
                target[width - len(ids) :] = ids
    return stacked


def completing_tokens(
    ids: jax.Array, num_generated: jax.Array, stop_sequences: jax.Array
) -> jax.Array:
    """The next tokens that would complete a stop sequence: [B, R], -1 where none would.

    ids [B, N]: generated so far, of which the first num_generated [B] count; stop_sequences [B, R, W].
    """
    length = stop_sequences.shape[2] - 1  # without the last token
    index = num_generated[:, None] - length + jnp.arange(length)  # [B, W - 1]
    tail = jnp.take_along_axis(ids, jnp.maximum(index, 0), axis=1)
    tail = jnp.where(index >= 0, tail, -2)  # before the first token: equal to no id
    starts = stop_sequences[:, :, :-1]
    matches = (starts == tail[:, None]) | (starts == -1)
    return jnp.where(jnp.all(matches, axis=2), stop_sequences[:, :, -1], -1)


def stable_prefix(text: str, stops: Sequence[str]) -> str:
    """The part of a growing text that later tokens cannot change.

    Leaves out the start of a stop text, an incomplete UTF-8 character, and trailing white space,
    which is stripped from answers.
    """
    text = text.rstrip("\ufffd")
    partial_stop = max(
        (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
    )
    return text[: len(text) - partial_stop].rstrip()
