"""The Q-Former: learned queries that read an image through cross-attention, and in BLIP-2's first stage
text that shares their self-attention (BLIP-2 paper, section 3.1; LAVIS' Qformer.py).

MiniGPT-4 uses the queries alone. Rows with both hold the queries first: x [B, P + T, D].
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from minigpt4_jax.config import QFormerConfig
from minigpt4_jax.models.layers import LayerNorm, Linear, dropout, gelu, lookup_rows
from minigpt4_jax.parallel.sharding import BATCH_AXES, constrain
from minigpt4_jax.quantization.matmul import linear

KeysValues = tuple[jax.Array, jax.Array]  # [B, T, N, H] each
# Vision tokens [B, S, Dv], or what `QFormer.project_vision` makes of them
Vision = jax.Array | list[KeysValues | None]


def _fold(key: jax.Array | None, i: int) -> jax.Array | None:
    """The i-th key derived from a dropout key; None: no dropout."""
    return None if key is None else jax.random.fold_in(key, i)


class Attention(nnx.Module):
    """Post-norm attention to a source: the row itself, or the vision tokens."""

    def __init__(self, c: QFormerConfig, source_width: int, rngs: nnx.Rngs):
        self.q = Linear(c.hidden, c.hidden, rngs=rngs)
        self.k = Linear(source_width, c.hidden, rngs=rngs)
        self.v = Linear(source_width, c.hidden, rngs=rngs)
        self.out = Linear(c.hidden, c.hidden, rngs=rngs)
        self.norm = LayerNorm(c.hidden, c.eps)
        self.heads, self.rate = c.heads, c.dropout

    def split_heads(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, N, H]."""
        b, _, d = x.shape
        return x.reshape(b, -1, self.heads, d // self.heads)

    def project_kv(self, source: jax.Array) -> KeysValues:
        """source [B, T, Dv] -> keys and values [B, T, N, H]."""
        return self.split_heads(self.k(source)), self.split_heads(self.v(source))

    def __call__(
        self,
        x: jax.Array,
        kv: KeysValues,
        key: jax.Array | None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """x [B, P, D] float32, kv [B, T, N, H], key: for dropout, mask [B, 1, P, T] (True is attended
        to) -> [B, P, D] float32."""
        b, p, d = x.shape
        q = self.split_heads(self.q(x))
        k, v = kv
        # Not `attention`: the probabilities have dropout when the Q-Former is trained.
        precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
        scores = jnp.einsum(
            "bpnh,btnh->bnpt", q, k, precision=precision, preferred_element_type=jnp.float32
        )
        scores = scores / (d // self.heads) ** 0.5
        if mask is not None:
            scores = jnp.where(mask, scores, -10000.0)
        probs = jax.nn.softmax(scores, axis=-1)
        probs = dropout(probs, self.rate, _fold(key, 0)).astype(v.dtype)
        y = jnp.einsum("bnpt,btnh->bpnh", probs, v, precision=precision).reshape(b, p, d)
        return self.finish(x, y, key)

    def finish(self, x: jax.Array, y: jax.Array, key: jax.Array | None) -> jax.Array:
        """The output projection, residual and norm: input x and values y, [B, P, D] each -> [B, P, D]."""
        y = dropout(self.out(y).astype(jnp.float32), self.rate, _fold(key, 1))
        return self.norm(x + y)


class Mlp(nnx.Module):
    """Post-norm feed-forward layer."""

    def __init__(self, c: QFormerConfig, rngs: nnx.Rngs):
        self.up = Linear(c.hidden, c.ffn, rngs=rngs)
        self.down = Linear(c.ffn, c.hidden, rngs=rngs)
        self.norm = LayerNorm(c.hidden, c.eps)
        self.rate = c.dropout

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:  # [B, P, D]
        y = self.down(gelu(self.up(x))).astype(jnp.float32)
        return self.norm(x + dropout(y, self.rate, key))


class Block(nnx.Module):
    """Self-attention; for queries cross-attention (in every `cross_every`-th layer) and their own
    feed-forward layer; for text another feed-forward layer."""

    def __init__(self, c: QFormerConfig, index: int, rngs: nnx.Rngs):
        self.attn = Attention(c, c.hidden, rngs)
        has_cross = index % c.cross_every == 0
        self.cross = Attention(c, c.vision_width, rngs) if has_cross else None
        self.mlp = Mlp(c, rngs)
        self.text_mlp = Mlp(c, rngs) if c.vocab else None

    def __call__(
        self,
        x: jax.Array,
        vision: jax.Array | KeysValues | None,
        key: jax.Array | None,
        *,
        queries: int,
        mask: jax.Array | None = None,
        prefix: KeysValues | None = None,
        outputs: int | None = None,
    ) -> tuple[jax.Array, KeysValues]:
        """x [B, P + T, D] float32, of which the first `queries` = P are queries -> the same shape, or of
        only the first `outputs` positions, and the keys and values of all.

        vision [B, S, Dv]: what queries read, or its keys and values; key: for dropout;
        mask [B, 1, P + T, keys]; prefix: keys and values before those of x.
        """
        own = self.attn.project_kv(x)
        k, v = own
        if prefix is not None:
            k, v = (jnp.concatenate(pair, axis=1) for pair in zip(prefix, own, strict=True))
        x = self.attn(x[:, :outputs], (k, v), _fold(key, 0), mask)
        query, text = x[:, :queries], x[:, queries:]
        if queries:
            if self.cross is not None and vision is not None:
                kv = vision if isinstance(vision, tuple) else self.cross.project_kv(vision)
                query = self.cross(query, kv, _fold(key, 1))
            query = self.mlp(query, _fold(key, 2))
        if text.shape[1] == 0:
            return query, own
        text = self.feed_text(text, _fold(key, 3))
        return (jnp.concatenate([query, text], axis=1) if queries else text), own

    def feed_text(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """The feed-forward layer of text tokens [B, T, D]."""
        assert self.text_mlp is not None
        return self.text_mlp(x, key)


class LmHead(nnx.Module):
    """BERT's head for masked language modelling; its output matrix is the word embedding."""

    def __init__(self, c: QFormerConfig, rngs: nnx.Rngs):
        self.dense = Linear(c.hidden, c.hidden, rngs=rngs)
        self.norm = LayerNorm(c.hidden, c.eps)
        self.bias = nnx.Param(jnp.zeros(c.vocab))

    def __call__(self, hidden: jax.Array, embed: jax.Array) -> jax.Array:
        """hidden [..., D], word embedding [V, D] -> scores [..., V] float32."""
        x = self.norm(gelu(self.dense(hidden)))
        return linear(x, embed, self.bias[...], out=jnp.float32)


class QFormer(nnx.Module):
    """Vision tokens [B, S, Dv] float32 -> query outputs [B, P, D] float32; D is the hidden width.

    With a text branch also rows of text [B, T, D], and of both.
    """

    def __init__(self, c: QFormerConfig, rngs: nnx.Rngs):
        self.config = c
        self.rate = c.dropout
        self.query = nnx.Param(0.02 * jax.random.normal(rngs.params(), (c.queries, c.hidden)))
        self.norm = LayerNorm(c.hidden, c.eps)
        # A list: scanning a dozen small layers of two kinds gains nothing.
        self.blocks = nnx.List([Block(c, i, rngs) for i in range(c.layers)])
        if not c.vocab:
            return
        self.embed = nnx.Param(0.02 * jax.random.normal(rngs.params(), (c.vocab, c.hidden)))
        self.positions = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (c.max_positions, c.hidden))
        )
        if c.itc_width:
            self.vision_projection = Linear(c.hidden, c.itc_width, rngs=rngs)
            self.text_projection = Linear(c.hidden, c.itc_width, rngs=rngs)
            self.itm_head = Linear(c.hidden, 2, rngs=rngs)
        if c.lm_head:
            self.temperature = nnx.Param(jnp.full(1, 0.07))  # of the contrastive loss
            self.lm_head = LmHead(c, rngs)

    def __call__(self, vision: jax.Array, *, dropout_key: jax.Array | None = None) -> jax.Array:
        """vision [B, S, Dv] -> [B, P, D]. dropout_key: enables dropout."""
        return self.read_image(vision, dropout_key=dropout_key)[0]

    def project_vision(self, vision: jax.Array) -> list[KeysValues | None]:
        """vision [B, S, Dv] -> keys and values of each layer with cross-attention. Rows that read the same
        images can share them."""
        return [None if b.cross is None else b.cross.project_kv(vision) for b in self.blocks]

    def read_image(
        self, vision: Vision, *, dropout_key: jax.Array | None = None
    ) -> tuple[jax.Array, list[KeysValues]]:
        """As __call__, with the queries' keys and values of each layer, which text can attend to."""
        x = self.norm(self.query[...])
        x = jnp.broadcast_to(x, (_num_rows(vision), *x.shape))
        x = dropout(x, self.rate, _fold(dropout_key, 0))
        return self._run(x, vision, dropout_key, queries=x.shape[1])

    def read_text(
        self,
        text: jax.Array,
        lengths: jax.Array,
        *,
        outputs: int | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """text [B, T, D] of `embed_text`, lengths [B] -> [B, T, D]: text alone, each token attends to all of
        its row. outputs: how many positions are wanted, from the first."""
        mask = (jnp.arange(text.shape[1]) < lengths[:, None])[:, None, None]
        x = dropout(self.norm(text), self.rate, _fold(dropout_key, 0))
        return self._run(x, None, dropout_key, queries=0, mask=mask, outputs=outputs)[0]

    def read_both(
        self,
        vision: Vision,
        text: jax.Array,
        lengths: jax.Array,
        *,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """vision [B, S, Dv], text [B, T, D] of `embed_text`, lengths [B] -> query outputs [B, P, D]: queries
        and text attend to each other."""
        b, p = text.shape[0], self.query.shape[0]
        queries = jnp.broadcast_to(self.query[...], (b, *self.query.shape))
        x = self.norm(jnp.concatenate([queries, text], axis=1))
        x = dropout(x, self.rate, _fold(dropout_key, 0))
        mask = (jnp.arange(x.shape[1]) < p + lengths[:, None])[:, None, None]
        return self._run(x, vision, dropout_key, queries=p, mask=mask, outputs=p)[0]

    def write_text(
        self,
        text: jax.Array,
        lengths: jax.Array,
        image: Sequence[KeysValues],
        *,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, list[KeysValues]]:
        """text [B, T, D] of `embed_text`, lengths [B] -> [B, T, D], and the text's keys and values of each
        layer.

        A token attends to itself, to the text before it, and to the queries. image: their keys and
        values, of `read_image`.
        """
        b, t, p = *text.shape[:2], image[0][0].shape[1]
        steps = jnp.arange(t)
        causal = (steps[:, None] >= steps) & (steps < lengths[:, None])[:, None]  # [B, T, T]
        mask = jnp.concatenate([jnp.ones((b, t, p), bool), causal], axis=2)[:, None]
        x = dropout(self.norm(text), self.rate, _fold(dropout_key, 0))
        return self._run(x, None, dropout_key, queries=0, mask=mask, prefix=image)

    def embed_text(self, tokens: jax.Array) -> jax.Array:
        """Word and position embeddings of tokens [B, T] -> [B, T, D] float32, before the norm."""
        return self.add_positions(self.embed_words(tokens))

    def embed_words(self, tokens: jax.Array) -> jax.Array:
        """Word embeddings of tokens [...] -> [..., D] float32."""
        return lookup_rows(self.embed[...], tokens).astype(jnp.float32)

    def add_positions(self, words: jax.Array) -> jax.Array:
        """Word embeddings [B, T, D] float32 -> the same with those of positions from 0."""
        return words + self.positions[...][: words.shape[1]].astype(jnp.float32)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> scores of the next token [..., V] float32."""
        return self.lm_head(hidden, self.embed[...])

    def _run(
        self,
        x: jax.Array,
        vision: Vision | None,
        key: jax.Array | None,
        *,
        queries: int,
        mask: jax.Array | None = None,
        prefix: Sequence[KeysValues] | None = None,
        outputs: int | None = None,
    ) -> tuple[jax.Array, list[KeysValues]]:
        """The layers. outputs: of the last one only these positions are computed, from the first."""
        keys_values = []
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            of_layer = vision[i] if isinstance(vision, list) else vision
            x, kv = block(
                constrain(x, BATCH_AXES), of_layer, _fold(key, i + 1), queries=queries, mask=mask,
                prefix=None if prefix is None else prefix[i], outputs=outputs if i == last else None,
            )  # fmt: skip
            keys_values.append(kv)
        return x, keys_values


def _num_rows(vision: Vision) -> int:
    """B of vision tokens, or of their keys and values."""
    if isinstance(vision, list):
        return next(len(kv[0]) for kv in vision if kv is not None)
    return len(vision)
