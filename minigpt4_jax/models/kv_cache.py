"""The key-value cache of a language model: in the model's floats, or rounded to int8.

QuantizedArray, each key or value vector of a head has a scale of its own (largest absolute value / 127).
Attention never needs the vectors as floats: the scale of a key is a factor of its score, and the
scale of a value one of its probability. A prompt that is read attends to its rounded keys and
values as well, so the numbers are the same whether tokens are read together or one after another.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from minigpt4_jax.models.attention import cached_attention
from minigpt4_jax.parallel.sharding import BATCH_AXES, constrain, shard_map_over
from minigpt4_jax.utils.platform import backend


class QuantizedArray(NamedTuple):
    """Keys or values in int8."""

    levels: jax.Array  # [..., H] int8
    scale: jax.Array  # [...] float32


Vectors = Any  # keys or values [..., H]: an array, or QuantizedArray


class KVCache(NamedTuple):
    """Keys and values of every layer: stacked Vectors [L, B, K, S, H] each, or L of [B, K, S, H].

    Slot t of a row holds position t. A row's slots past its length are never looked at, so right
    padding may leave anything there, and decoding overwrites it.
    """

    k: Any
    v: Any

    @property
    def length(self) -> int:
        """S."""
        keys = self.k[0] if isinstance(self.k, list) else self.k
        return (keys.levels if isinstance(keys, QuantizedArray) else keys).shape[-2]


def cache_axes(cache: KVCache) -> tuple:
    """The axes of a mesh that split the dimensions of a cache's arrays: rows, and heads."""
    return (BATCH_AXES, "model") if isinstance(cache.k, list) else (None, BATCH_AXES, "model")


class CacheUpdate(NamedTuple):
    """Where in a cache the T tokens of a step go, and what each of them looks at."""

    slots: jax.Array  # [B, T] int32
    attention_mask: jax.Array  # [B, T, S] bool


def causal_cache_update(positions: jax.Array, length: int, window: int | None) -> CacheUpdate:
    """Positions [B, T] of rows whose slot t of S = length holds position t."""
    slots = jnp.arange(length)
    mask = slots <= positions[:, :, None]
    if window is not None:
        mask &= slots > positions[:, :, None] - window
    return CacheUpdate(positions, mask)


def quantize_vectors(x: jax.Array) -> QuantizedArray:
    """x [..., H] to int8, a scale for each vector."""
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(-1) / 127
    levels = jnp.rint(x / jnp.where(scale == 0, 1.0, scale)[..., None])
    return QuantizedArray(levels.astype(jnp.int8), scale)


def dequantize_vectors(x: Vectors, dtype: Any) -> jax.Array:
    """Vectors [..., H] as an array of dtype."""
    if isinstance(x, QuantizedArray):
        x = x.levels.astype(jnp.float32) * x.scale[..., None]
    return x.astype(dtype)


def new_cache(x: Vectors, length: int) -> Vectors:
    """Keys or values [B, T, K, H] of the first T positions -> cache [B, K, S = length, H]."""

    def place(a: jax.Array) -> jax.Array:  # [B, T, K, ...]
        rest = [(0, 0)] * (a.ndim - 2)
        a = jnp.pad(a, [(0, 0), (0, length - a.shape[1]), *rest]).swapaxes(1, 2)
        return constrain(a.astype(_held(a.dtype)), BATCH_AXES, "model")

    return jax.tree.map(place, x)


def grow_cache(cache: KVCache, length: int) -> KVCache:
    """The same cache with S = length, which is not less than it was."""
    more = length - cache.length

    def grow(x: Vectors) -> Vectors:
        if isinstance(x, QuantizedArray):
            return QuantizedArray(_pad(x.levels, -2, more), _pad(x.scale, -1, more))
        return _pad(x, -2, more)

    is_vectors = lambda x: isinstance(x, QuantizedArray)  # noqa: E731
    return jax.tree.map(grow, cache, is_leaf=is_vectors)


def _pad(a: jax.Array, axis: int, more: int) -> jax.Array:
    widths = [(0, 0)] * a.ndim
    widths[axis] = (0, more)
    return jnp.pad(a, widths)


def write_cache(cache: Vectors, x: Vectors, positions: jax.Array) -> Vectors:
    """cache [B, K, S, H] with x [B, T, K, H] at positions [B, T], all of them less than S."""

    def write(old: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
        b, k, s, *rest = old.shape
        # One index a vector: XLA writes this in place, and copies the cache for other spellings.
        at = (jnp.arange(b)[:, None, None] * k + jnp.arange(k)) * s + positions[:, :, None]
        flat = old.reshape(b * k * s, *rest).at[at].set(new.astype(old.dtype), unique_indices=True)
        return flat.reshape(old.shape)

    def write_parts(old: jax.Array, new: jax.Array) -> jax.Array:
        split = shard_map_over(  # for this spelling XLA would put a cache together on every device
            write, old.shape[:2], (BATCH_AXES, "model"), [(0, 1), (0, None, 1), (0,)], (0, 1)
        )
        return split(old, new, positions)

    positions = jnp.broadcast_to(positions, jax.tree.leaves(x)[0].shape[:2])
    return jax.tree.map(write_parts, cache, x)


def attend_to_cache(
    q: jax.Array, keys: Vectors, values: Vectors, mask: jax.Array, *, scale: float
) -> jax.Array:
    """`layers.cached_attention` to either kind of cache."""
    if not isinstance(keys, QuantizedArray):
        return cached_attention(q, keys, values, mask, scale=scale)
    dtype = _held(q.dtype)
    return cached_attention(
        q, keys.levels.astype(dtype), values.levels.astype(dtype), mask,
        scale=scale, key_scale=keys.scale, value_scale=values.scale,
    )  # fmt: skip


def _held(dtype: Any) -> Any:
    # XLA on CPU writes into a bfloat16 array by way of a float32 copy of all of it.
    cpu = backend() == "cpu"
    return jnp.float32 if cpu and dtype == jnp.bfloat16 else dtype
