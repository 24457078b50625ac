"""The language model: a decoder for LLaMA 1/2/3, Vicuna, Mistral, Qwen2/3, SmolLM2 (LLaMA paper) and OPT
(OPT paper), and with an encoder FlanT5 (T5 paper). Families differ in LlmConfig only."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from minigpt4_jax.config import LlmConfig, LoraConfig
from minigpt4_jax.models.kv_cache import (
    CacheUpdate,
    CrossCache,
    KeysValues,
    KVCache,
    causal_cache_update,
    new_caches,
    round_vectors,
)
from minigpt4_jax.models.layers import (
    Linear,
    list_layers,
    lookup_rows,
    make_norm,
    run_layers,
    stack_layers,
)
from minigpt4_jax.models.llm_layers import Block, Encoded
from minigpt4_jax.models.positions import Rope, relative_bias, rotary
from minigpt4_jax.parallel.sharding import BATCH_AXES, constrain
from minigpt4_jax.quantization.matmul import linear
from minigpt4_jax.quantization.schemes import dequantize
from minigpt4_jax.utils.platform import backend

LEARNED_OFFSET = 2  # OPT's table of positions begins with two unused rows


class Llm(nnx.Module):
    """Embeddings to hidden states; `logits` maps hidden states to scores over the vocabulary.

    blocks: stacked parameters (training, encoding), or an nnx.List after `unstack` (decoding).
    cache_kind: of the cache that `prefill` creates; see `round_vectors`.
    """

    def __init__(self, c: LlmConfig, lora: LoraConfig | None, rngs: nnx.Rngs):
        self.config = c
        self.embed = nnx.Param(0.02 * jax.random.normal(rngs.params(), (c.vocab, c.width)))
        # of a quantized embedding (quantization/schemes.py): [V], or [V, groups] in a BlockFormat
        self.embed_scale: nnx.Param[jax.Array] | None = nnx.data(None)
        self.embed_offset: nnx.Param[jax.Array] | None = nnx.data(None)
        has_encoder = c.encoder_layers > 0
        self.blocks = stack_layers(lambda r: Block(c, lora, r, cross=has_encoder), c.layers, rngs)
        self.norm = make_norm(c.norm, c.width, c.eps)
        self.head = None if c.tie else Linear(c.width, c.vocab, bias=False, rngs=rngs)
        self.cache_kind: str | None = None

        def table(*shape: int) -> nnx.Param[jax.Array]:
            return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))

        if c.positions == "learned":
            self.positions = table(c.max_length + LEARNED_OFFSET, c.width)
        if c.positions == "relative":
            self.relative = table(c.relative_buckets, c.heads)
        if has_encoder:
            self.encoder_blocks = stack_layers(lambda r: Block(c, lora, r), c.encoder_layers, rngs)
            self.encoder_norm = make_norm(c.norm, c.width, c.eps)
            self.encoder_relative = table(c.relative_buckets, c.heads)

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
        encoded: Encoded | None = None,
    ) -> jax.Array:
        """embeds [B, T, D], lengths [B] (tokens of each right-padded row) -> hidden [B, T, D] float32.

        segments, positions [B, T]: of packed rows. remat: save only each layer's input for the backward
        pass. dropout_key: enables dropout of the adapters; each layer folds in its number. encoded: with
        an encoder, what `encode` has made of the prompts that these rows answer.
        """
        if positions is None:
            positions = _positions(embeds)
        x, rope = self._with_positions(embeds, positions)
        bias = self._bias(positions, positions[0][None])

        def step(block: Block, carry: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            x, n = carry
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, n)
            y, _ = block(x, rope, lengths, segments, key, bias=bias, encoded=encoded)
            return (y, n + 1), None

        (x, _), _ = run_layers(
            self.blocks, (x, jnp.int32(0)), step, part="llm.blocks", heads=self.config.kv_heads,
            remat=remat,
        )  # fmt: skip
        return self.norm(x)

    def encode(
        self,
        embeds: jax.Array,
        lengths: jax.Array,
        *,
        remat: bool = False,
        dropout_key: jax.Array | None = None,
    ) -> Encoded:
        """The encoder: embeds [B, T, D], lengths [B] -> what the decoder attends to. Other arguments as
        for __call__."""
        c, positions = self.config, _positions(embeds)
        bias = relative_bias(c, self.encoder_relative[...], positions, positions, causal=False)

        def step(block: Block, carry: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            x, n = carry
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, n)
            return (block(x, None, lengths, None, key, bias=bias, causal=False)[0], n + 1), None

        initial = (embeds.astype(jnp.float32), jnp.int32(0))
        (x, _), _ = run_layers(
            self.encoder_blocks, initial, step, part="llm.encoder_blocks", heads=c.kv_heads,
            remat=remat,
        )  # fmt: skip
        return Encoded(self.encoder_norm(x), lengths)

    def prefill(
        self, embeds: jax.Array, lengths: jax.Array, cache_length: int
    ) -> tuple[jax.Array, KVCache]:
        """As __call__, with a cache [.., B, K, S = cache_length, H] of these T <= S positions."""
        x, rope = self._with_positions(embeds, _positions(embeds))

        def step(block: Block, x: jax.Array) -> tuple[jax.Array, KeysValues]:
            x, kv = block.prefill(x, rope, lengths, self.cache_kind)
            k, v = kv
            return x, new_caches(k, v, cache_length)

        x, kv = run_layers(self.blocks, x, step, part="llm.blocks", heads=self.config.kv_heads)
        return self.norm(x), KVCache(*self._by_kind(kv))

    def start(
        self, embeds: jax.Array, lengths: jax.Array, cache_length: int, cross_length: int
    ) -> tuple[jax.Array, KVCache]:
        """With an encoder: read prompts embeds [B, T, D], lengths [B], and the start token of the answers
        -> its hidden state [B, D], and a cache of S = cache_length slots that holds it.

        cross_length: slots for the encoder's keys and values.
        """
        states = self.encode(embeds, lengths).states
        b, c = embeds.shape[0], self.config

        def step(block: Block, x: jax.Array) -> tuple[jax.Array, KeysValues]:
            assert block.cross is not None
            k, v = block.cross.project_kv(x)
            return x, new_caches(k, v, cross_length)

        _, kv = run_layers(self.blocks, states, step, part="llm.blocks", heads=c.kv_heads)
        cross_k, cross_v = self._by_kind(kv)
        mask = (jnp.arange(cross_length) < lengths[:, None])[:, None, :, None]
        if not isinstance(self.blocks, nnx.List):
            mask = mask[None]
        dtype = (cross_k[0] if isinstance(cross_k, list) else cross_k).dtype

        def empty(block: Block, x: jax.Array) -> tuple[jax.Array, KeysValues]:
            zeros = jnp.zeros((b, 1, c.kv_heads, c.head_dim), dtype)
            vectors = round_vectors(zeros, self.cache_kind)
            return x, new_caches(vectors, vectors, cache_length)

        _, kv = run_layers(self.blocks, states, empty, part="llm.blocks", heads=c.kv_heads)
        cache = KVCache(*self._by_kind(kv), CrossCache(cross_k, cross_v, mask))
        embeds = self.embed_tokens(jnp.full((b, 1), c.start_id, jnp.int32))
        hidden, cache = self.decode(embeds, jnp.zeros((b, 1), jnp.int32), cache)
        return hidden[:, 0], cache

    def _by_kind(self, kv: Any) -> tuple[Any, Any]:
        """Extras of `run_layers` -> keys and values, as `KVCache` has them."""
        if isinstance(self.blocks, nnx.List):
            return [k for k, _ in kv], [v for _, v in kv]
        return kv[0], kv[1]

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
        x, rope = self._with_positions(embeds, positions)
        if update is None:
            update = causal_cache_update(positions, cache.length, self.config.window)
        bias = self._bias(positions, jnp.atleast_2d(update.positions))
        cross = cache.cross
        if isinstance(self.blocks, nnx.List):
            keys, values = [], []
            for n, (block, k, v) in enumerate(zip(self.blocks, cache.k, cache.v, strict=True)):
                of_layer = None
                if cross is not None:
                    of_layer = cross.k[n], cross.v[n], cross.mask[:, :, :, 0]
                x, (k, v) = block.decode(x, rope, update, (k, v), bias=bias, cross=of_layer)
                keys.append(k)
                values.append(v)
            return self.norm(x), KVCache(keys, values, cross)
        graphdef, state = nnx.split(self.blocks)

        def step(x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
            block: Any = nnx.merge(graphdef, layer[0])
            of_layer = None
            if cross is not None:
                of_layer = *layer[3:], cross.mask[0, :, :, :, 0]
            result: tuple[jax.Array, KeysValues] = block.decode(
                x, rope, update, layer[1:3], bias=bias, cross=of_layer
            )
            return result

        layers = (state, cache.k, cache.v) + (() if cross is None else (cross.k, cross.v))
        x, (keys, values) = jax.lax.scan(step, x, layers)
        return self.norm(x), KVCache(keys, values, cross)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> scores [..., V] float32."""
        scores = self._scores(hidden)
        if backend() == "gpu":
            # Otherwise, on a mesh, XLA may gather the matrix on every device instead of the scores.
            scores = constrain(scores, BATCH_AXES, *[None] * (scores.ndim - 2), "model")
        return scores

    def _scores(self, hidden: jax.Array) -> jax.Array:
        if self.head is not None:
            return self.head(hidden, out=jnp.float32)
        scale = None if self.embed_scale is None else self.embed_scale[...]
        offset = None if self.embed_offset is None else self.embed_offset[...]
        return linear(hidden, self.embed[...], out=jnp.float32, scale=scale, offset=offset)

    def _with_positions(
        self, embeds: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, Rope | None]:
        """The input of the first layer [B, T, D] float32, and the rotation of each; positions [B, T]."""
        x = embeds.astype(jnp.float32)
        if self.config.positions == "learned":
            rows = self.positions[...][positions + LEARNED_OFFSET]
            return x + rows.astype(jnp.float32), None
        return x, rotary(self.config, positions) if self.config.positions == "rotary" else None

    def _bias(self, queries: jax.Array, keys: jax.Array) -> jax.Array | None:
        """Of the decoder's relative positions; as `relative_bias`. None for other positions."""
        if self.config.positions != "relative":
            return None
        return relative_bias(self.config, self.relative[...], queries, keys, causal=True)


def _positions(embeds: jax.Array) -> jax.Array:
    """Positions of rows [B, T, D] from their beginning: [1, T]."""
    return jnp.arange(embeds.shape[1])[None]


def unstack(llm: Llm) -> Llm:
    """The same model with its layers in nnx.Lists, for decoding. Call it outside jit."""
    copy: Llm = nnx.merge(*nnx.split(llm))
    copy.blocks = list_layers(llm.blocks, llm.config.layers)
    if llm.config.encoder_layers:
        copy.encoder_blocks = list_layers(llm.encoder_blocks, llm.config.encoder_layers)
    return copy
