"""The layers of a language model: attention of a row to itself and to an encoder, feed-forward layer,
and the block of both."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from minigpt4_jax.config import LlmConfig, LoraConfig
from minigpt4_jax.models.attention import attention
from minigpt4_jax.models.kv_cache import (
    CacheUpdate,
    KeysValues,
    Vectors,
    attend_to_cache,
    dequantize_vectors,
    round_vectors,
    write_caches,
)
from minigpt4_jax.models.layers import (
    ACTIVATIONS,
    LayerNorm,
    RMSNorm,
    make_norm,
    map_token_chunks,
    normalize,
)
from minigpt4_jax.models.lora import apply_linear, make_linear
from minigpt4_jax.models.positions import Rope, rotate


class Encoded(NamedTuple):
    """A prompt that an encoder has read."""

    states: jax.Array  # [B, S, D] float32
    lengths: jax.Array  # [B]


class Attention(nnx.Module):
    """Grouped-query attention: of a row to itself, or of the decoder to what an encoder has read."""

    def __init__(self, c: LlmConfig, lora: LoraConfig | None, rngs: nnx.Rngs):
        self.config = c
        q_width, kv_width = c.heads * c.head_dim, c.kv_heads * c.head_dim

        make = partial(make_linear, lora=lora, rngs=rngs)
        self.q = make("q", c.width, q_width, bias=c.qkv_bias)
        self.k = make("k", c.width, kv_width, bias=c.qkv_bias)
        self.v = make("v", c.width, kv_width, bias=c.qkv_bias)
        self.o = make("o", q_width, c.width, bias=c.o_bias)
        self.q_norm = RMSNorm(c.head_dim, c.eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.eps) if c.qk_norm else None

    @property
    def scale(self) -> float:
        """What scores are multiplied by."""
        return self.config.head_dim**-0.5 if self.config.scaled else 1.0

    def project_qkv(
        self, x: jax.Array, rope: Rope | None, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B, T, D] -> q [B, T, N, H], k and v [B, T, K, H]; q and k are rotated by rope."""
        c, (b, t, _) = self.config, x.shape
        q = apply_linear(self.q, x, key, 0).reshape(b, t, c.heads, c.head_dim)
        k = apply_linear(self.k, x, key, 1).reshape(b, t, c.kv_heads, c.head_dim)
        v = apply_linear(self.v, x, key, 2).reshape(b, t, c.kv_heads, c.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).astype(q.dtype), self.k_norm(k).astype(k.dtype)
        if rope is None:
            return q, k, v
        return rotate(q, *rope), rotate(k, *rope), v

    def __call__(
        self,
        x: jax.Array,
        rope: Rope | None,
        lengths: jax.Array,
        segments: jax.Array | None = None,
        key: jax.Array | None = None,
        cache: str | None = None,
        bias: jax.Array | None = None,
        causal: bool = True,
    ) -> tuple[jax.Array, KeysValues]:
        """Causal attention within right-padded rows, or within the segments of packed rows.

        x [B, T, D], lengths [B], segments [B, T] -> [B, T, D], and keys and values [B, T, K, H] for a
        cache. cache: its kind, as for `round_vectors`; rounded keys and values are what is attended to.
        bias [1, N, T, T]: added to the scores. causal: False: each token attends to the whole row.
        """
        c = self.config
        q, k, v = self.project_qkv(x, rope, key)
        kv: KeysValues = round_vectors(k, cache), round_vectors(v, cache)
        k, v = (dequantize_vectors(a, q.dtype) for a in kv)
        y = attention(
            q, k, v, scale=self.scale, causal=causal, lengths=lengths, segments=segments,
            window=c.window, bias=bias,
        )  # fmt: skip
        return apply_linear(self.o, y.reshape(*x.shape[:2], -1), key, 3), kv

    def project_kv(self, source: jax.Array, key: jax.Array | None = None) -> KeysValues:
        """Keys and values [B, S, K, H] of what an encoder has read [B, S, D]."""
        shape = (*source.shape[:2], self.config.kv_heads, self.config.head_dim)
        k, v = (apply_linear(m, source, key, n) for m, n in ((self.k, 8), (self.v, 9)))
        return k.reshape(shape), v.reshape(shape)

    def read(self, x: jax.Array, encoded: Encoded, key: jax.Array | None = None) -> jax.Array:
        """x [B, T, D] attends to what an encoder has read -> [B, T, D]."""
        q = self._query(x, key)
        k, v = (dequantize_vectors(a, q.dtype) for a in self.project_kv(encoded.states, key))
        y = attention(q, k, v, scale=self.scale, lengths=encoded.lengths)
        return apply_linear(self.o, y.reshape(*x.shape[:2], -1), key, 10)

    def read_cached(self, x: jax.Array, k: Vectors, v: Vectors, mask: jax.Array) -> jax.Array:
        """As `read`, of cached keys and values [B, K, S, H]; mask [B, 1, S]."""
        y = attend_to_cache(self._query(x), k, v, mask, scale=self.scale)
        return self.o(y.reshape(*x.shape[:2], -1))

    def _query(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        c = self.config
        return apply_linear(self.q, x, key, 7).reshape(*x.shape[:2], c.heads, c.head_dim)

    def decode(
        self,
        x: jax.Array,
        rope: Rope | None,
        update: CacheUpdate,
        kv: KeysValues,
        bias: jax.Array | None = None,
    ) -> tuple[jax.Array, KeysValues]:
        """x [B, T, D] attends to the cached keys and values kv [B, K, S, H], to which its own are
        added. bias [B, N, T, S]: of the scores. Returns [B, T, D] and the updated keys and values."""
        q, k, v = self.project_qkv(x, rope)
        keys, values = write_caches(kv, k, v, update.slots)
        mask = update.attention_mask
        y = attend_to_cache(q, keys, values, mask, scale=self.scale, bias=bias)
        return self.o(y.reshape(*x.shape[:2], -1)), (keys, values)


class Mlp(nnx.Module):
    """down(act(gate(x)) * up(x)), with SiLU SwiGLU; without a gate down(act(up(x))).
    [B, T, D] -> [B, T, D]."""

    def __init__(self, c: LlmConfig, lora: LoraConfig | None, rngs: nnx.Rngs):
        make = partial(make_linear, bias=c.mlp_bias, lora=lora, rngs=rngs)
        self.activation = c.activation
        self.gate = make("gate", c.width, c.ffn) if c.gated else None
        self.up = make("up", c.width, c.ffn)
        self.down = make("down", c.ffn, c.width)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:  # [B, T, D]
        act = ACTIVATIONS[self.activation]
        if self.gate is None:
            hidden = act(apply_linear(self.up, x, key, 5))
        else:
            hidden = act(apply_linear(self.gate, x, key, 4)) * apply_linear(self.up, x, key, 5)
        return apply_linear(self.down, hidden, key, 6)


class Block(nnx.Module):
    """One pre-norm layer; the residual stream is float32. cross: it also attends to an encoder."""

    def __init__(
        self, c: LlmConfig, lora: LoraConfig | None, rngs: nnx.Rngs, *, cross: bool = False
    ):
        self.norm1 = make_norm(c.norm, c.width, c.eps)
        self.attn = Attention(c, lora, rngs)
        self.norm2 = make_norm(c.norm, c.width, c.eps)
        self.mlp = Mlp(c, lora, rngs)
        self.cross_norm = make_norm(c.norm, c.width, c.eps) if cross else None
        self.cross = Attention(c, lora, rngs) if cross else None

    def _add_residuals(self, x: jax.Array, y: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Input x and attention output y, [B, T, D] each -> the block's output [B, T, D] float32."""
        x = x + y.astype(jnp.float32)
        return x + self.mlp(self._normalize(self.norm2, x), key).astype(jnp.float32)

    def _normalize(self, norm: RMSNorm | LayerNorm, x: jax.Array) -> jax.Array:
        # Products of one row with quantized weights compute the norm themselves.
        is_quantized = self.attn.q.weight_scale is not None
        return norm(x) if is_quantized else normalize(norm, x)

    def __call__(
        self,
        x: jax.Array,
        rope: Rope | None,
        lengths: jax.Array,
        segments: jax.Array | None = None,
        key: jax.Array | None = None,
        *,
        bias: jax.Array | None = None,
        causal: bool = True,
        encoded: Encoded | None = None,
    ) -> tuple[jax.Array, KeysValues]:
        """x [B, T, D] float32 -> the same shape, and keys and values [B, T, K, H]. key: enables dropout of
        the adapters; encoded: what a decoder of T5 answers to; other arguments as in `Attention`."""
        y, kv = self.attn(self.norm1(x), rope, lengths, segments, key, bias=bias, causal=causal)
        if encoded is not None and self.cross is not None and self.cross_norm is not None:
            x = x + y.astype(jnp.float32)
            y = self.cross.read(self.cross_norm(x), encoded, key)
        return self._add_residuals(x, y, key), kv

    def prefill(
        self, x: jax.Array, rope: Rope | None, lengths: jax.Array, cache: str | None
    ) -> tuple[jax.Array, KeysValues]:
        """As __call__, with the MLP in token chunks. cache: as in `Attention`."""
        y, kv = self.attn(self.norm1(x), rope, lengths, cache=cache)
        x = x + y.astype(jnp.float32)
        return x + map_token_chunks(lambda x: self.mlp(self.norm2(x)), x).astype(jnp.float32), kv

    def decode(
        self,
        x: jax.Array,
        rope: Rope | None,
        update: CacheUpdate,
        kv: KeysValues,
        *,
        bias: jax.Array | None = None,
        cross: tuple[Vectors, Vectors, jax.Array] | None = None,
    ) -> tuple[jax.Array, KeysValues]:
        """x [B, T, D] float32; other arguments and results as in `Attention.decode`. cross: the encoder's
        keys, values and mask, as for `Attention.read_cached`."""
        y, kv = self.attn.decode(self._normalize(self.norm1, x), rope, update, kv, bias)
        if cross is not None and self.cross is not None and self.cross_norm is not None:
            x = x + y.astype(jnp.float32)
            y = self.cross.read_cached(self.cross_norm(x), *cross)
        return self._add_residuals(x, y), kv
