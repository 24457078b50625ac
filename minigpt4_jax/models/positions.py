"""How a language model knows the order of tokens: rotary embeddings (RoFormer paper) with long-context
scaling, and T5's relative positions (T5 paper, section 2.1)."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from minigpt4_jax.config import LlmConfig, RopeScaling

Rope = tuple[jax.Array, jax.Array]  # cos and sin [B, T, 1, H / 2] float32


def rope_frequencies(c: LlmConfig) -> np.ndarray:
    """Rotary frequencies [H / 2] float32, with the model's long-context scaling."""
    freq = 1.0 / c.rope_theta ** (np.arange(0, c.head_dim, 2, dtype=np.float32) / c.head_dim)
    scaling = c.rope_scaling
    if scaling is None:
        return freq.astype(np.float32)
    if scaling.kind == "linear":
        return (freq / scaling.factor).astype(np.float32)
    return _llama3_frequencies(freq, scaling).astype(np.float32)


def _llama3_frequencies(freq: np.ndarray, s: RopeScaling) -> np.ndarray:
    """Llama 3.1's rule: frequencies of long wavelengths are divided by the factor, those of short
    wavelengths are unchanged, and those in between are interpolated. [H / 2] -> [H / 2]."""
    wavelength = 2 * math.pi / freq
    blend = (s.original_max_length / wavelength - s.low_freq_factor) / (
        s.high_freq_factor - s.low_freq_factor
    )
    blend = np.clip(blend, 0.0, 1.0)  # 1: unchanged, 0: divided by the factor
    scaled: np.ndarray = (1 - blend) * freq / s.factor + blend * freq
    return scaled


def rotary(c: LlmConfig, positions: jax.Array) -> Rope:
    """positions [B, T] int32 -> cos and sin [B, T, 1, H / 2] float32."""
    angles = positions[..., None].astype(jnp.float32) * rope_frequencies(c)
    return jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding of x [B, T, N, H] -> [B, T, N, H]; dimension i is rotated with i + H / 2."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def relative_bias(
    c: LlmConfig, table: jax.Array, queries: jax.Array, keys: jax.Array, *, causal: bool
) -> jax.Array:
    """What relative positions add to attention scores: table [buckets, N], positions of queries [B, T]
    and keys [B, S] -> [B, N, T, S] float32."""
    distance = keys[:, None, :] - queries[:, :, None]
    buckets = _relative_buckets(
        distance, c.relative_buckets, c.relative_distance, two_sided=not causal
    )
    return jnp.moveaxis(table.astype(jnp.float32)[buckets], -1, 1)


def _relative_buckets(
    distance: jax.Array, buckets: int, max_distance: int, *, two_sided: bool
) -> jax.Array:
    """Signed distances -> bucket numbers: near ones have a bucket each, far ones share them by their
    logarithm. two_sided: half of the buckets for keys behind the query; otherwise these count as 0."""
    offset: jax.Array | int = 0
    if two_sided:
        buckets //= 2
        offset = jnp.where(distance > 0, buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact)
    far = exact + (ratio / math.log(max_distance / exact) * (buckets - exact)).astype(jnp.int32)
    return offset + jnp.where(distance < exact, distance, jnp.minimum(far, buckets - 1))
