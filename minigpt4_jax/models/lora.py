"""Low-rank adapters on frozen linear maps (LoRA paper; peft's lora.Linear)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from minigpt4_jax.config import LoraConfig
from minigpt4_jax.models.layers import Linear, linear


class LoraLinear(Linear):
    """y = W x + b + alpha / rank * B (A x). A [r, in] is Kaiming-uniform, B [out, r] starts at zero."""

    def __init__(self, n_in: int, n_out: int, *, bias: bool, lora: LoraConfig, rngs: nnx.Rngs):
        super().__init__(n_in, n_out, bias=bias, rngs=rngs)
        bound = n_in**-0.5  # Kaiming-uniform with a = sqrt(5)
        a = jax.random.uniform(rngs.params(), (lora.rank, n_in), minval=-bound, maxval=bound)
        self.lora_a = nnx.Param(a)
        self.lora_b = nnx.Param(jnp.zeros((n_out, lora.rank)))
        self.scale = lora.alpha / lora.rank

    def __call__(self, x: jax.Array, bias: jax.Array | None = None, out: Any = None) -> jax.Array:
        y = super().__call__(x, bias, out)
        low = linear(linear(x, self.lora_a[...]), self.lora_b[...])  # float32
        return y + (self.scale * low).astype(y.dtype)
