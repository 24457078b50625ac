"""The key-value cache in floats and in 8 bits: quantization, writing, growing, attention, size."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_jax.checkpoint.parameters import abstract_model
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.models.kv_cache import (
    KVCache,
    QuantizedArray,
    attend_to_cache,
    causal_cache_update,
    dequantize_vectors,
    grow_cache,
    kind_of,
    new_cache,
    new_caches,
    quantize_vectors,
    round_vectors,
    to_float8,
    write_cache,
    write_caches,
)
from minigpt4_jax.utils import platform

KINDS = [None, "int8", "float8"]


def vectors(rng, *shape):
    return jnp.asarray(rng.normal(size=shape) * rng.exponential(size=(*shape[:-1], 1)), jnp.float32)


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.floats(1e-30, 1e30), st.integers(0, 1 << 30))
def test_quantization_error_is_at_most_half_a_step(h, size, seed):
    x = np.random.default_rng(seed).standard_t(3, (5, h)).astype(np.float32) * np.float32(size)
    x[0] = 0
    rounded = quantize_vectors(jnp.asarray(x))
    assert rounded.levels.dtype == jnp.int8
    found = np.asarray(dequantize_vectors(rounded, jnp.float32))
    step = np.abs(x).max(-1, keepdims=True) / 127
    assert (np.abs(found - x) <= 0.501 * step).all()


def test_float8_rounds_to_four_bits_within_its_range():
    x = np.random.default_rng(0).normal(0, 30, (50, 8)).astype(np.float32)
    x[0, :3] = 1e5, -1e5, 0.0
    found = np.asarray(dequantize_vectors(to_float8(jnp.asarray(x)), jnp.float32))
    np.testing.assert_allclose(found, np.clip(x, -448, 448), rtol=2**-4, atol=2**-10)
    np.testing.assert_array_equal(found[0, :3], [448, -448, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_incremental_writes_and_growth_equal_one_write(kind):
    """Also with rows of different lengths, where padding is overwritten."""
    rng, to = np.random.default_rng(0), partial(round_vectors, kind=kind)
    x = vectors(rng, 2, 9, 3, 4)  # [B, T, K, H]
    whole = new_cache(to(x), 16)
    cache = KVCache([new_cache(to(x[:, :5]), 8)], [new_cache(to(x[:, :5]), 8)])
    (cache,) = grow_cache(cache, 16).k
    starts = jnp.asarray([[5], [3]])  # the second row's slots 3 and 4 were padding
    positions = starts + jnp.arange(4)
    assert kind_of(cache) == kind
    rest = jnp.take_along_axis(x, positions[:, :, None, None], axis=1)
    cache = write_cache(cache, to(rest), positions)
    assert_equal(jax.tree.map(lambda a: a[0], cache), jax.tree.map(lambda a: a[0], whole))
    assert_equal(
        jax.tree.map(lambda a: a[1, :, :7], cache), jax.tree.map(lambda a: a[1, :, :7], whole)
    )


@pytest.mark.parametrize(("kind", "window"), [("int8", None), ("int8", 4), ("float8", None)])
def test_8_bit_attention_equals_attention_to_dequantized_vectors(kind, window):
    rng = np.random.default_rng(1)
    q = vectors(rng, 2, 3, 6, 8)
    seen = causal_cache_update(jnp.asarray([[7, 8, 9], [0, 1, 2]]), 12, window).attention_mask
    k, v = (round_vectors(vectors(rng, 2, 12, 2, 8), kind) for _ in range(2))
    keys, values = new_cache(k, 12), new_cache(v, 12)
    found = attend_to_cache(q, keys, values, seen, scale=0.3)
    wanted = attend_to_cache(
        q,
        dequantize_vectors(keys, "float32"),
        dequantize_vectors(values, "float32"),
        seen,
        scale=0.3,
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_caches_of_a_gpu_hold_the_same_numbers(kind):
    """There the scales of keys and values in int8 are one array."""
    rng = np.random.default_rng(3)
    x = [vectors(rng, 2, 9, 2, 8) for _ in range(2)]  # keys and values [B, T, K, H]
    q, positions = vectors(rng, 2, 1, 6, 8), jnp.asarray([[8], [6]])
    seen = causal_cache_update(positions, 16, None).attention_mask

    def attended(target):
        with platform.compiling_for(target):
            start = [round_vectors(a[:, :6], kind) for a in x]
            keys, values = new_caches(*start, 8)
            grown = grow_cache(KVCache([keys], [values]), 16)
            caches = grown.k[0], grown.v[0]
            assert {kind_of(c) for c in caches} == {kind}
            for n in range(6, 9):  # one by one; the second row repeats its last
                at = jnp.minimum(jnp.asarray([[n], [n]]), positions)
                new = [jnp.take_along_axis(a, at[:, :, None, None], axis=1) for a in x]
                caches = write_caches(caches, *new, at)
            y = attend_to_cache(q, *caches, seen, scale=0.3)
        return y, isinstance(caches[1], QuantizedArray)

    (wanted, apart), (found, apart_on_gpu) = attended("tpu"), attended("gpu")
    assert (apart, apart_on_gpu) == (kind == "int8", False)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "a_vector"), [(None, 256), ("int8", 132), ("float8", 128)])
def test_bytes_of_vicuna_7b(kind, a_vector):
    """128 numbers in bfloat16, in int8 with a float32 scale, or in float8."""
    graphdef, state = nnx.split(abstract_model(ModelConfig(), stacked=False))
    llm = nnx.merge(graphdef, state).llm
    llm.cache_kind = kind
    embeds = jax.ShapeDtypeStruct((1, 64, 4096), jnp.float32)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    graphdef, state = nnx.split(llm)
    state = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), state)

    def prefill(state, embeds, lengths):
        return nnx.merge(graphdef, state).prefill(embeds, lengths, 2048)[1]

    cache = jax.eval_shape(prefill, state, embeds, lengths)
    held = {jnp.dtype("float32"): 2} if kind is None and jax.default_backend() == "cpu" else {}
    size = sum(a.size * a.dtype.itemsize // held.get(a.dtype, 1) for a in jax.tree.leaves(cache))
    assert size == 2 * 32 * 2048 * 32 * a_vector  # 1.07 and 0.55 GB
