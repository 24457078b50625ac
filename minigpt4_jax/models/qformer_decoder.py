"""The Q-Former's text branch as a language model that continues rows, with the interface of `Llm`.

A row is the P queries of an image, then text; the cache holds the keys and values of both.
"""

from typing import Any

import jax
import jax.numpy as jnp

from minigpt4_jax.models.kv_cache import (
    CacheUpdate,
    KVCache,
    attend_to_cache,
    causal_cache_update,
    new_cache,
    write_cache,
)
from minigpt4_jax.models.qformer import Block, KeysValues, QFormer


def pack_queries(keys_values: list[KeysValues]) -> jax.Array:
    """The queries' keys and values of all layers, [B, P, N, H] each -> [B, P, 2 L D] float32."""
    arrays = [a for kv in keys_values for a in kv]
    stacked = jnp.stack([a.reshape(*a.shape[:2], -1) for a in arrays], axis=2)  # [B, P, 2 L, D]
    return stacked.reshape(*stacked.shape[:2], -1).astype(jnp.float32)


def unpack_queries(packed: jax.Array, layers: int, heads: int) -> list[KeysValues]:
    """The inverse of `pack_queries`: [B, P, 2 L D] -> L pairs of [B, P, N, H]."""
    b, p, _ = packed.shape
    arrays = packed.reshape(b, p, 2 * layers, heads, -1)
    return [(arrays[:, :, 2 * i], arrays[:, :, 2 * i + 1]) for i in range(layers)]


class TextDecoder:
    """A view of a Q-Former with a text branch."""

    def __init__(self, qformer: QFormer):
        self._qformer = qformer
        # keys and values of the queries are computed elsewhere, in floats
        self.cache_kind: str | None = None

    def prefill(
        self, tokens: jax.Array, visual: jax.Array, lengths: jax.Array, cache_length: int
    ) -> tuple[jax.Array, KVCache]:
        """Rows of P visual tokens and text -> the hidden state [B, D] of each row's last token, and a
        cache of S = cache_length slots.

        tokens [B, P + T], of which the first P stand for the queries; visual [B, P, 2 L D], of
        `pack_queries`; lengths [B], with the queries.
        """
        q, p = self._qformer, visual.shape[1]
        image = unpack_queries(visual, q.config.layers, q.config.heads)
        text_lengths = jnp.maximum(lengths - p, 1)
        embedded = q.embed_text(jnp.maximum(tokens[:, p:], 0))
        hidden, text = q.write_text(embedded, text_lengths, image)
        k, v = (
            [
                new_cache(jnp.concatenate([a[n], b[n].astype(a[n].dtype)], axis=1), cache_length)
                for a, b in zip(image, text, strict=True)
            ]
            for n in (0, 1)
        )
        last = jnp.take_along_axis(hidden, text_lengths[:, None, None] - 1, axis=1)[:, 0]
        return last, KVCache(k, v)

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """tokens [...] -> word embeddings [..., D] float32; `decode` adds positions."""
        return self._qformer.embed_words(tokens)

    def decode(
        self,
        embeds: jax.Array,
        positions: jax.Array,
        cache: KVCache,
        update: CacheUpdate | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """As `Llm.decode`: embeds [B, T, D] at positions [B, T] of the row, which count the queries."""
        q = self._qformer
        if update is None:
            update = causal_cache_update(positions, cache.length, None)
        text_positions = jnp.clip(positions - q.query.shape[0], 0, q.positions.shape[0] - 1)
        x = q.norm(embeds + q.positions[...][text_positions].astype(jnp.float32))
        keys: list[Any] = []
        values: list[Any] = []
        for block, k, v in zip(q.blocks, cache.k, cache.v, strict=True):
            x, k, v = _decode_layer(block, x, update, k, v)
            keys.append(k)
            values.append(v)
        return x, KVCache(keys, values)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> scores [..., V] float32."""
        return self._qformer.logits(hidden)


def _decode_layer(
    block: Block, x: jax.Array, update: CacheUpdate, keys: Any, values: Any
) -> tuple[jax.Array, Any, Any]:
    """One layer of text tokens x [B, T, D] over cached keys and values [B, N, S, H]."""
    attn = block.attn
    k, v = attn.project_kv(x)
    keys, values = write_cache(keys, k, update.slots), write_cache(values, v, update.slots)
    q = attn.split_heads(attn.q(x))
    y = attend_to_cache(q, keys, values, update.attention_mask, scale=q.shape[-1] ** -0.5)
    x = attn.finish(x, y.reshape(x.shape), None)
    return block.feed_text(x), keys, values
