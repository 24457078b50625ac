"""Attention by a kernel: the numbers of ordinary attention, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np

from minigpt4_jax.models import kernels
from minigpt4_jax.models.layers import attention


def test_the_kernel_is_causal_attention():
    rows, tokens, heads, keys, width = 2, kernels.BLOCK + 70, 2, 1, 128
    rng = np.random.default_rng(0)
    q, k, v, g = (
        jnp.asarray(rng.normal(size=(rows, tokens, n, width)), jnp.float32)
        for n in (heads, keys, keys, heads)
    )
    lengths = jnp.array([tokens, kernels.BLOCK - 30])  # rows are padded on the right
    real = (jnp.arange(tokens) < lengths[:, None])[:, :, None, None]
    scale = width**-0.5

    def found(q, k, v):
        y = kernels.causal_attention(q, k, v, scale, interpret=True)
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
