"""The splash attention kernel equals ordinary attention, forward and backward; which attention a GPU gets."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax.models.attention import (
    SPLASH_BLOCK,
    attention,
    cudnn_supports,
    splash_attention,
)
from minigpt4_jax.utils import platform


def test_the_kernel_equals_causal_attention():
    rows, tokens, heads, keys, width = 2, SPLASH_BLOCK + 70, 2, 1, 128
    rng = np.random.default_rng(0)
    q, k, v, g = (
        jnp.asarray(rng.normal(size=(rows, tokens, n, width)), jnp.float32)
        for n in (heads, keys, keys, heads)
    )
    lengths = jnp.array([tokens, SPLASH_BLOCK - 30])  # rows are padded on the right
    real = (jnp.arange(tokens) < lengths[:, None])[:, :, None, None]
    scale = width**-0.5

    def found(q, k, v):
        y = splash_attention(q, k, v, scale, interpret=True)
        return (jnp.where(real, y, 0) * g).sum(), y

    def expected(q, k, v):
        y = attention(q, k, v, scale=scale, causal=True, lengths=lengths)
        return (jnp.where(real, y, 0) * g).sum(), y

    ours, theirs = (
        jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True)(q, k, v) for f in (found, expected)
    )
    np.testing.assert_allclose(
        *(np.where(real, y[0][1], 0) for y in (ours, theirs)), rtol=1e-5, atol=1e-5
    )
    for one, other in zip(ours[1], theirs[1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("target", "tokens", "width", "dtype", "window", "uses_kernel"),
    [
        ("tpu", 1344, 128, jnp.bfloat16, None, True),
        ("tpu", 1024, 128, jnp.bfloat16, None, False),  # no gain for short rows
        ("tpu", 1344, 64, jnp.bfloat16, None, False),
        ("tpu", 1344, 128, jnp.float32, None, False),
        ("tpu", 1344, 128, jnp.bfloat16, 512, False),
        ("cpu", 1344, 128, jnp.bfloat16, None, False),
    ],
)
def test_long_rows_on_a_tpu_use_the_kernel(target, tokens, width, dtype, window, uses_kernel):
    """A program lowered for a TPU calls the kernel, compiled by Pallas."""

    def f(q, k, v):
        return attention(q, k, v, scale=0.1, causal=True, lengths=lengths, window=window)

    q, k = (jax.ShapeDtypeStruct((1, tokens, n, width), dtype) for n in (4, 2))
    lengths = jnp.array([tokens - 5])
    with platform.compiling_for(target):
        program = jax.jit(f).trace(q, k, k).lower(lowering_platforms=(target,)).as_text()
    assert ("tpu_custom_call" in program) == uses_kernel


@pytest.mark.parametrize(
    ("capability", "uses_cudnn", "dtype"),
    [((7, 5), False, "f32"), ((8, 0), True, "bf16"), ((0, 0), False, "bf16")],
)
def test_attention_depends_on_the_gpu(capability, uses_cudnn, dtype, monkeypatch):
    """cuDNN from Ampere on; before, float32, as XLA refuses bfloat16 there. (0, 0): not NVIDIA."""
    q = jax.ShapeDtypeStruct((1, 8, 2, 64), jnp.bfloat16)
    with platform.compiling_for("gpu", capability):
        assert cudnn_supports(q) == uses_cudnn
        monkeypatch.setenv("MINIGPT4_JAX_CUDNN", "0")
        program = jax.jit(lambda q: attention(q, q, q, scale=0.1, causal=True)).trace(q)
    assert program.out_info.dtype == jnp.bfloat16
    products = re.findall(r"dot_general.*?: \(tensor<[^>]*x(\w+)>", program.lower().as_text())
    assert products and set(products) == {dtype}
