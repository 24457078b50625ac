"""LoRA on every projection and family: output, dropout, merging, gradients."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from minigpt4_jax.config import LORA_TARGETS, LlmConfig, LoraConfig, ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.models.llm import Llm, unstack
from minigpt4_jax.models.lora import LoraLinear, lora_layers
from minigpt4_jax.models.positions import rotary
from minigpt4_jax.quantization.schemes import quantize

SIZES = {"vocab": 40, "width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 4, "ffn": 24}
FAMILIES = {
    "llama": {},
    "mistral": {"window": 3},
    "qwen2": {"qkv_bias": True, "tie": True},
    "qwen3": {"qk_norm": True, "head_dim": 6},
    "with biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
}
LORA = LoraConfig(rank=2, alpha=3.0, dropout=0.4, targets=LORA_TARGETS)


def model(family="llama", lora=LORA):
    """A language model with all parameters random, including B of its adapters."""
    c = LlmConfig(**(SIZES | FAMILIES[family]))
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Llm(c, lora, nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    flat = [
        (path, leaf.replace(jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32)))
        for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


@partial(jax.jit, static_argnames="remat")
def run(llm, x, dropout_key, remat):
    return llm(x, jnp.asarray([7, 5]), dropout_key=dropout_key, remat=remat)


def hidden(llm, *, dropout_key=None, remat=False):
    x = np.random.default_rng(1).normal(size=(2, 7, 16)).astype(np.float32)
    return np.asarray(run(llm, x, dropout_key, remat))


def without(llm):
    """The model without adapters, with W + alpha / rank * B A for each adapted W, computed in NumPy."""
    plain = nnx.eval_shape(lambda: Llm(llm.config, None, nnx.Rngs(0)))
    have = {path: np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(nnx.state(llm))}
    for path, leaf in nnx.to_flat_state(nnx.state(plain)):
        value = have[path]
        if (a := have.get((*path[:-1], "lora_a"))) is not None and path[-1] == "weight":
            value = value + 1.5 * have[(*path[:-1], "lora_b")] @ a
        leaf.set_value(jnp.asarray(value))
    return plain


@pytest.mark.parametrize("family", FAMILIES)
def test_output_equals_that_of_the_summed_weights(family):
    llm = model(family)
    assert len(lora_layers(llm)) == 7
    wanted, found = hidden(without(llm)), hidden(llm)
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    before = {path: leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(llm))}
    for layer in lora_layers(llm):
        layer.merge()
        layer.merge()  # a second time changes nothing
    np.testing.assert_allclose(hidden(llm), wanted, atol=2e-5)
    for layer in lora_layers(llm):
        layer.unmerge()
    for path, leaf in nnx.to_flat_state(nnx.state(llm)):
        np.testing.assert_allclose(leaf.get_value(), before[path], atol=1e-6)
    np.testing.assert_allclose(hidden(llm), found, atol=2e-5)


@pytest.mark.smoke
def test_merging_unstacked_layers_equals_merging_stacked_layers():
    stacked, apart = model(), unstack(model())
    for layer in lora_layers(stacked) + lora_layers(apart):
        layer.merge()
    assert len(lora_layers(apart)) == 14
    for one, other in zip(
        jax.tree.leaves(nnx.state(unstack(stacked))), jax.tree.leaves(nnx.state(apart)), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_dropout_depends_on_key_and_layer_and_is_off_without_a_key():
    llm = model()
    off, one, again, other = (
        hidden(llm, dropout_key=None if k is None else jax.random.key(k)) for k in (None, 1, 1, 2)
    )
    np.testing.assert_array_equal(off, hidden(llm))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - off).max() > 0.01 and np.abs(one - other).max() > 0.01
    np.testing.assert_allclose(
        hidden(llm, dropout_key=jax.random.key(1), remat=True), one, rtol=1e-4
    )
    # two layers of equal weights drop different inputs: one key for both gives something else
    same = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)[[0, 0]]), nnx.state(llm.blocks))
    nnx.update(llm.blocks, same)
    block = unstack(llm).blocks[0]
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 7, 16)), jnp.float32)
    rope, key = rotary(llm.config, jnp.arange(7)[None]), jax.random.key(1)
    keys = [jax.random.fold_in(key, 0)] * 2

    @jax.jit
    def with_keys(block, norm, x):
        for k in keys:
            x, _ = block(x, rope, jnp.asarray([7, 5]), key=k)
        return norm(x)

    found = np.asarray(with_keys(block, llm.norm, x))
    assert np.abs(found - hidden(llm, dropout_key=key)).max() > 0.01


def test_dropout_zeroes_its_rate_and_scales_the_rest():
    layer = LoraLinear(1, 1, bias=False, lora=LoraConfig(1, 1.0, 0.25), rngs=nnx.Rngs(0))
    for p, value in ((layer.weight, 0), (layer.lora_a, 1), (layer.lora_b, 1)):
        p.set_value(jnp.full((1, 1), value, jnp.float32))
    y = np.asarray(layer(jnp.ones((4000, 1)), key=jax.random.key(0)))
    np.testing.assert_allclose(np.unique(y), [0, 1 / 0.75], rtol=1e-6)
    assert 0.22 < (y == 0).mean() < 0.28


def test_quantized_weights_accept_adapters_but_cannot_be_merged():
    layer = LoraLinear(64, 8, bias=False, lora=LORA, rngs=nnx.Rngs(0))
    layer.lora_b.set_value(jnp.ones((8, 2)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 64)), jnp.float32)
    exact = layer(x)
    levels, scale = quantize(layer.weight[...], "int8", jnp)
    layer.weight = nnx.Param(levels)
    layer.weight_scale = nnx.Param(scale.astype(jnp.float32))
    np.testing.assert_allclose(layer(x), exact, atol=0.01)
    with pytest.raises(UserError, match="quantized"):
        layer.merge()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"targets": ()}, "name some of q, k, v, o, gate, up, down"),
        ({"targets": ("q", "w")}, "w unknown"),
        ({"targets": ("q", "q")}, "duplicate"),
        ({"rank": 0}, "rank 0"),
        ({"alpha": -1.0}, "alpha -1.0"),
        ({"dropout": 1.0}, "dropout 1.0"),
    ],
)
def test_invalid_configurations_are_errors(changes, word):
    with pytest.raises(UserError, match=word):
        ModelConfig(lora=dataclasses.replace(LORA, **changes)).check()


def test_gradients_of_many_rows_equal_those_of_few():
    rng = np.random.default_rng(0)
    layer = LoraLinear(
        12,
        20,
        bias=False,
        lora=LoraConfig(rank=3, alpha=6, dropout=0, targets=("q",)),
        rngs=nnx.Rngs(0),
    )
    layer.lora_b.set_value(jnp.asarray(rng.normal(size=(20, 3)), jnp.float32))
    x = rng.normal(size=(2, 160, 12)).astype(np.float32)  # 320 rows: by the other product

    def gradients(parts):
        def loss(layer):
            return sum(jnp.square(layer(part)).sum() for part in parts)

        return jax.tree.leaves(jax.jit(nnx.grad(loss))(layer))

    many, few = gradients([x]), gradients([x[:, :80], x[:, 80:]])
    for a, b in zip(many, few, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)
