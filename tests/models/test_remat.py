"""What a layer keeps for its backward pass: results of products with weights, in every type."""

import jax
import jax.numpy as jnp
import pytest

from minigpt4_jax.aot.cost import cost_of
from minigpt4_jax.aot.hlo import parse
from minigpt4_jax.models.layers import Linear, run_layers, stack_layers

pytestmark = pytest.mark.default_compiler

LAYERS, ROWS, WIDTH = 3, 32, 16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("remat", [False, True])
def test_products_are_computed_again_only_if_asked(dtype, remat):
    from flax import nnx

    layers = stack_layers(lambda r: Linear(WIDTH, WIDTH, bias=False, rngs=r), LAYERS, nnx.Rngs(0))
    graphdef, weights = nnx.split(layers)
    weights = jax.tree.map(lambda a: a.astype(dtype), weights)

    def loss(x, weights):
        step = lambda layer, x: (jnp.tanh(layer(jnp.sin(x)).astype(jnp.float32)), None)  # noqa: E731
        model = nnx.merge(graphdef, weights)
        return run_layers(model, x, step, part="llm", heads=1, remat=remat)[0].sum()

    x = jnp.ones((ROWS, WIDTH))
    program = jax.jit(jax.grad(loss)).lower(x, weights).compile().as_text()
    product = 2 * ROWS * WIDTH * WIDTH
    assert cost_of(parse(program)).flops == LAYERS * (3 if remat else 2) * product
