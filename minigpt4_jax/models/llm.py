"""The language model: a LLaMA-like decoder for LLaMA 1/2/3, Vicuna, Mistral, Qwen2/3 and SmolLM2
(LLaMA paper; families differ in LlmConfig only)."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from minigpt4_jax.config import LlmConfig, LoraConfig, RopeScaling
from minigpt4_jax.models.attention import attention
from minigpt4_jax.models.kv_cache import (
    CacheUpdate,
    KVCache,
    QuantizedArray,
    attend_to_cache,
    causal_cache_update,
    dequantize_vectors,
    new_cache,
    quantize_vectors,
    write_cache,
)
from minigpt4_jax.models.layers import (
    Linear,
    RMSNorm,
    lookup_rows,
    map_token_chunks,
    run_layers,
    stack_layers,
)
from minigpt4_jax.models.lora import apply_linear, make_linear
from minigpt4_jax.parallel.sharding import BATCH_AXES, constrain
from minigpt4_jax.quantization.matmul import linear
from minigpt4_jax.quantization.schemes import dequantize


def rope_frequencies(c: LlmConfig) -> np.ndarray:
    """Rotary frequencies [H / 2] float32 (RoFormer paper), with the model's long-context scaling."""
    freq = 1.0 / c.rope_theta ** (np.arange(0, c.head_dim, 2, dtype=np.float32) / c.head_dim)
    scaling = c.rope_scaling
    if scaling is None:
        return freq.astype(np.float32)
    if scaling.kind == "linear":
        return (freq / scaling.factor).astype(np.float32)
    return _llama3_frequencies(freq, scaling).astype(np.float32)


def _llama3_frequencies(freq: np.ndarray, s: RopeScaling) -> np.ndarray:
    """Llama 3.1's rule: long wavelengths are stretched, short ones kept, those between blended."""
    wavelength = 2 * math.pi / freq
    blend = (s.original_max_length / wavelength - s.low_freq_factor) / (
        s.high_freq_factor - s.low_freq_factor
    )
    blend = np.clip(blend, 0.0, 1.0)  # 1 keeps the frequency, 0 divides it by the factor
    return (1 - blend) * freq / s.factor + blend * freq


def rotary(c: LlmConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """positions [B, T] int32 -> cos and sin [B, T, 1, H / 2] float32."""
    angles = positions[..., None].astype(jnp.float32) * rope_frequencies(c)
    return jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Half-split rotary embedding of x [B, T, N, H]: dimension i turns with i + H / 2."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
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

    def heads(self, x: jax.Array, rope: Any, key: jax.Array | None = None) -> tuple[jax.Array, ...]:
        """x [B, T, D] -> q [B, T, N, H], k and v [B, T, K, H], rotated."""
        c, (b, t, _) = self.config, x.shape
        q = apply_linear(self.q, x, key, 0).reshape(b, t, c.heads, c.head_dim)
        k = apply_linear(self.k, x, key, 1).reshape(b, t, c.kv_heads, c.head_dim)
        v = apply_linear(self.v, x, key, 2).reshape(b, t, c.kv_heads, c.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).astype(q.dtype), self.k_norm(k).astype(k.dtype)
        return rotate(q, *rope), rotate(k, *rope), v

    def __call__(
        self,
        x: jax.Array,
        rope: Any,
        lengths: jax.Array,
        segments: jax.Array | None = None,
        key: jax.Array | None = None,
        int8: bool = False,
    ) -> tuple[jax.Array, tuple]:
        """Causal attention within right-padded rows, or within the segments of packed ones. Returns
        [B, T, D] and the (k, v) for a cache.

        int8: for a cache that is rounded; the rows see its keys and values then.
        """
        c = self.config
        q, k, v = self.heads(x, rope, key)
        kv = (quantize_vectors(k), quantize_vectors(v)) if int8 else (k, v)
        k, v = (dequantize_vectors(a, q.dtype) for a in kv)
        y = attention(
            q, k, v, scale=c.head_dim**-0.5, causal=True, lengths=lengths, segments=segments,
            window=c.window,
        )  # fmt: skip
        return apply_linear(self.o, y.reshape(*x.shape[:2], -1), key, 3), kv

    def decode(
        self, x: jax.Array, rope: Any, update: CacheUpdate, kv: tuple
    ) -> tuple[jax.Array, tuple]:
        """x [B, T, D] against kv, each [B, K, S, H], where theirs is written."""
        c = self.config
        q, k, v = self.heads(x, rope)
        new = (
            (quantize_vectors(k), quantize_vectors(v))
            if isinstance(kv[0], QuantizedArray)
            else (k, v)
        )
        keys, values = (write_cache(a, b, update.slots) for a, b in zip(kv, new, strict=True))
        y = attend_to_cache(q, keys, values, update.attention_mask, scale=c.head_dim**-0.5)
        return self.o(y.reshape(*x.shape[:2], -1)), (keys, values)


class Mlp(nnx.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, c: LlmConfig, lora: LoraConfig | None, rngs: nnx.Rngs):
        make = partial(make_linear, bias=c.mlp_bias, lora=lora, rngs=rngs)
        self.gate = make("gate", c.width, c.ffn)
        self.up = make("up", c.width, c.ffn)
        self.down = make("down", c.ffn, c.width)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:  # [B, T, D]
        wide = jax.nn.silu(apply_linear(self.gate, x, key, 4)) * apply_linear(self.up, x, key, 5)
        return apply_linear(self.down, wide, key, 6)


class Block(nnx.Module):
    """One pre-norm layer; the residual stream is float32."""

    def __init__(self, c: LlmConfig, lora: LoraConfig | None, rngs: nnx.Rngs):
        self.norm1 = RMSNorm(c.width, c.eps)
        self.attn = Attention(c, lora, rngs)
        self.norm2 = RMSNorm(c.width, c.eps)
        self.mlp = Mlp(c, lora, rngs)

    def _after(self, x: jax.Array, y: jax.Array, key: jax.Array | None = None) -> jax.Array:
        x = x + y.astype(jnp.float32)
        return x + self.mlp(self.norm2(x), key).astype(jnp.float32)

    def __call__(
        self,
        x: jax.Array,
        rope: Any,
        lengths: jax.Array,
        segments: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple]:
        """key: of the dropout of this block's adapters; None: off."""
        y, kv = self.attn(self.norm1(x), rope, lengths, segments, key)
        return self._after(x, y, key), kv

    def prefill(
        self, x: jax.Array, rope: Any, lengths: jax.Array, int8: bool
    ) -> tuple[jax.Array, tuple]:
        """As __call__, for a cache. int8: as in Attention."""
        y, kv = self.attn(self.norm1(x), rope, lengths, int8=int8)
        x = x + y.astype(jnp.float32)
        return x + map_token_chunks(lambda x: self.mlp(self.norm2(x)), x).astype(jnp.float32), kv

    def decode(
        self, x: jax.Array, rope: Any, update: CacheUpdate, kv: tuple
    ) -> tuple[jax.Array, tuple]:
        y, kv = self.attn.decode(self.norm1(x), rope, update, kv)
        return self._after(x, y), kv


class Llm(nnx.Module):
    """Embeddings in, hidden states out; `logits` turns hidden states into scores over the vocabulary.

    blocks: stacked parameters (training, encoding), or an nnx.List after `unstack` (decoding).
    int8_cache: whether `prefill` makes a cache of int8.
    """

    def __init__(self, c: LlmConfig, lora: LoraConfig | None, rngs: nnx.Rngs):
        self.config = c
        self.embed = nnx.Param(0.02 * jax.random.normal(rngs.params(), (c.vocab, c.width)))
        # of a quantized embedding (minigpt4_jax/quantization/schemes.py): [V], or [V, groups] of a kept one
        self.embed_scale: nnx.Param | None = nnx.data(None)
        self.embed_offset: nnx.Param | None = nnx.data(None)
        self.blocks = stack_layers(lambda r: Block(c, lora, r), c.layers, rngs)
        self.norm = RMSNorm(c.width, c.eps)
        self.head = None if c.tie else Linear(c.width, c.vocab, bias=False, rngs=rngs)
        self.int8_cache = False

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """tokens [...] int32 -> [..., D] float32."""
        # On a mesh the table is split by width over fsdp, so that each device looks up the tokens of
        # the others there, and then rows are exchanged: XLA finds this way only if it is shown.
        tokens = constrain(tokens, "data")
        rows = lookup_rows(self.embed[...], tokens)
        if self.embed_scale is None:
            rows = rows.astype(jnp.float32)
        else:
            offset = None if self.embed_offset is None else self.embed_offset[...][tokens]
            rows = dequantize(rows, self.embed_scale[...][tokens], jnp.float32, offset=offset)
        rows = constrain(rows, "data", *[None] * (tokens.ndim - 1), "fsdp")
        return constrain(rows, BATCH_AXES)

    def __call__(
        self,
        embeds: jax.Array,
        lengths: jax.Array,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        *,
        remat: bool = False,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """embeds [B, T, D], lengths [B] valid tokens of each right-padded row -> hidden [B, T, D].

        segments and positions [B, T]: of packed rows. dropout_key: turns the adapters' dropout on;
        each layer's follows from it and its number.
        """
        rope = self._rope(embeds) if positions is None else rotary(self.config, positions)

        def step(block: Block, at: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            x, n = at
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, n)
            return (block(x, rope, lengths, segments, key)[0], n + 1), None

        first = (embeds.astype(jnp.float32), jnp.int32(0))
        (x, _), _ = run_layers(
            self.blocks, first, step, part="llm", heads=self.config.kv_heads, remat=remat
        )
        return self.norm(x)

    def prefill(
        self, embeds: jax.Array, lengths: jax.Array, cache_length: int
    ) -> tuple[jax.Array, KVCache]:
        """As __call__, and the cache [.., B, K, S = cache_length, H] of these T <= S positions."""
        rope = self._rope(embeds)

        def step(block: Block, x: jax.Array) -> tuple[jax.Array, tuple]:
            x, kv = block.prefill(x, rope, lengths, self.int8_cache)
            return x, tuple(new_cache(a, cache_length) for a in kv)

        x, kv = run_layers(
            self.blocks, embeds.astype(jnp.float32), step, part="llm", heads=self.config.kv_heads
        )
        if isinstance(self.blocks, nnx.List):
            return self.norm(x), KVCache([k for k, _ in kv], [v for _, v in kv])
        return self.norm(x), KVCache(*kv)

    def decode(
        self,
        embeds: jax.Array,
        positions: jax.Array,
        cache: KVCache,
        update: CacheUpdate | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Continue rows: embeds [B, T, D] at positions [B, T] -> hidden [B, T, D] and the new cache.

        place: where in the cache, by default slot t for position t, and all before it is seen.
        """
        rope = rotary(self.config, positions)
        if update is None:
            update = causal_cache_update(positions, cache.length, self.config.window)
        x = embeds.astype(jnp.float32)
        if isinstance(self.blocks, nnx.List):
            keys, values = [], []
            for block, k, v in zip(self.blocks, cache.k, cache.v, strict=True):
                x, (k, v) = block.decode(x, rope, update, (k, v))
                keys.append(k)
                values.append(v)
            return self.norm(x), KVCache(keys, values)
        graphdef, state = nnx.split(self.blocks)

        def body(x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
            block: Any = nnx.merge(graphdef, layer[0])
            return block.decode(x, rope, update, layer[1:])

        x, (keys, values) = jax.lax.scan(body, x, (state, cache.k, cache.v))
        return self.norm(x), KVCache(keys, values)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> scores [..., V] float32."""
        if self.head is not None:
            return self.head(hidden, out=jnp.float32)
        scale = None if self.embed_scale is None else self.embed_scale[...]
        offset = None if self.embed_offset is None else self.embed_offset[...]
        return linear(hidden, self.embed[...], out=jnp.float32, scale=scale, offset=offset)

    def _rope(self, embeds: jax.Array) -> tuple[jax.Array, jax.Array]:
        return rotary(self.config, jnp.arange(embeds.shape[1])[None])


def unstack(llm: Llm) -> Llm:
    """The same model with its layers as an nnx.List (call outside jit): decoding needs them apart."""
    graphdef, state = nnx.split(llm.blocks)
    layers = [
        nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], state))
        for i in range(llm.config.layers)
    ]
    outer, rest = nnx.split(llm)
    copy = nnx.merge(outer, rest)
    copy.blocks = nnx.List(layers)
    return copy
