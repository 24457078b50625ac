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


@jax.jit
def rounded_in_int8(x):
    levels = quantize_vectors(x)
    return levels, dequantize_vectors(levels, jnp.float32)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.floats(1e-30, 1e30), st.integers(0, 1 << 30))
def test_quantization_error_is_at_most_half_a_step(h, size, seed):
    x = np.random.default_rng(seed).standard_t(3, (5, h)).astype(np.float32) * np.float32(size)
    x[0] = 0
    rounded, found = rounded_in_int8(x)
    assert rounded.levels.dtype == jnp.int8
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
    rng, to = np.random.default_rng(0), jax.jit(partial(round_vectors, kind=kind))
    x = np.asarray(vectors(rng, 2, 9, 3, 4))  # [B, T, K, H]
    in_slots = jax.jit(new_cache, static_argnums=1)
    whole = in_slots(to(x), 16)
    cache = in_slots(to(x[:, :5]), 8)
    cache = KVCache([cache], [jax.tree.map(jnp.copy, cache)])
    (cache,) = jax.jit(grow_cache, static_argnums=1)(cache, 16).k
    starts = np.array([[5], [3]])  # the second row's slots 3 and 4 were padding
    positions = starts + np.arange(4)
    assert kind_of(cache) == kind
    rest = np.take_along_axis(x, positions[:, :, None, None], axis=1)
    cache = jax.jit(write_cache)(cache, to(rest), positions)
    whole, cache = jax.tree.map(np.asarray, (whole, cache))
    assert_equal(jax.tree.map(lambda a: a[0], cache), jax.tree.map(lambda a: a[0], whole))
    assert_equal(
        jax.tree.map(lambda a: a[1, :, :7], cache), jax.tree.map(lambda a: a[1, :, :7], whole)
    )


@pytest.mark.parametrize(("kind", "window"), [("int8", None), ("int8", 4), ("float8", None)])
def test_8_bit_attention_equals_attention_to_dequantized_vectors(kind, window):
    rng = np.random.default_rng(1)
    q = vectors(rng, 2, 3, 6, 8)
    positions = jnp.asarray([[7, 8, 9], [0, 1, 2]])
    x = [vectors(rng, 2, 12, 2, 8) for _ in range(2)]
    attend = jax.jit(partial(attend_to_cache, scale=0.3))

    @jax.jit
    def caches(positions, *x):
        seen = causal_cache_update(positions, 12, window).attention_mask
        rounded = [new_cache(round_vectors(a, kind), 12) for a in x]
        return seen, rounded, [dequantize_vectors(a, "float32") for a in rounded]

    seen, in_8_bits, in_floats = caches(positions, *x)
    found, wanted = attend(q, *in_8_bits, seen), attend(q, *in_floats, seen)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_caches_of_a_gpu_hold_the_same_numbers(kind):
    """There the scales of keys and values in int8 are one array."""
    rng = np.random.default_rng(3)
    x = [np.asarray(vectors(rng, 2, 9, 2, 8)) for _ in range(2)]  # keys and values [B, T, K, H]
    q, positions = vectors(rng, 2, 1, 6, 8), np.array([[8], [6]])

    def attended(target):
        @jax.jit
        def start(*x):
            keys, values = new_caches(*(round_vectors(a, kind) for a in x), 8)
            grown = grow_cache(KVCache([keys], [values]), 16)
            return grown.k[0], grown.v[0]

        @jax.jit
        def attend(q, positions, caches):
            seen = causal_cache_update(positions, 16, None).attention_mask
            return attend_to_cache(q, *caches, seen, scale=0.3)

        write = jax.jit(lambda *args: write_caches(*args))  # traced anew for each platform
        with platform.compiling_for(target):
            caches = start(*(a[:, :6] for a in x))
            assert {kind_of(c) for c in caches} == {kind}
            for n in range(6, 9):  # one by one; the second row repeats its last
                at = np.minimum([[n], [n]], positions)
                new = [np.take_along_axis(a, at[:, :, None, None], axis=1) for a in x]
                caches = write(caches, *new, at)
            y = attend(q, positions, caches)
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
