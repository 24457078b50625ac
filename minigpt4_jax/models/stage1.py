"""BLIP-2's first stage: vision encoder and Q-Former with text, without a language model
(BLIP-2 paper, section 3.2; LAVIS' blip2_qformer.py)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.models.layers import LayerNorm
from minigpt4_jax.models.minigpt import (
    LN_VISION_EPS,
    NO_DROPOUT,
    Batch,
    Dropout,
    Instruction,
    MiniGpt,
    Prefilled,
    normalize_pixels,
)
from minigpt4_jax.models.qformer import QFormer
from minigpt4_jax.models.qformer_decoder import TextDecoder, pack_queries
from minigpt4_jax.models.vit import Vit


class ImageFeatures(NamedTuple):
    """What the queries read from B images."""

    vision: jax.Array  # [B, S, Dv]: normalized outputs of the vision encoder
    queries: jax.Array  # [B, P, D]
    projected: jax.Array  # [B, P, E], normalized: for contrastive similarities


class TextFeatures(NamedTuple):
    """What the Q-Former makes of B texts, which it reads without an image."""

    tokens: jax.Array  # [B, T, D]
    projected: jax.Array  # [B, T, E], normalized; position 0 is that of the text


class Stage1(MiniGpt):
    """Vision encoder, Q-Former with a text branch, and the heads of stage 1.

    Its language model for generation is the text branch, whose "visual tokens" are the keys and values
    of the queries.
    """

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        assert c.qformer is not None
        self.config = c
        self.vit = Vit(c.vision, rngs)
        self.ln_vision = LayerNorm(c.vision.width, LN_VISION_EPS)
        self.qformer: QFormer = QFormer(c.qformer, rngs)

    @property
    def decoder(self) -> TextDecoder:
        return TextDecoder(self.qformer)

    # --- generation --------------------------------------------------------------------------

    def encode(
        self,
        pixels: jax.Array,
        *,
        remat: bool = False,
        dropout_key: jax.Array | None = None,
        instruction: Instruction | None = None,
    ) -> jax.Array:
        """pixels [B, I, S, S, 3] -> keys and values of the queries: [B, I * P, 2 L D] float32."""
        assert instruction is None
        b, i = pixels.shape[:2]
        vision = self.read_pixels(pixels.reshape(b * i, *pixels.shape[2:]), remat=remat)
        packed = pack_queries(self.qformer.read_image(vision, dropout_key=dropout_key)[1])
        return packed.reshape(b, -1, packed.shape[-1])

    def prefill(
        self,
        tokens: jax.Array,
        visual: jax.Array,
        lengths: jax.Array,
        cache_length: int,
        *,
        pad_cross: bool = False,
    ) -> Prefilled:
        visual = visual[:, : self.config.visual_tokens]
        last, cache = self.decoder.prefill(tokens, visual, lengths, cache_length)
        return Prefilled(last, cache, lengths, tokens.shape[1])

    # --- training ----------------------------------------------------------------------------

    def loss_sums(
        self, batch: Batch, *, remat: bool = False, dropout: Dropout = NO_DROPOUT
    ) -> dict[str, jax.Array]:
        from minigpt4_jax.models.stage1_losses import stage1_losses  # which uses this class

        losses = stage1_losses(self, batch, remat=remat, dropout=dropout)
        num_tokens = (jnp.asarray(batch.label_positions) >= 0).sum()
        return {
            "loss_itc": losses.contrastive * num_tokens,
            "loss_itm": losses.matching * num_tokens,
            "loss_lm": losses.captioning * num_tokens,
        }

    # --- features ----------------------------------------------------------------------------

    def read_pixels(self, pixels: jax.Array, *, remat: bool = False) -> jax.Array:
        """pixels [B, S, S, 3] -> vision tokens [B, 1 + patches, Dv] for the Q-Former."""
        return self.ln_vision(self.vit(normalize_pixels(pixels), remat=remat))

    def image_features(self, pixels: jax.Array) -> ImageFeatures:
        """pixels [B, S, S, 3] -> features of the images."""
        vision = self.read_pixels(pixels)
        queries = self.qformer(vision)
        return ImageFeatures(vision, queries, self.project_queries(queries))

    def text_features(self, tokens: jax.Array, lengths: jax.Array) -> TextFeatures:
        """tokens [B, T], lengths [B] -> features of the texts."""
        hidden = self.qformer.read_text(self.qformer.embed_text(tokens), lengths)
        return TextFeatures(hidden, self.project_text(hidden))

    def project_queries(self, queries: jax.Array) -> jax.Array:
        """[B, P, D] -> [B, P, E] of length 1."""
        return unit_length(self.qformer.vision_projection(queries))

    def project_text(self, hidden: jax.Array) -> jax.Array:
        """[B, ..., D] -> [B, ..., E] of length 1."""
        return unit_length(self.qformer.text_projection(hidden))

    def match(self, queries: jax.Array) -> jax.Array:
        """Outputs [B, P, D] of `QFormer.read_both` -> logits [B, 2]; the second is that of a match."""
        return self.qformer.itm_head(queries, out=jnp.float32).mean(axis=1)


def unit_length(x: jax.Array) -> jax.Array:
    """x [..., E] divided by its length, float32."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.sqrt(jnp.square(x).sum(-1, keepdims=True)), 1e-12)
