"""Features of images and texts from the vision encoder and the Q-Former of BLIP-2's first stage
(BLIP-2 paper, section 3.2; LAVIS' blip2_qformer.py)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.models.layers import LayerNorm
from minigpt4_jax.models.minigpt import LN_VISION_EPS, MiniGpt, normalize_pixels
from minigpt4_jax.models.qformer import QFormer
from minigpt4_jax.models.vit import Vit


class ImageOutput(NamedTuple):
    """What the queries read from B images."""

    vision: jax.Array  # [B, S, Dv]: normalized outputs of the vision encoder
    queries: jax.Array  # [B, P, D]
    projected: jax.Array  # [B, P, E], normalized: for contrastive similarities


class TextOutput(NamedTuple):
    """What the Q-Former makes of B texts, which it reads without an image."""

    tokens: jax.Array  # [B, T, D]
    projected: jax.Array  # [B, T, E], normalized; position 0 is that of the text


class ImageTextEncoder(MiniGpt):
    """Vision encoder, Q-Former with a text branch, and the heads that compare their outputs."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        assert c.qformer is not None
        self.config = c
        self.vit = Vit(c.vision, rngs)
        self.ln_vision = LayerNorm(c.vision.width, LN_VISION_EPS)
        self.qformer: QFormer = QFormer(c.qformer, rngs)

    def read_pixels(self, pixels: jax.Array, *, remat: bool = False) -> jax.Array:
        """pixels [B, S, S, 3] -> vision tokens [B, 1 + patches, Dv] for the Q-Former."""
        return self.ln_vision(self.vit(normalize_pixels(pixels), remat=remat))

    def image_features(self, pixels: jax.Array) -> ImageOutput:
        """pixels [B, S, S, 3] -> features of the images."""
        vision = self.read_pixels(pixels)
        queries = self.qformer(vision)
        return ImageOutput(vision, queries, self.project_queries(queries))

    def text_features(self, tokens: jax.Array, lengths: jax.Array) -> TextOutput:
        """tokens [B, T], lengths [B] -> features of the texts."""
        hidden = self.qformer.read_text(self.qformer.embed_text(tokens), lengths)
        return TextOutput(hidden, self.project_text(hidden))

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
