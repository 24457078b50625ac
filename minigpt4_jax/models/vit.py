"""EVA-ViT-g, the frozen vision encoder (EVA paper; the original's minigpt4/models/eva_vit.py)."""

import jax
import jax.numpy as jnp
from flax import nnx

from minigpt4_jax.config import VisionConfig
from minigpt4_jax.models.attention import attention
from minigpt4_jax.models.layers import LayerNorm, Linear, gelu, run_layers, stack_layers
from minigpt4_jax.parallel.sharding import BATCH_AXES, constrain
from minigpt4_jax.utils.platform import backend

GPU_INPUTS = 8  # cuBLAS multiplies bfloat16 matrices with a multiple of this many inputs


def pad_patch_weight(weight: jax.Array) -> jax.Array:
    """The weight [D, 3 * patch size ** 2] of the patch embedding as a GPU multiplies it: with inputs of 0 up
    to a multiple of 8. XLA would make this copy in every step."""
    if backend() != "gpu":
        return weight
    return jnp.pad(weight, ((0, 0), (0, -weight.shape[1] % GPU_INPUTS)))


class Attention(nnx.Module):
    """Self-attention with a fused QKV projection; queries and values have a bias, keys do not."""

    def __init__(self, c: VisionConfig, rngs: nnx.Rngs):
        self.qkv = Linear(c.width, 3 * c.width, bias=False, rngs=rngs)
        self.q_bias = nnx.Param(jnp.zeros(c.width))
        self.v_bias = nnx.Param(jnp.zeros(c.width))
        self.out = Linear(c.width, c.width, rngs=rngs)
        self.heads = c.heads

    def __call__(self, x: jax.Array) -> jax.Array:  # [B, T, D]
        b, t, d = x.shape
        q_bias = self.q_bias[...]
        bias = jnp.concatenate([q_bias, jnp.zeros_like(q_bias), self.v_bias[...]])
        qkv = self.qkv(x, bias).reshape(b, t, 3, self.heads, d // self.heads)
        # A shard of the fused projection's outputs does not match a shard of the heads: reshard.
        q, k, v = (
            constrain(qkv[:, :, i], BATCH_AXES, None, "model") for i in range(3)
        )  # [B, T, N, H]
        return self.out(attention(q, k, v, scale=(d // self.heads) ** -0.5).reshape(b, t, d))


class Mlp(nnx.Module):
    """Feed-forward layer."""

    def __init__(self, width: int, hidden: int, rngs: nnx.Rngs):
        self.up = Linear(width, hidden, rngs=rngs)
        self.down = Linear(hidden, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # [..., D]
        return self.down(gelu(self.up(x)))


class Block(nnx.Module):
    """One pre-norm transformer layer; the residual stream is float32."""

    def __init__(self, c: VisionConfig, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(c.width, c.eps)
        self.attn = Attention(c, rngs)
        self.norm2 = LayerNorm(c.width, c.eps)
        self.mlp = Mlp(c.width, c.mlp, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # [B, T, D] float32
        x = x + self.attn(self.norm1(x)).astype(jnp.float32)
        return x + self.mlp(self.norm2(x)).astype(jnp.float32)


class Vit(nnx.Module):
    """Normalized pixels [B, S, S, 3] float32 -> tokens [B, 1 + patches, D] float32, before the final
    norm; S is the image size here."""

    def __init__(self, c: VisionConfig, rngs: nnx.Rngs):
        self.config = c
        self.patch = Linear(3 * c.patch_size**2, c.width, rngs=rngs)
        self.cls = nnx.Param(0.02 * jax.random.normal(rngs.params(), (c.width,)))
        self.pos = nnx.Param(0.02 * jax.random.normal(rngs.params(), (c.patches + 1, c.width)))
        self.blocks = stack_layers(lambda r: Block(c, r), c.depth, rngs)

    def embed(self, pixels: jax.Array) -> jax.Array:
        """Patch embedding (a convolution with stride = kernel): [B, S, S, 3] -> [B, patches, D]."""
        size, p = self.config.image_size, self.config.patch_size
        if pixels.shape[1:] != (size, size, 3):
            raise ValueError(f"pixels {pixels.shape}: expected [B, {size}, {size}, 3]")
        g = size // p
        x = pixels.reshape(-1, g, p, g, p, 3).transpose(0, 1, 3, 5, 2, 4)  # [B, g, g, 3, p, p]
        x = x.reshape(-1, g * g, 3 * p * p)
        padding = self.patch.weight.shape[1] - x.shape[2]  # see `pad_patch_weight`
        if padding:
            x = jnp.pad(x, ((0, 0), (0, 0), (0, padding)))
        return self.patch(x)

    def __call__(self, pixels: jax.Array, *, remat: bool = False) -> jax.Array:
        """pixels [B, S, S, 3] -> [B, 1 + patches, D]. remat: save only each layer's input."""
        x = self.embed(pixels).astype(jnp.float32)
        cls = jnp.broadcast_to(self.cls[...].astype(jnp.float32), (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([cls, x], axis=1) + self.pos[...].astype(jnp.float32)
        heads = self.config.heads
        tokens: jax.Array
        tokens, _ = run_layers(
            self.blocks,
            x,
            lambda block, x: (block(x), None),
            part="vit.blocks",
            heads=heads,
            remat=remat,
        )
        return tokens
