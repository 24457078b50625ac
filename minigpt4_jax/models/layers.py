"""Layers shared by all networks: linear maps, norms, dropout, and running a stack of blocks.

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
from minigpt4_jax.utils.platform import backend, unrolls_layers
from minigpt4_jax.utils.rounding import round_up

TOKEN_CHUNK = 512  # tokens of a long prompt that an MLP processes at a time
GPU_TOKENS = 1 << 14  # of all rows, on a GPU: products of fewer tokens at a time are slower


class Linear(nnx.Module):
    """A linear map, initialized as torch.nn.Linear is: uniform within 1 / sqrt(in).

    Quantized (quantization/schemes.py), `weight` holds levels, `weight_scale` their scales, and
    `weight_offset` the offsets of block formats that have them.
    """

    def __init__(self, n_in: int, n_out: int, *, bias: bool = True, rngs: nnx.Rngs):
        def uniform(*shape: int) -> jax.Array:
            return jax.random.uniform(rngs.params(), shape, minval=-(n_in**-0.5), maxval=n_in**-0.5)

        self.weight = nnx.Param(uniform(n_out, n_in))
        self.weight_scale: nnx.Param[jax.Array] | None = nnx.data(None)
        self.weight_offset: nnx.Param[jax.Array] | None = nnx.data(None)
        self.bias = nnx.Param(uniform(n_out)) if bias else None

    def __call__(self, x: jax.Array, bias: jax.Array | None = None, out: Any = None) -> jax.Array:
        """x [..., in] -> [..., out]. bias [out]: replaces this map's own; out: dtype of the result."""
        if bias is None and self.bias is not None:
            bias = self.bias[...]
        scale = None if self.weight_scale is None else self.weight_scale[...]
        offset = None if self.weight_offset is None else self.weight_offset[...]
        return linear(x, self.weight[...], bias, out, scale, offset)


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis, computed in float32. [..., D] -> [..., D] float32."""

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


def make_norm(kind: str, width: int, eps: float) -> RMSNorm | LayerNorm:
    """A norm of the kind "rms" or "layer"."""
    return LayerNorm(width, eps) if kind == "layer" else RMSNorm(width, eps)


def normalize(norm: RMSNorm | LayerNorm, x: jax.Array) -> jax.Array:
    """norm(x) for x [B, T, D]. On a GPU one row is normalized as two equal ones: XLA makes one kernel of a
    norm over rows, and two of one over a single vector."""
    if backend() == "gpu" and x.size == x.shape[-1]:
        return norm(jnp.concatenate([x, x]))[:1]
    return norm(x)


def gelu(x: jax.Array) -> jax.Array:
    """Exact (erf) GELU, in float32, returned in x's dtype."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


def gelu_new(x: jax.Array) -> jax.Array:
    """GELU by tanh, in float32, returned in x's dtype."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu, "relu": jax.nn.relu, "gelu": gelu, "gelu_new": gelu_new
}  # fmt: skip


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero each element of x [...] with probability rate and scale the others by 1 / (1 - rate); the
    identity without a key."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def map_token_chunks(f: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """f(x) for x [B, T, D] and an f that acts on each token separately. A long prompt is processed in
    chunks of tokens: the MLP's activations of all tokens would be the largest arrays of a prefill."""
    b, t, d = x.shape
    if t <= CHUNKED_FROM or (backend() == "gpu" and b * t <= GPU_TOKENS):
        return f(x)
    padded = round_up(t, TOKEN_CHUNK)
    x = jnp.pad(x, ((0, 0), (0, padded - t), (0, 0)))
    y = jax.lax.map(f, jnp.moveaxis(x.reshape(b, -1, TOKEN_CHUNK, d), 1, 0))
    return jnp.moveaxis(y, 0, 1).reshape(b, padded, -1)[:, :t]


def lookup_rows(table: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of table [V, D] at index [...] -> [..., D]."""
    # XLA on CPU gathers bfloat16 in float32. Without the barrier it would convert the whole table once
    # outside a loop and keep the copy; with it, only the selected rows are converted.
    table, index = jax.lax.optimization_barrier((table, index))
    if backend() == "gpu" and index.size == 1 and not jax.sharding.get_abstract_mesh().empty:
        # XLA would take one row by a slice, for which every device gathers the whole table.
        return table[jnp.concatenate([index, index])][: len(index)]
    return table[index]


class SameKey:
    """Stands for nnx.Rngs where only the shapes of parameters matter.

    nnx.Rngs counts its keys, and while JAX traces, each count costs more than the parameter: an abstract
    model takes a quarter of the time without.
    """

    def __init__(self, params: jax.Array):
        self._key = params

    def params(self) -> jax.Array:
        return self._key


def stack_layers(make: Callable[[Any], nnx.Module], depth: int, rngs: Any) -> nnx.Module:
    """`depth` layers as one module whose parameters have a leading axis [L, ...], for `run_layers`.

    make: a layer from rngs. rngs: nnx.Rngs or SameKey.
    """
    new_rngs = SameKey if isinstance(rngs, SameKey) else nnx.Rngs
    keys = jax.random.split(rngs.params(), depth)
    states = jax.vmap(lambda key: nnx.split(make(new_rngs(params=key)))[1])(keys)
    layers: nnx.Module = nnx.merge(
        nnx.graphdef(nnx.eval_shape(lambda: make(SameKey(jax.random.key(0))))), states
    )
    return layers


def list_layers(layers: nnx.Module, depth: int) -> nnx.List[Any]:
    """Layers from `stack_layers` as a list of modules. Call it outside jit."""
    graphdef, state = nnx.split(layers)
    return nnx.List(
        [nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], state)) for i in range(depth)]
    )


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

    part, heads: what precedes the layer number in the parameters' names, such as "llm.blocks", and the
    number of key heads, for their sharding.

    Stacked layers (from `stack_layers`) run as one `lax.scan` and extras are stacked [L, ...]; an
    nnx.List runs unrolled and extras are a list. For the backward pass, a layer (of a list: on a GPU,
    where training uses lists) saves only the results of its weight products and recomputes norms,
    attention and activations: half the memory, and faster than reading them back. remat: save only the
    input of each layer. On a mesh, the arrays [B, ...] of x are split by rows between layers.
    """

    def constrain_rows(x: Any) -> Any:
        return jax.tree.map(lambda a: constrain(a, BATCH_AXES) if a.ndim else a, x)

    def constrained_step(layer: Any, x: Any) -> tuple[Any, Any]:
        x, extra = step(layer, constrain_rows(x))
        return constrain_rows(x), extra

    def gather(path: tuple[Any, ...], leaf: Any) -> Any:
        name = ".".join(map(str, (part, 0, *path)))
        return leaf.replace(all_gather_fsdp(leaf.get_value(), name, heads))

    def gathered_step(graphdef: Any, layer_state: Any, x: Any) -> tuple[Any, Any]:
        # Inside the checkpoint, so recomputation and gradients share one gather in the backward pass.
        flat = [(path, gather(path, leaf)) for path, leaf in nnx.to_flat_state(layer_state)]
        return constrained_step(nnx.merge(graphdef, nnx.from_flat_state(flat)), x)

    policy = None if remat else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    if isinstance(layers, nnx.List):
        body = jax.checkpoint(constrained_step) if remat else constrained_step
        if unrolls_layers():
            # Compiled as one function that is called for each layer, it is traced and lowered once.
            body = jax.jit(
                jax.checkpoint(lambda layer, x: gathered_step(*nnx.split(layer), x), policy=policy)
            )
        extras = []
        for layer in layers:
            x, extra = body(layer, x)
            extras.append(extra)
        return x, extras
    graphdef, state = nnx.split(layers)

    def scan_step(x: Any, layer_state: Any) -> tuple[Any, Any]:
        return gathered_step(graphdef, layer_state, x)

    # XLA cannot merge a scan's body with its recomputation, so prevent_cse is not needed.
    return jax.lax.scan(jax.checkpoint(scan_step, policy=policy, prevent_cse=False), x, state)
