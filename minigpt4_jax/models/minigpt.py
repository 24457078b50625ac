"""MiniGPT-4: image -> vision encoder -> Q-Former or patch groups -> projection -> language model
(MiniGPT-4 paper, section 3; MiniGPT-v2 paper, section 2; the original's minigpt_base.py)."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from minigpt4_jax.config import IMAGE, IMAGE_MEAN, IMAGE_STD, ModelConfig
from minigpt4_jax.models.kv_cache import CacheUpdate, KVCache
from minigpt4_jax.models.layers import LayerNorm, Linear
from minigpt4_jax.models.llm import Llm
from minigpt4_jax.models.qformer import QFormer
from minigpt4_jax.models.vit import Vit
from minigpt4_jax.quantization.modules import quantize_linears, quantize_parameter
from minigpt4_jax.quantization.schemes import matrix_scheme

LN_VISION_EPS = 1e-5


HostOrDeviceArray = jax.Array | np.ndarray


class Batch(NamedTuple):
    """A training batch, rows padded on the right; arrays of NumPy or JAX."""

    # [B, I, S, S, 3] uint8, or normalized float32; S is the image size; I is 0 without images
    pixels: HostOrDeviceArray
    tokens: HostOrDeviceArray  # [B, T] int32; IMAGE at the position of a visual token
    lengths: HostOrDeviceArray  # [B] int32; tokens of each row without padding
    label_positions: HostOrDeviceArray  # [B, A] int32; of the labelled tokens, -1: padding
    # Packed rows only (data/packing.py); their images are in pixels [N, 1, S, S, 3]:
    segments: HostOrDeviceArray | None = None  # [B, T] int32; a token attends to its own segment
    positions: HostOrDeviceArray | None = None  # [B, T] int32
    visual_index: HostOrDeviceArray | None = None  # [B, T] int32; among the N * P visual tokens
    # BLIP-2's first stage only: rows with equal numbers show the same image
    image_ids: HostOrDeviceArray | None = None  # [B] int32


class Instruction(NamedTuple):
    """Texts that a Q-Former reads together with images, one for each image (InstructBLIP)."""

    tokens: jax.Array  # [B, T] of BertTokenizer, right-padded
    lengths: jax.Array  # [B]


class Dropout(NamedTuple):
    """Dropout keys of a forward pass; None: off, as in evaluation."""

    qformer: jax.Array | None = None  # only if the Q-Former is trained
    lora: jax.Array | None = None


NO_DROPOUT = Dropout()


class Decoder(Protocol):
    """What continues rows, token by token: a language model, or a Q-Former's text branch."""

    cache_kind: str | None  # of the cache that `prefill` creates; see `kv_cache.round_vectors`

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """tokens [...] int32 -> [..., D] float32."""
        ...

    def decode(
        self,
        embeds: jax.Array,
        positions: jax.Array,
        cache: KVCache,
        update: CacheUpdate | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """As `Llm.decode`."""
        ...

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> scores [..., V] float32."""
        ...


class Prefilled(NamedTuple):
    """Prompts that have been read, ready for their answers."""

    last: jax.Array  # [B, D]: the hidden state that predicts the first token of each answer
    cache: KVCache
    lengths: jax.Array  # [B]: of each row in the cache
    slots: int  # cache slots of the longest row; answers begin behind them


def normalize_pixels(pixels: jax.Array) -> jax.Array:
    """uint8 [..., 3] -> normalized float32 [..., 3]; float32 is returned unchanged.

    Equal to `processing.images.normalize` up to the last two bits: XLA multiplies by 1 / 255.
    """
    if pixels.dtype != jnp.uint8:
        return pixels
    return (pixels.astype(jnp.float32) / 255 - jnp.array(IMAGE_MEAN)) / jnp.array(IMAGE_STD)


class MiniGpt(nnx.Module):
    """The complete model. Parameter paths start with vit, ln_vision, qformer, projection or llm."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        self.config = c
        self.vit = Vit(c.vision, rngs)
        self.ln_vision = LayerNorm(c.vision.width, LN_VISION_EPS)
        self.qformer: QFormer | None = None if c.qformer is None else QFormer(c.qformer, rngs)
        self.projection = Linear(c.projection_in, c.llm.width, rngs=rngs)
        self.llm = Llm(c.llm, c.lora, rngs)
        if c.quantize is not None:
            linears = [(p, m) for p, m in nnx.iter_modules(self) if isinstance(m, Linear)]
            quantize_linears(linears, c.quantize, nnx.Param, c.kept)
            embed_scheme = matrix_scheme("llm.embed", c.quantize, c.llm.width, c.kept)
            if embed_scheme is not None:
                quantize_parameter(self.llm, "embed", embed_scheme, nnx.Param)

    def __call__(self, pixels: jax.Array, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        """The forward pass: pixels [B, I, S, S, 3], tokens [B, T], lengths [B], as in `Batch`
        -> logits [B, T, V] float32. Logits at t predict token t + 1; those at padding are undefined.

        Training and generation use the parts: `loss` computes logits at label positions only.
        """
        visual = self.encode(pixels)  # [B, I * P, D]
        embeds = self.merge(tokens, visual)  # [B, T, D]
        hidden = self.llm(embeds, lengths)  # [B, T, D]
        return self.llm.logits(hidden)

    def encode(
        self,
        pixels: jax.Array,
        *,
        remat: bool = False,
        dropout_key: jax.Array | None = None,
        instruction: Instruction | None = None,
    ) -> jax.Array:
        """pixels [B, I, S, S, 3], as in `Batch` -> visual tokens [B, I * P, D] float32, in image order.

        remat: save only each layer's input. dropout_key: enables dropout of the Q-Former. instruction: of
        the B * I images, for a Q-Former that reads text too (ModelConfig.reads_instruction).
        """
        b, i = pixels.shape[:2]
        if i == 0:  # no images
            return jnp.zeros((b, 0, self.config.llm.width))
        x = self.vit(normalize_pixels(pixels.reshape(b * i, *pixels.shape[2:])), remat=remat)
        x = self.ln_vision(x)  # [B * I, 1 + patches, Dv]
        if self.qformer is not None and instruction is not None:
            tokens, lengths = instruction
            text = self.qformer.embed_text(tokens)
            x = self.qformer.read_both(x, text, lengths, dropout_key=dropout_key)
        elif self.qformer is not None:
            x = self.qformer(x, dropout_key=dropout_key)
        else:
            c = self.config  # consecutive patches in raster order are concatenated
            x = x[:, 1:].reshape(b * i, c.visual_tokens, c.projection_in)
        return (
            self.projection(x).astype(jnp.float32).reshape(b, i * x.shape[1], self.config.llm.width)
        )

    def merge(
        self, tokens: jax.Array, visual: jax.Array, index: jax.Array | None = None
    ) -> jax.Array:
        """Embed tokens [B, T] and put visual tokens [B, I * P, D] at IMAGE -> [B, T, D] float32.

        index: `Batch.visual_index` of packed rows, into visual [N, P, D].
        """
        is_visual = tokens == IMAGE
        embeds = self.llm.embed_tokens(jnp.where(is_visual, 0, tokens))
        if visual.shape[1] == 0:
            return embeds
        if index is None:
            index = jnp.clip(jnp.cumsum(is_visual, axis=1) - 1, 0, visual.shape[1] - 1)
            visual_embeds = jnp.take_along_axis(visual, index[:, :, None], axis=1)
        else:
            visual_embeds = visual.reshape(-1, visual.shape[-1])[index]
        return jnp.where(is_visual[:, :, None], visual_embeds, embeds)

    @property
    def decoder(self) -> Decoder:
        """What continues rows after `prefill`."""
        return self.llm

    def prefill(
        self,
        tokens: jax.Array,
        visual: jax.Array,
        lengths: jax.Array,
        cache_length: int,
        *,
        pad_cross: bool = False,
    ) -> Prefilled:
        """Read prompts: tokens [B, T] and visual tokens [B, I * P, D], as for `merge`, lengths [B].

        cache_length: slots for `prompt_slots` and the answer. pad_cross: the encoder's keys and values,
        if there is an encoder, get as many slots, so that rows of several batches fit together.
        """
        embeds = self.merge(tokens, visual)
        if self.llm.config.encoder_layers:
            cross_length = cache_length if pad_cross else tokens.shape[1]
            last, cache = self.llm.start(embeds, lengths, cache_length, cross_length)
            return Prefilled(last, cache, jnp.ones_like(lengths), 1)
        hidden, cache = self.llm.prefill(embeds, lengths, cache_length)
        last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
        return Prefilled(last, cache, lengths, tokens.shape[1])

    def prompt_slots(self, tokens: int) -> int:
        """Cache slots of prompts of T = tokens; with an encoder that of the start token."""
        return 1 if self.config.llm.encoder_layers else tokens

    def token_nll(
        self, batch: Batch, *, remat: bool = False, dropout: Dropout = NO_DROPOUT
    ) -> jax.Array:
        """Negative log-likelihood of each labelled token: [B, A] float32, 0 at padding."""
        arrays: Any = jax.tree.map(jnp.asarray, batch)  # each field a jax.Array, or None
        visual = self.encode(arrays.pixels, remat=remat, dropout_key=dropout.qformer)
        return self.answer_nll(arrays, visual, remat=remat, dropout_key=dropout.lora)

    def answer_nll(
        self,
        batch: Batch,
        visual: jax.Array,
        *,
        remat: bool = False,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """As `token_nll`, with visual tokens [B, I * P, D] instead of pixels. dropout_key: of LoRA."""
        arrays: Any = jax.tree.map(jnp.asarray, batch)
        if self.llm.config.encoder_layers:
            return self._decoder_nll(arrays, visual, remat=remat, dropout_key=dropout_key)
        hidden = self.llm(
            self.merge(arrays.tokens, visual, arrays.visual_index),
            arrays.lengths, arrays.segments, arrays.positions, remat=remat, dropout_key=dropout_key,
        )  # fmt: skip
        return self.label_nll(hidden, arrays)

    def _decoder_nll(
        self, batch: Batch, visual: jax.Array, *, remat: bool, dropout_key: jax.Array | None
    ) -> jax.Array:
        """As `token_nll`, with an encoder: the labelled tokens of a row are the answer's, and follow those
        that the encoder reads."""
        arrays: Any = batch
        positions, tokens = arrays.label_positions, arrays.tokens
        is_label = positions >= 0
        lengths = jnp.where(is_label[:, 0], positions[:, 0], arrays.lengths)
        embeds = self.merge(tokens, visual)
        encoded = self.llm.encode(embeds, lengths, remat=remat, dropout_key=dropout_key)
        targets = jnp.take_along_axis(tokens, jnp.maximum(positions, 0), axis=1)  # [B, A]
        targets = jnp.where(is_label, targets, 0)
        start = jnp.full((len(tokens), 1), self.llm.config.start_id, targets.dtype)
        read = self.llm.embed_tokens(jnp.concatenate([start, targets[:, :-1]], axis=1))
        counts = jnp.maximum(is_label.sum(axis=1), 1)
        hidden = self.llm(read, counts, encoded=encoded, remat=remat, dropout_key=dropout_key)
        return jnp.where(is_label, _nll(self.llm.logits(hidden), targets), 0.0)

    def loss_sums(
        self, batch: Batch, *, remat: bool = False, dropout: Dropout = NO_DROPOUT
    ) -> dict[str, jax.Array]:
        """The terms of the loss of a batch, by name, each times the labelled tokens of the batch. Training
        minimizes their sum."""
        return {"loss": self.token_nll(batch, remat=remat, dropout=dropout).sum()}

    def label_nll(self, hidden: jax.Array, batch: Batch) -> jax.Array:
        """hidden [B, T, D] -> negative log-likelihood [B, A] of the labelled tokens.

        Hidden states are gathered before the LM head, which is a tenth of a training step.
        """
        # Position 0 is never labelled: nothing predicts it.
        positions = jnp.maximum(batch.label_positions, 1)
        predictors = jnp.take_along_axis(hidden, positions[:, :, None] - 1, axis=1)  # [B, A, D]
        target = jnp.take_along_axis(batch.tokens, positions, axis=1)
        nll = _nll(self.llm.logits(predictors), target)
        return jnp.where(batch.label_positions >= 0, nll, 0.0)

    def loss(
        self, batch: Batch, *, remat: bool = False, dropout: Dropout = NO_DROPOUT
    ) -> jax.Array:
        """Mean negative log-likelihood over all labelled tokens of the batch, as in the original."""
        nll = self.token_nll(batch, remat=remat, dropout=dropout)
        return nll.sum() / jnp.maximum((batch.label_positions >= 0).sum(), 1)


def _nll(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """logits [B, A, V], targets [B, A] -> negative log-likelihoods [B, A]."""
    index = jnp.maximum(targets, 0)[:, :, None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, index, axis=2)[:, :, 0]
