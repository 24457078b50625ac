"""What every network here is made of: linear maps, norms, attention, and the drivers of a block stack.

Axes: B batch, I images, P visual tokens per image, T sequence, S cache length, D width, F FFN,
N query heads, K key/value heads, H head dim, L layers, V vocabulary. Weights are [out, in].
A matrix product runs in the dtype of its weight; norms and softmax run in float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from minigpt4_jax.models.attention import CHUNKED_FROM
from minigpt4_jax.parallel.sharding import BATCH_AXES, all_gather_fsdp, constrain
from minigpt4_jax.quantization.matmul import linear

TOKEN_CHUNK = 512  # tokens of a long prompt that go through an MLP together


class Linear(nnx.Module):
    """A linear map, initialized as torch.nn.Linear is: uniform within 1 / sqrt(in).

    Quantized (minigpt4_jax/quantization/schemes.py), `weight` holds levels and `weight_scale` is there, and
    `weight_offset` where its blocks have one.
    """

    def __init__(self, n_in: int, n_out: int, *, bias: bool = True, rngs: nnx.Rngs):
        def uniform(*shape: int) -> jax.Array:
            return jax.random.uniform(rngs.params(), shape, minval=-(n_in**-0.5), maxval=n_in**-0.5)

        self.weight = nnx.Param(uniform(n_out, n_in))
        self.weight_scale: nnx.Param | None = nnx.data(None)
        self.weight_offset: nnx.Param | None = nnx.data(None)
        self.bias = nnx.Param(uniform(n_out)) if bias else None

    def __call__(self, x: jax.Array, bias: jax.Array | None = None, out: Any = None) -> jax.Array:
        """x [..., in] -> [..., out]. bias: in place of this map's own; out: as in `linear`."""
        if bias is None and self.bias is not None:
            bias = self.bias[...]
        scale = None if self.weight_scale is None else self.weight_scale[...]
        offset = None if self.weight_offset is None else self.weight_offset[...]
        return linear(x, self.weight[...], bias, out, scale, offset)


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis, in float32 whatever comes in. [..., D] -> [..., D] float32."""

    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        return x * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, in float32. [..., D] -> [..., D] float32."""

    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones(width))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        return x * self.scale[...].astype(jnp.float32)


def gelu(x: jax.Array) -> jax.Array:
    """Exact (erf) GELU, in float32, returned in x's dtype."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


def map_token_chunks(f: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """f(x) of x [B, T, D], for an f that treats every token alike: of a long prompt some tokens after
    others, as the widest activations of all would be the largest arrays there."""
    b, t, d = x.shape
    if t <= CHUNKED_FROM:
        return f(x)
    count = -(-t // TOKEN_CHUNK)
    x = jnp.pad(x, ((0, 0), (0, count * TOKEN_CHUNK - t), (0, 0)))
    y = jax.lax.map(f, jnp.moveaxis(x.reshape(b, count, TOKEN_CHUNK, d), 1, 0))
    return jnp.moveaxis(y, 0, 1).reshape(b, count * TOKEN_CHUNK, -1)[:, :t]


def lookup_rows(table: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of table [V, D] at index [...] -> [..., D]."""
    # Tied together, so that XLA on CPU, which gathers bfloat16 in float32, converts the rows it
    # takes; of a table that a loop does not change it would keep a float32 copy.
    table, index = jax.lax.optimization_barrier((table, index))
    return table[index]


def stack_layers(make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """`depth` layers as one module whose parameters carry a leading axis [L, ...], for `scan_layers`."""
    keys = jax.random.split(rngs.params(), depth)
    states = jax.vmap(lambda key: nnx.split(make(nnx.Rngs(params=key)))[1])(keys)
    return nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(params=0)))), states)


def run_layers(
    layers: Any,
    x: Any,
    step: Callable[[Any, Any], tuple[Any, Any]],
    *,
    part: str,
    heads: int,
    remat: bool = False,
) -> tuple[Any, Any]:
    """Apply layers in order: `step(layer, x) -> (x, extra)`; x is an array or a tuple of them.

    part and heads: "vit" or "llm", and how many heads its keys have, for `sharding.gathered`.

    Stacked layers (from `stack_layers`) run as one `lax.scan`, extras come back stacked [L, ...];
    an nnx.List runs unrolled, extras come back as a list. For the backward pass a stacked layer keeps
    the results of its weight products alone and computes norms, attention and activations again:
    half the memory, and faster than reading them back. remat: keep a layer's input only.
    On a mesh, the arrays [B, ...] of x are split by rows from layer to layer.
    """

    def rows(x: Any) -> Any:
        return jax.tree.map(lambda a: constrain(a, BATCH_AXES) if a.ndim else a, x)

    def split(layer: Any, x: Any) -> tuple[Any, Any]:
        x, extra = step(layer, rows(x))
        return rows(x), extra

    if isinstance(layers, nnx.List):
        body = jax.checkpoint(split) if remat else split
        extras = []
        for layer in layers:
            x, extra = body(layer, x)
            extras.append(extra)
        return x, extras
    graphdef, state = nnx.split(layers)

    def whole(path: tuple, leaf: Any) -> Any:
        name = ".".join(map(str, (part, "blocks", 0, *path)))
        return leaf.replace(all_gather_fsdp(leaf.get_value(), name, heads))

    def scanned(x: Any, layer_state: Any) -> tuple[Any, Any]:
        # Here, so that the backward pass gathers once what it computes again and what its gradients use.
        flat = [(path, whole(path, leaf)) for path, leaf in nnx.to_flat_state(layer_state)]
        return split(nnx.merge(graphdef, nnx.from_flat_state(flat)), x)

    keep = None if remat else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    # A scan's body cannot be merged with its recomputation, so nothing needs to prevent that.
    return jax.lax.scan(jax.checkpoint(scanned, policy=keep, prevent_cse=False), x, state)
