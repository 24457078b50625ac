"""Products with quantized weights as on a GPU, and its layouts. The same arithmetic runs on a CPU here."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import tiny

from minigpt4_jax.checkpoint.loader import load_model
from minigpt4_jax.checkpoint.parameters import named_tensors
from minigpt4_jax.config import LlmConfig
from minigpt4_jax.models.llm import Llm
from minigpt4_jax.quantization import layout, schemes
from minigpt4_jax.quantization.matmul import linear
from minigpt4_jax.utils import platform

N_OUT, N_IN = 48, 128
SCHEMES = ("int8", "int4", "int8/32", "int4/32", "int4/32+")


@pytest.fixture(autouse=True)
def traced_for_a_gpu(monkeypatch):
    monkeypatch.setenv("MINIGPT4_JAX_CUDNN", "0")
    with platform.compiling_for("gpu"):
        yield


def stored(scheme):
    """(levels, scale, offset or None) of a matrix [48, 128], as a directory stores them."""
    rng = np.random.default_rng(0)
    block_format = schemes.BlockFormat.parse(scheme)
    if block_format is None:
        levels, scale = schemes.quantize(rng.normal(size=(N_OUT, N_IN)), scheme)
        return levels, scale, None
    shapes = block_format.shapes((N_OUT, N_IN))
    low, high, dtype = (-128, 128, np.int8) if block_format.bits == 8 else (0, 256, np.uint8)
    floats = [rng.normal(size=shapes["_scale"]).astype(np.float32) for _ in range(2)]
    levels = rng.integers(low, high, shapes[""]).astype(dtype)
    return levels, floats[0], floats[1] if block_format.offset else None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_product_equals_that_of_dequantized_weights(scheme, rows, dtype):
    levels, scale, offset = stored(scheme)
    weight = schemes.dequantize(levels, scale, np.float32, np, offset)
    if scheme != "int8":
        levels = layout.to_memory_layout(
            "m.weight", levels, (N_OUT, scale.shape[1], levels.shape[1] // scale.shape[1])
        )
    arrays = [None if a is None else jnp.asarray(a, dtype) for a in (scale, offset)]
    x = np.random.default_rng(1).normal(size=(rows, N_IN)).astype(np.float32)
    # Arguments: XLA on a CPU folds constants of int4 wrongly.
    weights = (jnp.asarray(levels), *arrays)

    @jax.jit
    def product_and_gradient(x, levels, *arrays):
        product, pull = jax.vjp(lambda x: linear(x, levels, None, jnp.float32, *arrays), x)
        return product, *pull(jnp.zeros_like(product).at[..., 3].set(1))

    wanted, tolerance = x @ weight.T, 1e-5 if dtype == "float32" else 0.02
    found, dx = map(np.asarray, product_and_gradient(x, *weights))
    assert np.abs(found - wanted).max() < tolerance * np.abs(wanted).max()
    assert np.abs(dx[0] - weight[3]).max() < tolerance * np.abs(weight[3]).max()


def test_logits_of_one_row_are_sums_in_float32():
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((1, N_IN), (N_OUT, N_IN)))
    found = jax.jit(lambda x, w: linear(x, w, out=jnp.float32))(x, weight)
    wanted = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_layout_round_trip(dtype):
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 100, (6, 64)).astype(dtype)
    held = layout.to_memory_layout("m.weight", levels, (6, 2, 32))
    np.testing.assert_array_equal(layout.to_storage_layout("m.weight", held), levels)
    np.testing.assert_array_equal(layout.group_matrix(levels, 2), held)
    assert layout.storage_shape("m.weight", held.shape) == levels.shape


def test_a_quantized_model_answers_as_on_other_platforms(tmp_path):
    """Its parameters, read in the GPU's layout, are those of the directory; logits differ by rounding."""
    llm = LlmConfig(vocab=785, width=64, layers=2, heads=2, kv_heads=1, head_dim=32, ffn=96)
    folder = tiny.write_random_model(tmp_path / "model", llm=llm)
    tokens = jnp.asarray([[5, 9, 30]])

    def logits():
        model, _ = load_model(folder, stacked=False, quantize="int4")
        run = jax.jit(lambda llm: llm.logits(llm(llm.embed_tokens(tokens), jnp.asarray([3]))))
        return run(model.llm), dict(named_tensors(nnx.state(model))), model.llm

    found, tensors, ours = logits()
    assert ours.blocks[0].attn.q.weight.shape == (64, 1, 32)
    with platform.compiling_for("cpu"):
        wanted, expected, _ = logits()
    assert tensors.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(tensors[name], array)
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_decoding_equals_prefill(tmp_path, quantize):
    """One row at a time by sums along rows, as all rows together by products."""
    llm = LlmConfig(vocab=785, width=64, layers=2, heads=2, kv_heads=1, head_dim=32, ffn=96)
    folder = tiny.write_random_model(tmp_path / "model", llm=llm)
    model, config = load_model(folder, stacked=False, quantize=quantize)

    @jax.jit
    def run(decoder: Llm):
        embeds = decoder.embed_tokens(jnp.asarray([[5, 9, 30, 7]]))
        whole, _ = decoder.prefill(embeds, jnp.asarray([4]), 8)
        _, cache = decoder.prefill(embeds[:, :3], jnp.asarray([3]), 8)
        last, _ = decoder.decode(embeds[:, 3:], jnp.asarray([[3]]), cache)
        return whole, last

    whole, last = map(np.asarray, run(model.llm))
    np.testing.assert_allclose(last[0, 0], whole[0, 3], atol=1e-4 * np.abs(whole).max())
    assert dataclasses.replace(config, quantize=None).llm == llm
