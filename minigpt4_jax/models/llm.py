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
    Vectors,
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

Rope = tuple[jax.Array, jax.Array]  # cos and sin [B, T, 1, H / 2] float32
KeysValues = tuple[Vectors, Vectors]


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
    """Llama 3.1's rule: frequencies of long wavelengths are divided by the factor, those of short
    wavelengths are unchanged, and those in between are interpolated. [H / 2] -> [H / 2]."""
    wavelength = 2 * math.pi / freq
    blend = (s.original_max_length / wavelength - s.low_freq_factor) / (
        s.high_freq_factor - s.low_freq_factor
    )
    blend = np.clip(blend, 0.0, 1.0)  # 1: unchanged, 0: divided by the factor
    scaled: np.ndarray = (1 - blend) * freq / s.factor + blend * freq
    return scaled


def rotary(c: LlmConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """positions [B, T] int32 -> cos and sin [B, T, 1, H / 2] float32."""
    angles = positions[..., None].astype(jnp.float32) * rope_frequencies(c)
    return jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding of x [B, T, N, H] -> [B, T, N, H]; dimension i is rotated with i + H / 2."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

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

    def project_qkv(
        self, x: jax.Array, rope: Rope, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B, T, D] -> q [B, T, N, H], k and v [B, T, K, H]; q and k are rotated."""
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
        rope: Rope,
        lengths: jax.Array,
        segments: jax.Array | None = None,
        key: jax.Array | None = None,
        int8: bool = False,
    ) -> tuple[jax.Array, KeysValues]:
        """Causal attention within right-padded rows, or within the segments of packed rows.

        x [B, T, D], lengths [B], segments [B, T] -> [B, T, D], and keys and values [B, T, K, H] for a
        cache. int8: quantize keys and values, and attend to the quantized ones.
        """
        c = self.config
        q, k, v = self.project_qkv(x, rope, key)
        kv: KeysValues = (quantize_vectors(k), quantize_vectors(v)) if int8 else (k, v)
        k, v = (dequantize_vectors(a, q.dtype) for a in kv)
        y = attention(
            q, k, v, scale=c.head_dim**-0.5, causal=True, lengths=lengths, segments=segments,
            window=c.window,
        )  # fmt: skip
        return apply_linear(self.o, y.reshape(*x.shape[:2], -1), key, 3), kv

    def decode(
        self, x: jax.Array, rope: Rope, update: CacheUpdate, kv: KeysValues
    ) -> tuple[jax.Array, KeysValues]:
        """x [B, T, D] attends to the cached keys and values kv [B, K, S, H], to which its own are
        added. Returns [B, T, D] and the updated keys and values."""
        c = self.config
        q, k, v = self.project_qkv(x, rope)
        if isinstance(kv[0], QuantizedArray):
            keys = write_cache(kv[0], quantize_vectors(k), update.slots)
            values = write_cache(kv[1], quantize_vectors(v), update.slots)
        else:
            keys = write_cache(kv[0], k, update.slots)
            values = write_cache(kv[1], v, update.slots)
        y = attend_to_cache(q, keys, values, update.attention_mask, scale=c.head_dim**-0.5)
        return self.o(y.reshape(*x.shape[:2], -1)), (keys, values)


class Mlp(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). [B, T, D] -> [B, T, D]."""

    def __init__(self, c: LlmConfig, lora: LoraConfig | None, rngs: nnx.Rngs):
        make = partial(make_linear, bias=c.mlp_bias, lora=lora, rngs=rngs)
        self.gate = make("gate", c.width, c.ffn)
        self.up = make("up", c.width, c.ffn)
        self.down = make("down", c.ffn, c.width)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:  # [B, T, D]
        hidden = jax.nn.silu(apply_linear(self.gate, x, key, 4)) * apply_linear(self.up, x, key, 5)
        return apply_linear(self.down, hidden, key, 6)


class Block(nnx.Module):
    """One pre-norm layer; the residual stream is float32."""

    def __init__(self, c: LlmConfig, lora: LoraConfig | None, rngs: nnx.Rngs):
        self.norm1 = RMSNorm(c.width, c.eps)
        self.attn = Attention(c, lora, rngs)
        self.norm2 = RMSNorm(c.width, c.eps)
        self.mlp = Mlp(c, lora, rngs)

    def _add_residuals(self, x: jax.Array, y: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Input x and attention output y, [B, T, D] each -> the block's output [B, T, D] float32."""
        x = x + y.astype(jnp.float32)
        return x + self.mlp(self.norm2(x), key).astype(jnp.float32)

    def __call__(
        self,
        x: jax.Array,
        rope: Rope,
        lengths: jax.Array,
        segments: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, KeysValues]:
        """x [B, T, D] float32 -> the same shape, and keys and values [B, T, K, H]. key: enables dropout of
        the adapters; other arguments as in `Attention`."""
        y, kv = self.attn(self.norm1(x), rope, lengths, segments, key)
        return self._add_residuals(x, y, key), kv

    def prefill(
        self, x: jax.Array, rope: Rope, lengths: jax.Array, int8: bool
    ) -> tuple[jax.Array, KeysValues]:
        """As __call__, with the MLP in token chunks. int8: as in `Attention`."""
        y, kv = self.attn(self.norm1(x), rope, lengths, int8=int8)
        x = x + y.astype(jnp.float32)
        return x + map_token_chunks(lambda x: self.mlp(self.norm2(x)), x).astype(jnp.float32), kv

    def decode(
        self, x: jax.Array, rope: Rope, update: CacheUpdate, kv: KeysValues
    ) -> tuple[jax.Array, KeysValues]:
        """x [B, T, D] float32; other arguments and results as in `Attention.decode`."""
        y, kv = self.attn.decode(self.norm1(x), rope, update, kv)
        return self._add_residuals(x, y), kv


class Llm(nnx.Module):
    """Embeddings to hidden states; `logits` maps hidden states to scores over the vocabulary.

    blocks: stacked parameters (training, encoding), or an nnx.List after `unstack` (decoding).
    int8_cache: whether `prefill` creates an int8 cache.
    """

    def __init__(self, c: LlmConfig, lora: LoraConfig | None, rngs: nnx.Rngs):
        self.config = c
        self.embed = nnx.Param(0.02 * jax.random.normal(rngs.params(), (c.vocab, c.width)))
        # of a quantized embedding (quantization/schemes.py): [V], or [V, groups] in a BlockFormat
        self.embed_scale: nnx.Param[jax.Array] | None = nnx.data(None)
        self.embed_offset: nnx.Param[jax.Array] | None = nnx.data(None)
        self.blocks = stack_layers(lambda r: Block(c, lora, r), c.layers, rngs)
        self.norm = RMSNorm(c.width, c.eps)
        self.head = None if c.tie else Linear(c.width, c.vocab, bias=False, rngs=rngs)
        self.int8_cache = False

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """tokens [...] int32 -> [..., D] float32."""
        # On a mesh the table is split by width over fsdp: each device looks up its columns for all
        # tokens of the fsdp group, then rows are exchanged. XLA needs these constraints to do so.
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
        """embeds [B, T, D], lengths [B] (tokens of each right-padded row) -> hidden [B, T, D] float32.

        segments, positions [B, T]: of packed rows. remat: save only each layer's input for the backward
        pass. dropout_key: enables dropout of the adapters; each layer folds in its number.
        """
        rope = self._rope(embeds) if positions is None else rotary(self.config, positions)

        def step(block: Block, carry: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            x, n = carry
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, n)
            return (block(x, rope, lengths, segments, key)[0], n + 1), None

        initial = (embeds.astype(jnp.float32), jnp.int32(0))
        (x, _), _ = run_layers(
            self.blocks, initial, step, part="llm", heads=self.config.kv_heads, remat=remat
        )
        return self.norm(x)

    def prefill(
        self, embeds: jax.Array, lengths: jax.Array, cache_length: int
    ) -> tuple[jax.Array, KVCache]:
        """As __call__, with a cache [.., B, K, S = cache_length, H] of these T <= S positions."""
        rope = self._rope(embeds)

        def step(block: Block, x: jax.Array) -> tuple[jax.Array, KeysValues]:
            x, kv = block.prefill(x, rope, lengths, self.int8_cache)
            k, v = kv
            return x, (new_cache(k, cache_length), new_cache(v, cache_length))

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
        """Continue rows: embeds [B, T, D] at positions [B, T] -> hidden [B, T, D] and the updated cache.

        update: by default position t goes to slot t, and attends to all slots before it.
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

        def step(x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
            block: Any = nnx.merge(graphdef, layer[0])
            result: tuple[jax.Array, KeysValues] = block.decode(x, rope, update, layer[1:])
            return result

        x, (keys, values) = jax.lax.scan(step, x, (state, cache.k, cache.v))
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
    """The same model with its layers as an nnx.List, for decoding. Call it outside jit."""
    graphdef, state = nnx.split(llm.blocks)
    layers = [
        nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], state))
        for i in range(llm.config.layers)
    ]
    copy: Llm = nnx.merge(*nnx.split(llm))
    copy.blocks = nnx.List(layers)
    return copy
