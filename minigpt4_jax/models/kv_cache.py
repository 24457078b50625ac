"""The key-value cache of a language model: in the model's dtype, or in 8 bits ("int8" or "float8").

In int8, each key or value vector of a head has its own scale (largest absolute value / 127). Except on a
GPU, attention does not dequantize the vectors: the scale of a key multiplies its score, and the scale of a
value its probability. float8 (e4m3) has no scales: that is less exact, but writing a vector needs no more
kernels than in bfloat16. Prefill also attends to the rounded keys and values, so results do not depend on
whether tokens are processed together or one by one.

Axes: B batch, T sequence, S cache length, K key/value heads, H head dim, L layers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from minigpt4_jax.config import LlmConfig
from minigpt4_jax.models.attention import cached_attention
from minigpt4_jax.parallel.sharding import BATCH_AXES, Axis, constrain, shard_map_over
from minigpt4_jax.utils.platform import backend


class QuantizedArray(NamedTuple):
    """Keys or values [..., H] in int8 with one scale per vector; see also `new_caches`."""

    levels: jax.Array  # [..., H] int8
    scale: jax.Array  # [...] float32; in a cache of a GPU [..., 2], of keys and values


Vectors = jax.Array | QuantizedArray  # keys or values [..., H]
KeysValues = tuple[Vectors, Vectors]
SCALE_BYTES = 4  # of a vector in int8
FLOAT8 = jnp.float8_e4m3fn
FLOAT8_MAX = 448.0


class KVCache(NamedTuple):
    """Keys and values of all layers: stacked Vectors [L, B, K, S, H] each, or lists of L [B, K, S, H].

    Slot t of a row holds position t. Slots beyond a row's length are masked, so padding may leave any
    values there, and decoding overwrites them.

    cross: of a model with an encoder, what decoding reads of the prompt and never changes.
    """

    k: Any
    v: Any
    cross: "CrossCache | None" = None

    @property
    def length(self) -> int:
        """S."""
        keys = self.k[0] if isinstance(self.k, list) else self.k
        return (keys.levels if isinstance(keys, QuantizedArray) else keys).shape[-2]


class CrossCache(NamedTuple):
    """The encoder's keys and values for each layer of the decoder, as in `KVCache`."""

    k: Any
    v: Any
    mask: Any  # [B, 1, S, 1] bool: not padding; stacked layers: [1, B, 1, S, 1]


def bytes_per_position(c: LlmConfig, kind: str | None, itemsize: int) -> int:
    """Bytes of the keys and values of one position in all layers. itemsize: of a cache in floats."""
    vector = c.head_dim * (itemsize if kind is None else 1)
    return 2 * c.layers * c.kv_heads * (vector + (SCALE_BYTES if kind == "int8" else 0))


def cache_axes(cache: KVCache) -> tuple[Axis, ...]:
    """The mesh axes that split the first dimensions of a cache's arrays: rows and heads."""
    return (BATCH_AXES, "model") if isinstance(cache.k, list) else (None, BATCH_AXES, "model")


class CacheUpdate(NamedTuple):
    """The cache slots that T new tokens are written to, and the slots that each attends to."""

    slots: jax.Array  # [B, T] int32
    attention_mask: jax.Array  # [B, T, S] bool
    positions: jax.Array  # [S] or [B, S] int32: the position in the row that each slot holds


def causal_cache_update(positions: jax.Array, length: int, window: int | None) -> CacheUpdate:
    """The update for tokens at positions [B, T] if slot t of a row holds position t.

    length: S. window: sliding attention window in tokens.
    """
    slots = jnp.arange(length)
    mask = slots <= positions[:, :, None]
    if window is not None:
        mask &= slots > positions[:, :, None] - window
    return CacheUpdate(positions, mask, slots)


def round_vectors(x: jax.Array, kind: str | None) -> Vectors:
    """x [..., H] of floats as a cache of this kind holds it: "int8", "float8", or None for floats."""
    if kind == "int8":
        return quantize_vectors(x)
    return x if kind is None else to_float8(x)


def kind_of(x: Vectors) -> str | None:
    """The kind of a cache, as for `round_vectors`."""
    if isinstance(x, QuantizedArray) or x.dtype == jnp.int8:
        return "int8"
    return "float8" if x.dtype in (FLOAT8, jnp.uint8) else None


def quantize_vectors(x: jax.Array) -> QuantizedArray:
    """x [..., H] of floats -> int8 with one scale per vector."""
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(-1) / 127
    levels = jnp.rint(x / jnp.where(scale == 0, 1.0, scale)[..., None])
    return QuantizedArray(levels.astype(jnp.int8), scale)


def to_float8(x: jax.Array) -> jax.Array:
    """x [..., H] of floats -> float8, on a CPU its bits as uint8; larger numbers become FLOAT8_MAX."""
    rounded = jnp.clip(x, -FLOAT8_MAX, FLOAT8_MAX).astype(FLOAT8)
    # XLA on CPU updates an array of float8 through a copy of the whole array in floats.
    return jax.lax.bitcast_convert_type(rounded, jnp.uint8) if backend() == "cpu" else rounded


def dequantize_vectors(x: Vectors, dtype: Any) -> jax.Array:
    """Vectors [..., H] -> an array [..., H] of dtype."""
    array = x
    if isinstance(array, QuantizedArray):
        array = array.levels.astype(jnp.float32) * array.scale[..., None]
    elif array.dtype == jnp.uint8:
        array = jax.lax.bitcast_convert_type(array, FLOAT8)
    return array.astype(dtype)


def new_caches(keys: Vectors, values: Vectors, length: int) -> KeysValues:
    """`new_cache` of keys and values. On a GPU the scales of both in int8 are one array [B, K, S, 2], which
    is held with the keys: writing a vector of each takes a kernel less."""
    k, v = new_cache(keys, length), new_cache(values, length)
    if isinstance(k, QuantizedArray) and isinstance(v, QuantizedArray) and backend() == "gpu":
        return QuantizedArray(k.levels, jnp.stack([k.scale, v.scale], axis=-1)), v.levels
    return k, v


def new_cache(x: Vectors, length: int) -> Vectors:
    """Keys or values [B, T, K, H] of positions 0 to T - 1 -> a cache [B, K, S = length, H]."""

    def pad_and_transpose(a: jax.Array) -> jax.Array:  # [B, T, K, ...]
        a = _pad(a, 1, length - a.shape[1]).swapaxes(1, 2)
        return constrain(a.astype(_storage_dtype(a.dtype)), BATCH_AXES, "model")

    cache: Vectors = jax.tree.map(pad_and_transpose, x)
    return cache


def grow_cache(cache: KVCache, length: int) -> KVCache:
    """The cache padded to S = length, at least its current length."""
    more = length - cache.length

    def grow(x: Vectors) -> Vectors:
        if isinstance(x, QuantizedArray):
            slots = x.levels.ndim - 2
            return QuantizedArray(_pad(x.levels, slots, more), _pad(x.scale, slots, more))
        return _pad(x, -2, more)

    grown: KVCache = jax.tree.map(grow, cache, is_leaf=lambda x: isinstance(x, QuantizedArray))
    return grown


def _pad(a: jax.Array, axis: int, more: int) -> jax.Array:
    """a with `more` zeros at the end of an axis."""
    widths = [(0, 0)] * a.ndim
    widths[axis] = (0, more)
    return jnp.pad(a, widths)


def write_caches(
    caches: KeysValues, k: jax.Array, v: jax.Array, positions: jax.Array
) -> KeysValues:
    """`write_cache` of floats k and v [B, T, K, H], rounded to the kind of the caches of keys and values."""
    keys, values = caches
    if isinstance(keys, QuantizedArray) and not isinstance(values, QuantizedArray):  # of a GPU
        both = quantize_vectors(jnp.stack([k, v], axis=-2))  # [B, T, K, 2, H]
        keys = write_cache(keys, QuantizedArray(both.levels[..., 0, :], both.scale), positions)
        return keys, write_cache(values, both.levels[..., 1, :], positions)
    kind = kind_of(keys)
    return (
        write_cache(keys, round_vectors(k, kind), positions),
        write_cache(values, round_vectors(v, kind), positions),
    )


def write_cache(cache: Vectors, x: Vectors, positions: jax.Array) -> Vectors:
    """cache [B, K, S, H] with x [B, T, K, H] written to slots positions [B, T], each less than S."""

    def write(old: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
        b, k, s, *rest = old.shape
        # One index per vector: XLA writes this in place, but copies the cache for other forms.
        index = (jnp.arange(b)[:, None, None] * k + jnp.arange(k)) * s + positions[:, :, None]
        flat = (
            old.reshape(b * k * s, *rest).at[index].set(new.astype(old.dtype), unique_indices=True)
        )
        return flat.reshape(old.shape)

    def write_sharded(old: jax.Array, new: jax.Array) -> jax.Array:
        # Without shard_map, XLA would gather the cache on every device.
        write_shard = shard_map_over(
            write, old.shape[:2], (BATCH_AXES, "model"), [(0, 1), (0, None, 1), (0,)], (0, 1)
        )
        return write_shard(old, new, positions)

    positions = jnp.broadcast_to(positions, jax.tree.leaves(x)[0].shape[:2])
    updated: Vectors = jax.tree.map(write_sharded, cache, x)
    return updated


def attend_to_cache(
    q: jax.Array,
    keys: Vectors,
    values: Vectors,
    mask: jax.Array,
    *,
    scale: float,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Attention of q [B, T, N, H] to a cache of any kind, of keys and values [B, K, S, H]; mask
    [B, T, S], bias [B, N, T, S] of the scores -> [B, T, N, H]."""
    dtype = _storage_dtype(q.dtype)
    if isinstance(keys, QuantizedArray) and isinstance(values, QuantizedArray):
        return cached_attention(
            q, keys.levels.astype(dtype), values.levels.astype(dtype), mask,
            scale=scale, key_scale=keys.scale, value_scale=values.scale, bias=bias,
        )  # fmt: skip
    if isinstance(keys, QuantizedArray) and not isinstance(values, QuantizedArray):  # of a GPU
        # Its kernels apply scales as they read vectors: those of scores and probabilities would be kernels.
        keys, values = (
            QuantizedArray(levels, keys.scale[..., n])
            for n, levels in enumerate((keys.levels, values))
        )
    if kind_of(keys) is not None:
        keys, values = dequantize_vectors(keys, dtype), dequantize_vectors(values, dtype)
    assert isinstance(keys, jax.Array) and isinstance(values, jax.Array)
    return cached_attention(q, keys, values, mask, scale=scale, bias=bias)


def _storage_dtype(dtype: Any) -> Any:
    # XLA on CPU updates a bfloat16 array through a float32 copy of the whole array.
    cpu = backend() == "cpu"
    return jnp.float32 if cpu and dtype == jnp.bfloat16 else dtype
