"""Long prompts: attention in query chunks and MLPs in token chunks equal the unchunked results."""

import jax
import numpy as np
import pytest

from minigpt4_jax.models import attention, layers


@pytest.mark.smoke
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("queries", [16, 19])  # full chunks, and a remainder
def test_query_chunks(monkeypatch, window, queries):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, queries, 4, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, queries, 2, 8)).astype(np.float32)
    lengths = np.array([queries, 11])

    def run(q, k, v):
        y = attention.attention(q, k, v, scale=0.3, causal=True, lengths=lengths, window=window)
        return y, (y[0] ** 2).sum() + y[1, :11].sum()

    whole, whole_gradient = run(q, k, v)[0], jax.grad(lambda *a: run(*a)[1], (0, 1, 2))(q, k, v)
    monkeypatch.setattr(attention, "CHUNKED_FROM", 8)
    monkeypatch.setattr(attention, "QUERY_CHUNK", 8)
    assert "scan" in str(jax.make_jaxpr(run)(q, k, v))
    blocks, gradient = run(q, k, v)[0], jax.grad(lambda *a: run(*a)[1], (0, 1, 2))(q, k, v)
    for i, n in enumerate(lengths):
        np.testing.assert_allclose(blocks[i, :n], whole[i, :n], rtol=1e-5, atol=1e-6)
    for a, b in zip(gradient, whole_gradient, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [16, 19])
def test_token_chunks(monkeypatch, tokens):
    x = np.random.default_rng(0).normal(size=(2, tokens, 6)).astype(np.float32)
    w = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)

    def run(x):
        return layers.map_token_chunks(lambda x: jax.nn.silu(x @ w), x)

    whole = run(x)
    monkeypatch.setattr(layers, "CHUNKED_FROM", 8)
    monkeypatch.setattr(layers, "TOKEN_CHUNK", 8)
    assert "scan" in str(jax.make_jaxpr(run)(x))
    np.testing.assert_allclose(run(x), whole, rtol=1e-5, atol=1e-6)
