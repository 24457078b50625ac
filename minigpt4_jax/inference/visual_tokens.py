"""Visual tokens of requests, from arrays of the host or the device to one padded array of a batch."""

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from minigpt4_jax.utils.rounding import next_power_of_two

VisualTokens: TypeAlias = np.ndarray | jax.Array  # [I * P, D] float32


def stack_visual(
    rows: Sequence[VisualTokens | None], per_image: int, width: int, length: int | None = None
) -> Any:
    """Visual tokens [I * P, D] of each row, or None -> [B, I * P, D] float32, zero-padded.

    per_image: P. I is rounded up to a power of two, so that few shapes are compiled. length: I * P
    instead. Arrays of the device are stacked there.
    """
    if length is None:
        most = max((0 if visual is None else len(visual) for visual in rows), default=0)
        num_images = -(-most // per_image)
        length = next_power_of_two(num_images) * per_image if num_images else 0
    on_device = [visual for visual in rows if isinstance(visual, jax.Array)]
    if not on_device:
        stacked = np.zeros((len(rows), length, width), np.float32)
        for target, visual in zip(stacked, rows, strict=True):
            if visual is not None:
                target[: len(visual)] = visual
        return stacked
    batch = jnp.zeros((len(rows), length, width), device=on_device[0].sharding)
    for i, visual in enumerate(rows):
        if visual is not None:
            batch = _put_row(batch, visual, i)
    return batch


def concatenate_visual(parts: Sequence[VisualTokens]) -> VisualTokens | None:
    """Visual tokens [P, D] of images -> [I * P, D]; None without images."""
    if not parts:
        return None
    if len(parts) == 1:
        return parts[0]
    on_device = any(isinstance(part, jax.Array) for part in parts)
    return jnp.concatenate(parts) if on_device else np.concatenate(parts)


@partial(jax.jit, donate_argnums=(0,))
def _put_row(batch: jax.Array, row: jax.Array, i: jax.Array) -> jax.Array:
    """batch [B, N, D] with `row` [n, D] at the beginning of row i."""
    return jax.lax.dynamic_update_slice(batch, row[None], (i, 0, 0))
