"""The three losses of BLIP-2's first stage (BLIP-2 paper, section 3.2; LAVIS' Blip2Qformer.forward).

They see the whole batch, on any number of devices: contrastive pairs and negatives come from all of its
rows. As in the original, the features of other rows have no gradient in the contrastive loss.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from minigpt4_jax.models.minigpt import NO_DROPOUT, Batch, Dropout
from minigpt4_jax.models.stage1 import Stage1

SMOOTHING = 0.1
MASKED = -10000.0


class Negatives(NamedTuple):
    """For each row a row that it does not belong to; [B] int32."""

    image_for_text: jax.Array
    text_for_image: jax.Array


class Stage1Losses(NamedTuple):
    """Means over the batch, float32 scalars."""

    contrastive: jax.Array  # ITC
    matching: jax.Array  # ITM
    captioning: jax.Array  # ITG

    @property
    def total(self) -> jax.Array:
        return self.contrastive + self.matching + self.captioning


class Similarities(NamedTuple):
    """Scaled similarities of all rows: [B, B] float32."""

    image_to_text: jax.Array
    text_to_image: jax.Array


def stage1_losses(
    model: Stage1,
    batch: Batch,
    *,
    image_ids: jax.Array | None = None,
    negatives: Negatives | None = None,
    dropout: Dropout = NO_DROPOUT,
    remat: bool = False,
    num_groups: int = 1,
) -> Stage1Losses:
    """The losses of a batch: pixels [B, 1, S, S, 3], tokens [B, T] (`BertTokenizer.encode_text`), lengths.

    image_ids [B]: rows with the same image, which share their targets and are no negatives of each other;
    None: all images differ. negatives: instead of drawing them by similarity, with the dropout key.
    num_groups: the captioning loss is a mean over tokens within as many groups of rows, then over groups;
    the original's groups are its GPUs.
    """
    qformer, key = model.qformer, dropout.qformer
    keys: list[jax.Array | None] = [None] * 4
    drawn = jax.random.key(0)
    if key is not None:
        *keys, drawn = jax.random.split(key, 5)
    tokens, lengths = jnp.asarray(batch.tokens), jnp.asarray(batch.lengths)
    vision = model.read_pixels(jnp.asarray(batch.pixels)[:, 0], remat=remat)
    queries, image = qformer.read_image(vision, dropout_key=keys[0])
    text = qformer.read_text(tokens, lengths, dropout_key=keys[1])
    similarities = _similarities(model, queries, text[:, 0])
    same = _same_image(len(tokens), image_ids)
    if negatives is None:
        negatives = draw_negatives(similarities, same, drawn)

    rows = jnp.concatenate([vision, vision[negatives.image_for_text], vision])
    texts, text_lengths = (
        jnp.concatenate([a, a, a[negatives.text_for_image]]) for a in (tokens, lengths)
    )
    both = qformer.read_both(rows, texts, text_lengths, dropout_key=keys[2])
    is_match = (jnp.arange(len(rows)) < len(tokens)).astype(jnp.int32)
    matching = _cross_entropy(model.match(both), jax.nn.one_hot(is_match, 2)).mean()

    begin = jnp.full((len(tokens), 1), model.config.tokenizer.bos_id or 0, tokens.dtype)
    captions = jnp.concatenate([begin, tokens[:, 1:]], axis=1)
    hidden, _ = qformer.write_text(captions, lengths, image, dropout_key=keys[3])
    captioning = _captioning(qformer.logits(hidden[:, :-1]), tokens[:, 1:], lengths - 1, num_groups)
    return Stage1Losses(_contrastive(similarities, same), matching, captioning)


def _similarities(model: Stage1, queries: jax.Array, text: jax.Array) -> Similarities:
    """queries [B, P, D], text [B, D] of the first token."""
    images, texts = model.project_queries(queries), model.project_text(text)
    stop, temperature = jax.lax.stop_gradient, model.qformer.temperature[0]

    def largest(images: jax.Array, texts: jax.Array) -> jax.Array:  # [images, texts]
        cosines = jnp.einsum("ipe,te->itp", images, texts, precision=jax.lax.Precision.HIGHEST)
        return cosines.max(axis=2) / temperature

    return Similarities(largest(images, stop(texts)), largest(stop(images), texts).T)


def _same_image(rows: int, image_ids: jax.Array | None) -> jax.Array:
    """Which rows have the same image: [B, B] bool."""
    if image_ids is None:
        return jnp.eye(rows, dtype=bool)
    return image_ids[:, None] == image_ids


def _contrastive(similarities: Similarities, same: jax.Array) -> jax.Array:
    """The mean of both directions, with smoothed targets; equal images share a row's mass."""
    targets = same / same.sum(axis=1, keepdims=True)
    targets = (1 - SMOOTHING) * targets + SMOOTHING / len(same)
    losses = [_cross_entropy(s, targets).mean() for s in similarities]
    return (losses[0] + losses[1]) / 2


def draw_negatives(similarities: Similarities, same: jax.Array, key: jax.Array) -> Negatives:
    """Hard negatives: rows drawn by the softmax of similarities, without those of the same image."""
    by_image, by_text = (jnp.where(same, MASKED, jax.lax.stop_gradient(s)) for s in similarities)
    keys = jax.random.split(key)
    return Negatives(
        jax.random.categorical(keys[0], by_text), jax.random.categorical(keys[1], by_image)
    )


def _captioning(
    logits: jax.Array, labels: jax.Array, counts: jax.Array, num_groups: int
) -> jax.Array:
    """logits [B, T, V], labels [B, T], of which the first counts [B] are labelled."""
    logprobs = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(logprobs, labels[..., None], axis=2)[..., 0]
    smoothed = (1 - SMOOTHING) * nll - SMOOTHING * logprobs.mean(axis=2)
    is_labelled = jnp.arange(labels.shape[1]) < counts[:, None]
    sums = jnp.where(is_labelled, smoothed, 0.0).sum(axis=1).reshape(num_groups, -1).sum(axis=1)
    numbers = counts.reshape(num_groups, -1).sum(axis=1)
    return (sums / jnp.maximum(numbers, 1)).mean()


def _cross_entropy(scores: jax.Array, targets: jax.Array) -> jax.Array:
    """scores and target probabilities [B, N] -> [B]."""
    return -(jax.nn.log_softmax(scores) * targets).sum(axis=1)
