"""Low-rank adapters on linear maps (LoRA paper; peft's lora.Linear)."""

import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from minigpt4_jax.config import LoraConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.models.layers import Linear, dropout
from minigpt4_jax.quantization.matmul import linear, precision
from minigpt4_jax.utils.platform import backend

Array = TypeVar("Array", jax.Array, np.ndarray)


def merge_lora(weight: Array, a: Array, b: Array, factor: float) -> Array:
    """weight [..., out, in] + factor * b [..., out, r] @ a [..., r, in], in float32; factor: alpha /
    rank, or its negative to undo a merge. Arrays of NumPy or JAX."""
    product = b.astype(np.float32) @ a.astype(np.float32)
    return weight.astype(np.float32) + factor * product


class LoraLinear(Linear):
    """y = W x + b + alpha / rank * B (A x). A [r, in] is Kaiming-uniform, B [out, r] starts at zero.

    W may be quantized. A and B are float32 and compute in W's dtype. After `merge` the adapter is part
    of W, and a call costs no more than that of a plain linear map.
    """

    def __init__(self, n_in: int, n_out: int, *, bias: bool, lora: LoraConfig, rngs: nnx.Rngs):
        super().__init__(n_in, n_out, bias=bias, rngs=rngs)
        bound = n_in**-0.5  # Kaiming-uniform with a = sqrt(5)
        a = jax.random.uniform(rngs.params(), (lora.rank, n_in), minval=-bound, maxval=bound)
        self.lora_a = nnx.Param(a)
        self.lora_b = nnx.Param(jnp.zeros((n_out, lora.rank)))
        self.scale = lora.alpha / lora.rank
        self.dropout = lora.dropout
        self.merged = False

    def __call__(
        self,
        x: jax.Array,
        bias: jax.Array | None = None,
        out: Any = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """x [..., in] -> [..., out]; bias and out as in `Linear`. key: enables dropout of the adapter's
        input."""
        y = super().__call__(x, bias, out)
        if self.merged:
            return y
        weight = self.weight if self.weight_scale is None else self.weight_scale
        dtype = weight[...].dtype
        low = linear(dropout(x, self.dropout, key), self.lora_a[...].astype(dtype))
        up_project = _up_projection if _is_large(low) else _plain_up_projection
        delta = up_project(low, self.lora_b[...].astype(dtype))
        return y + (self.scale * delta).astype(y.dtype)

    def merge(self) -> None:
        """Add the adapter to the weights, in float32. UserError for quantized weights."""
        self._add(1.0)

    def unmerge(self) -> None:
        """The inverse of `merge`, up to rounding in the weights' dtype."""
        self._add(-1.0)

    def _add(self, sign: float) -> None:
        if self.merged == (sign > 0):
            return
        if self.weight_scale is not None:
            raise UserError(
                "LoRA cannot be merged into quantized weights: merge it into the unquantized model, "
                "and quantize the result"
            )
        weight = self.weight[...]
        with jax.default_matmul_precision("highest"):
            merged = merge_lora(weight, self.lora_a[...], self.lora_b[...], sign * self.scale)
        self.weight.set_value(merged.astype(weight.dtype))
        self.merged = sign > 0


def _is_large(low: jax.Array) -> bool:
    """Whether low [..., r] has so many rows that the copies `_up_projection` avoids are large."""
    return backend() == "cpu" and math.prod(low.shape[:-1]) > 256


def _plain_up_projection(low: jax.Array, b: jax.Array) -> jax.Array:
    """low [..., r], b [out, r] -> [..., out] float32."""
    return linear(low, b, out=jnp.float32)


_up_projection = jax.custom_vjp(_plain_up_projection)


def _up_projection_forward(
    low: jax.Array, b: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _plain_up_projection(low, b), (low, b)


def _up_projection_backward(
    residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients with the narrow factor first: XLA on CPU transposes the first factor of a product over
    rows. Autodiff puts dy [..., out] there, and copying it took a third of a training step."""
    low, b = residuals
    (d_low,) = jax.vjp(lambda low: linear(low, b, out=jnp.float32), low)[1](dy)
    rows, dy = (a.reshape(-1, a.shape[-1]).astype(b.dtype) for a in (low, dy))
    d_b = jnp.einsum(
        "nr,no->ro", rows, dy, precision=precision(b.dtype), preferred_element_type=jnp.float32
    )
    return d_low, jax.lax.optimization_barrier(d_b).T.astype(b.dtype)


_up_projection.defvjp(_up_projection_forward, _up_projection_backward)


def make_linear(
    name: str, n_in: int, n_out: int, *, bias: bool, lora: LoraConfig | None, rngs: nnx.Rngs
) -> Linear:
    """A linear map of the language model, with an adapter if `lora.targets` contains its name."""
    if lora is not None and name in lora.targets:
        return LoraLinear(n_in, n_out, bias=bias, lora=lora, rngs=rngs)
    return Linear(n_in, n_out, bias=bias, rngs=rngs)


def apply_linear(layer: Linear, x: jax.Array, key: jax.Array | None, n: int) -> jax.Array:
    """layer(x) for x [..., in]. key: the block's dropout key, folded with n for this layer's adapter."""
    if key is not None and isinstance(layer, LoraLinear):
        return layer(x, key=jax.random.fold_in(key, n))
    return layer(x)


def lora_layers(model: nnx.Module) -> list[LoraLinear]:
    """The linear maps with adapters in a model; the stacked layers of one name count as one."""
    return [m for _, m in nnx.iter_modules(model) if isinstance(m, LoraLinear)]
