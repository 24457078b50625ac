"""The three losses of BLIP-2's first stage (BLIP-2 paper, section 3.2; LAVIS' Blip2Qformer.forward).

They see the whole batch, on any number of devices: contrastive pairs and negatives come from all of its
rows. As in the original, the features of other rows have no gradient in the contrastive loss.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from minigpt4_jax.models.image_text_encoder import ImageTextEncoder
from minigpt4_jax.models.minigpt import NO_DROPOUT, Batch, Dropout
from minigpt4_jax.models.qformer import QFormer

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
    model: ImageTextEncoder,
    batch: Batch,
    *,
    negatives: Negatives | None = None,
    dropout: Dropout = NO_DROPOUT,
    remat: bool = False,
    num_groups: int = 1,
) -> Stage1Losses:
    """The losses of a batch: pixels [B, 1, S, S, 3], tokens [B, T] (`BertTokenizer.encode_text`), lengths,
    label_positions, image_ids.

    Rows of the same image share their targets and are no negatives of each other; without image_ids all
    images differ. Rows without labels fill up a batch: they count nowhere.
    negatives: instead of drawing them by similarity, with the dropout key. num_groups: the captioning loss
    is a mean over tokens within as many groups of rows, then over groups; the original's groups are its GPUs.
    """
    qformer, key = model.qformer, dropout.qformer
    keys: list[jax.Array | None] = [None] * 4
    drawn = jax.random.key(0)
    if key is not None:
        *keys, drawn = jax.random.split(key, 5)
    tokens, lengths = jnp.asarray(batch.tokens), jnp.asarray(batch.lengths)
    seen = model.read_pixels(jnp.asarray(batch.pixels)[:, 0], remat=remat)
    # Each image is read twice more for matching, with the same keys and values.
    vision = qformer.project_vision(seen)
    queries, image = qformer.read_image(vision, dropout_key=keys[0])
    # One lookup for all passes: the gradient of each would be an array of the whole embedding's size.
    begin = jnp.full((len(tokens), 1), model.config.tokenizer.bos_id or 0, tokens.dtype)
    words = qformer.embed_words(jnp.concatenate([begin, tokens], axis=1))
    text = qformer.add_positions(words[:, 1:])
    read = qformer.read_text(text, lengths, outputs=1, dropout_key=keys[1])
    similarities = _similarities(model, queries, read[:, 0])
    counted = (jnp.asarray(batch.label_positions) >= 0).any(axis=1)
    same = _same_image(batch)
    if negatives is None:
        negatives = draw_negatives(similarities, same | ~counted, drawn)

    # Negatives come from other devices: their vision tokens are sent, less than keys and values.
    negative = qformer.project_vision(seen[negatives.image_for_text])
    images = jax.tree.map(lambda a, b: _in_threes(a, b, a), vision, negative)
    texts, text_lengths = (_in_threes(a, a, a[negatives.text_for_image]) for a in (text, lengths))
    pairs = qformer.read_both(images, texts, text_lengths, dropout_key=keys[2])
    is_match = jax.nn.one_hot(jnp.tile(jnp.array([1, 0, 0]), len(tokens)), 2)
    of_pairs = _cross_entropy(model.match(pairs), is_match)
    matching = _mean(of_pairs, jnp.repeat(counted, 3))

    captions = qformer.add_positions(jnp.concatenate([words[:, :1], words[:, 2:]], axis=1))
    hidden, _ = qformer.write_text(captions, lengths, image, dropout_key=keys[3])
    counts = jnp.where(counted, lengths - 1, 0)
    captioning = _captioning(qformer, hidden[:, :-1], tokens[:, 1:], counts, num_groups)
    return Stage1Losses(_contrastive(similarities, same, counted), matching, captioning)


def _in_threes(*arrays: jax.Array) -> jax.Array:
    """Three arrays [B, ...] -> [3 B, ...]: first rows, second rows ... A device keeps its rows."""
    return jnp.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:])


def _similarities(model: ImageTextEncoder, queries: jax.Array, text: jax.Array) -> Similarities:
    """queries [B, P, D], text [B, D] of the first token."""
    images, texts = model.project_queries(queries), model.project_text(text)
    stop, temperature = jax.lax.stop_gradient, model.qformer.temperature[0]

    def largest(images: jax.Array, texts: jax.Array) -> jax.Array:  # [images, texts]
        cosines = jnp.einsum("ipe,te->itp", images, texts, precision=jax.lax.Precision.HIGHEST)
        return cosines.max(axis=2) / temperature

    return Similarities(largest(images, stop(texts)), largest(stop(images), texts).T)


def _same_image(batch: Batch) -> jax.Array:
    """Which rows have the same image: [B, B] bool."""
    if batch.image_ids is None:
        return jnp.eye(len(batch.tokens), dtype=bool)
    ids = jnp.asarray(batch.image_ids)
    return ids[:, None] == ids


def _contrastive(similarities: Similarities, same: jax.Array, counted: jax.Array) -> jax.Array:
    """The mean of both directions over the rows counted [B], with smoothed targets; equal images [B, B]
    share a row's mass."""
    same = same & counted
    targets = same / jnp.maximum(same.sum(axis=1, keepdims=True), 1)
    smoothing = SMOOTHING / jnp.maximum(counted.sum(), 1)
    targets = jnp.where(counted, (1 - SMOOTHING) * targets + smoothing, 0)
    losses = [
        _mean(_cross_entropy(jnp.where(counted, s, MASKED), targets), counted) for s in similarities
    ]
    return (losses[0] + losses[1]) / 2


def _mean(values: jax.Array, counted: jax.Array) -> jax.Array:
    """The mean of those values [N] that are counted."""
    return jnp.where(counted, values, 0).sum() / jnp.maximum(counted.sum(), 1)


def draw_negatives(similarities: Similarities, excluded: jax.Array, key: jax.Array) -> Negatives:
    """Hard negatives: rows drawn by the softmax of similarities, without those excluded [B, B], which for
    each row are those of the same image."""
    by_image, by_text = (
        jnp.where(excluded, MASKED, jax.lax.stop_gradient(s)) for s in similarities
    )
    keys = jax.random.split(key)
    return Negatives(
        jax.random.categorical(keys[0], by_text), jax.random.categorical(keys[1], by_image)
    )


def _captioning(
    qformer: QFormer, hidden: jax.Array, labels: jax.Array, counts: jax.Array, num_groups: int
) -> jax.Array:
    """hidden [B, T, D], labels [B, T], of which the first counts [B] are labelled."""
    # With two axes, the gradient of the logits is transposed faster than with three.
    logits = qformer.logits(hidden.reshape(-1, hidden.shape[-1]))
    losses = _smoothed_cross_entropy(logits, labels.reshape(-1)).reshape(labels.shape)
    is_labelled = jnp.arange(labels.shape[1]) < counts[:, None]
    sums = jnp.where(is_labelled, losses, 0.0).sum(axis=1).reshape(num_groups, -1).sum(axis=1)
    numbers = counts.reshape(num_groups, -1).sum(axis=1)
    return (sums / jnp.maximum(numbers, 1)).mean()


def _cross_entropy(scores: jax.Array, targets: jax.Array) -> jax.Array:
    """scores and target probabilities [B, N] -> [B]."""
    return -(jax.nn.log_softmax(scores) * targets).sum(axis=1)


@jax.custom_vjp
def _smoothed_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """logits [N, V], labels [N] -> [N], with smoothed labels."""
    return _smoothed_forward(logits, labels)[0]


def _smoothed_forward(
    logits: jax.Array, labels: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    log_sum = jax.nn.logsumexp(logits, axis=1)
    target = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    mean = (1 - SMOOTHING) * target + SMOOTHING * logits.mean(axis=1)
    return log_sum - mean, (logits, labels, log_sum)


def _smoothed_backward(
    saved: tuple[jax.Array, jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, None]:
    # Autodiff would pass over [N, V] several times, with a scatter for the labels.
    logits, labels, log_sum = saved
    vocab = logits.shape[1]
    is_label = labels[:, None] == jnp.arange(vocab)
    targets = jnp.where(is_label, 1 - SMOOTHING + SMOOTHING / vocab, SMOOTHING / vocab)
    probs = jnp.exp(logits - log_sum[:, None])
    return gradient[:, None] * (probs - targets), None


_smoothed_cross_entropy.defvjp(_smoothed_forward, _smoothed_backward)
