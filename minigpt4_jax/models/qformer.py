"""The Q-Former: learned queries that read an image through cross-attention (BLIP-2 paper, section 3.1;
the original's minigpt4/models/Qformer.py with its text branch removed)."""

import jax
import jax.numpy as jnp
from flax import nnx

from minigpt4_jax.config import QFormerConfig
from minigpt4_jax.models.layers import LayerNorm, Linear, dropout, gelu
from minigpt4_jax.parallel.sharding import BATCH_AXES, constrain


def _fold(key: jax.Array | None, i: int) -> jax.Array | None:
    """The i-th key derived from a dropout key; None: no dropout."""
    return None if key is None else jax.random.fold_in(key, i)


class Attention(nnx.Module):
    """Post-norm attention of the queries to a source: themselves, or the vision tokens."""

    def __init__(self, c: QFormerConfig, source_width: int, rngs: nnx.Rngs):
        self.q = Linear(c.hidden, c.hidden, rngs=rngs)
        self.k = Linear(source_width, c.hidden, rngs=rngs)
        self.v = Linear(source_width, c.hidden, rngs=rngs)
        self.out = Linear(c.hidden, c.hidden, rngs=rngs)
        self.norm = LayerNorm(c.hidden, c.eps)
        self.heads, self.rate = c.heads, c.dropout

    def __call__(self, x: jax.Array, source: jax.Array, key: jax.Array | None) -> jax.Array:
        """x [B, P, D] float32, source [B, T, Dv], key: for dropout -> [B, P, D] float32."""
        b, p, d = x.shape
        q, k, v = (
            y.reshape(b, -1, self.heads, d // self.heads)  # [B, P or T, N, H]
            for y in (self.q(x), self.k(source), self.v(source))
        )
        # Not `attention`: the probabilities have dropout when the Q-Former is trained.
        precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
        scores = jnp.einsum(
            "bpnh,btnh->bnpt", q, k, precision=precision, preferred_element_type=jnp.float32
        )
        probs = jax.nn.softmax(scores / (d // self.heads) ** 0.5, axis=-1)
        probs = dropout(probs, self.rate, _fold(key, 0)).astype(v.dtype)
        y = jnp.einsum("bnpt,btnh->bpnh", probs, v, precision=precision).reshape(b, p, d)
        y = dropout(self.out(y).astype(jnp.float32), self.rate, _fold(key, 1))
        return self.norm(x + y)


class Mlp(nnx.Module):
    """Post-norm feed-forward layer of the queries."""

    def __init__(self, c: QFormerConfig, rngs: nnx.Rngs):
        self.up = Linear(c.hidden, c.ffn, rngs=rngs)
        self.down = Linear(c.ffn, c.hidden, rngs=rngs)
        self.norm = LayerNorm(c.hidden, c.eps)
        self.rate = c.dropout

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:  # [B, P, D]
        y = self.down(gelu(self.up(x))).astype(jnp.float32)
        return self.norm(x + dropout(y, self.rate, key))


class Block(nnx.Module):
    """Self-attention, cross-attention (in every `cross_every`-th layer), feed-forward."""

    def __init__(self, c: QFormerConfig, index: int, rngs: nnx.Rngs):
        self.attn = Attention(c, c.hidden, rngs)
        has_cross = index % c.cross_every == 0
        self.cross = Attention(c, c.vision_width, rngs) if has_cross else None
        self.mlp = Mlp(c, rngs)

    def __call__(self, x: jax.Array, vision: jax.Array, key: jax.Array | None) -> jax.Array:
        """x [B, P, D] float32, vision [B, T, Dv], key: for dropout -> [B, P, D] float32."""
        x = self.attn(x, x, _fold(key, 0))
        if self.cross is not None:
            x = self.cross(x, vision, _fold(key, 1))
        return self.mlp(x, _fold(key, 2))


class QFormer(nnx.Module):
    """Vision tokens [B, T, Dv] float32 -> query outputs [B, P, D] float32; D is the hidden width."""

    def __init__(self, c: QFormerConfig, rngs: nnx.Rngs):
        self.rate = c.dropout
        self.query = nnx.Param(0.02 * jax.random.normal(rngs.params(), (c.queries, c.hidden)))
        self.norm = LayerNorm(c.hidden, c.eps)
        # A list: scanning a dozen small layers of two kinds gains nothing.
        self.blocks = nnx.List([Block(c, i, rngs) for i in range(c.layers)])

    def __call__(self, vision: jax.Array, *, dropout_key: jax.Array | None = None) -> jax.Array:
        """vision [B, T, Dv] -> [B, P, D]. dropout_key: enables dropout."""
        x = self.norm(self.query[...])
        x = jnp.broadcast_to(x, (vision.shape[0], *x.shape))
        x = dropout(x, self.rate, _fold(dropout_key, 0))
        for i, block in enumerate(self.blocks):
            x = block(constrain(x, BATCH_AXES), vision, _fold(dropout_key, i + 1))
        return x
