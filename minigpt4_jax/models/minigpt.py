"""MiniGPT-4: image -> vision encoder -> Q-Former or patch groups -> projection -> language model
(MiniGPT-4 paper, section 3; MiniGPT-v2 paper, section 2; the original's minigpt_base.py)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from minigpt4_jax.config import IMAGE, IMAGE_MEAN, IMAGE_STD, ModelConfig
from minigpt4_jax.models.layers import LayerNorm, Linear
from minigpt4_jax.models.llm import Llm
from minigpt4_jax.models.qformer import QFormer
from minigpt4_jax.models.vit import Vit
from minigpt4_jax.quantization.modules import quantize_linears, quantize_parameter
from minigpt4_jax.quantization.schemes import matrix_scheme

LN_VISION_EPS = 1e-5


class Batch(NamedTuple):
    """Rows padded on the right; arrays of NumPy or JAX."""

    # [B, I, S, S, 3] uint8, or float32 that is normalized already; I is 0 for text alone
    pixels: jax.Array | np.ndarray
    tokens: jax.Array | np.ndarray  # [B, T] int32; IMAGE where a visual token goes
    lengths: jax.Array | np.ndarray  # [B] int32; tokens of a row that are not padding
    label_positions: (
        jax.Array | np.ndarray
    )  # [B, A] int32; indices of the labelled tokens, -1 is padding
    # Of packed rows (data/packing.py), whose images are in pixels [N, 1, S, S, 3]:
    segments: jax.Array | np.ndarray | None = None  # [B, T] int32; a token sees those of its own
    positions: jax.Array | np.ndarray | None = None  # [B, T] int32
    visual_index: jax.Array | np.ndarray | None = (
        None  # [B, T] int32; the visual token of a slot, of N P
    )


class Dropout(NamedTuple):
    """The keys of what has dropout in this pass; None: off, as in evaluation."""

    qformer: jax.Array | None = None  # only when it is trained
    lora: jax.Array | None = None


NO_DROPOUT = Dropout()


def normalize_pixels(pixels: jax.Array) -> jax.Array:
    """uint8 [..., 3] -> float32 as `images.normalize` computes it, to the last bit or two (XLA
    multiplies by 1 / 255); float32 is left as it is."""
    if pixels.dtype != jnp.uint8:
        return pixels
    return (pixels.astype(jnp.float32) / 255 - jnp.array(IMAGE_MEAN)) / jnp.array(IMAGE_STD)


class MiniGpt(nnx.Module):
    """The whole model. Parameter paths begin with the part: vit, ln_vision, qformer, projection, llm."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        self.config = c
        self.vit = Vit(c.vision, rngs)
        self.ln_vision = LayerNorm(c.vision.width, LN_VISION_EPS)
        self.qformer = None if c.qformer is None else QFormer(c.qformer, rngs)
        self.projection = Linear(c.projection_in, c.llm.width, rngs=rngs)
        self.llm = Llm(c.llm, c.lora, rngs)
        if c.quantize is not None:
            linears = [(p, m) for p, m in nnx.iter_modules(self) if isinstance(m, Linear)]
            quantize_linears(linears, c.quantize, nnx.Param, c.kept)
            kind = matrix_scheme("llm.embed", c.quantize, c.llm.width, c.kept)
            if kind is not None:
                quantize_parameter(self.llm, "embed", kind, nnx.Param)

    def encode(
        self, pixels: jax.Array, *, remat: bool = False, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """pixels [B, I, S, S, 3], see Batch -> visual tokens [B, I * P, D] float32, in image order."""
        b, i = pixels.shape[:2]
        if i == 0:  # text alone
            return jnp.zeros((b, 0, self.config.llm.width))
        x = self.vit(normalize_pixels(pixels.reshape(b * i, *pixels.shape[2:])), remat=remat)
        x = self.ln_vision(x)  # [B * I, 1 + patches, Dv]
        if self.qformer is not None:
            x = self.qformer(x, dropout_key=dropout_key)
        else:
            c = self.config  # consecutive raster patches make a token
            x = x[:, 1:].reshape(b * i, c.visual_tokens, c.projection_in)
        return (
            self.projection(x).astype(jnp.float32).reshape(b, i * x.shape[1], self.config.llm.width)
        )

    def merge(
        self, tokens: jax.Array, visual: jax.Array, index: jax.Array | None = None
    ) -> jax.Array:
        """tokens [B, T] with IMAGE slots, visual [B, I * P, D] -> embeddings [B, T, D] float32.

        index: of packed rows, `Batch.visual_index`, into all of visual [N, P, D].
        """
        slot = tokens == IMAGE
        embeds = self.llm.embed_tokens(jnp.where(slot, 0, tokens))
        if visual.shape[1] == 0:
            return embeds
        if index is None:
            index = jnp.clip(jnp.cumsum(slot, axis=1) - 1, 0, visual.shape[1] - 1)
            placed = jnp.take_along_axis(visual, index[:, :, None], axis=1)
        else:
            placed = visual.reshape(-1, visual.shape[-1])[index]
        return jnp.where(slot[:, :, None], placed, embeds)

    def token_nll(
        self, batch: Batch, *, remat: bool = False, dropout: Dropout = NO_DROPOUT
    ) -> jax.Array:
        """Negative log-likelihood of each labelled token: [B, A] float32, 0 where answers is -1."""
        of: Any = jax.tree.map(jnp.asarray, batch)  # every field a jax.Array, or None
        visual = self.encode(of.pixels, remat=remat, dropout_key=dropout.qformer)
        hidden = self.llm(
            self.merge(of.tokens, visual, of.visual_index),
            of.lengths, of.segments, of.positions, remat=remat, dropout_key=dropout.lora,
        )  # fmt: skip
        return self.label_nll(hidden, of)

    def label_nll(self, hidden: jax.Array, batch: Batch) -> jax.Array:
        """hidden [B, T, D] -> [B, A]. Only the answers meet the output matrix: it is a tenth of the step."""
        at = jnp.maximum(
            batch.label_positions, 1
        )  # position 0 is never labelled: nothing predicts it
        before = jnp.take_along_axis(hidden, at[:, :, None] - 1, axis=1)  # [B, A, D]
        target = jnp.take_along_axis(batch.tokens, at, axis=1)
        logits = self.llm.logits(before)
        chosen = jnp.take_along_axis(logits, jnp.maximum(target, 0)[:, :, None], axis=2)[:, :, 0]
        nll = jax.nn.logsumexp(logits, axis=-1) - chosen
        return jnp.where(batch.label_positions >= 0, nll, 0.0)

    def loss(
        self, batch: Batch, *, remat: bool = False, dropout: Dropout = NO_DROPOUT
    ) -> jax.Array:
        """Mean negative log-likelihood over the labelled tokens of the batch, as the original's."""
        nll = self.token_nll(batch, remat=remat, dropout=dropout)
        return nll.sum() / jnp.maximum((batch.label_positions >= 0).sum(), 1)
