"""BLIP-2's first stage: vision encoder and Q-Former with text, without a language model
(BLIP-2 paper, section 3.2; LAVIS' blip2_qformer.py)."""

import jax
import jax.numpy as jnp

from minigpt4_jax.models.image_text_encoder import ImageTextEncoder
from minigpt4_jax.models.minigpt import NO_DROPOUT, Batch, Dropout, Instruction, Prefilled
from minigpt4_jax.models.qformer_decoder import TextDecoder, pack_queries
from minigpt4_jax.models.stage1_losses import stage1_losses


class Stage1(ImageTextEncoder):
    """Vision encoder, Q-Former with a text branch, and the heads of stage 1.

    Its language model for generation is the text branch, whose "visual tokens" are the keys and values
    of the queries.
    """

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
        losses = stage1_losses(self, batch, remat=remat, dropout=dropout)
        num_tokens = (jnp.asarray(batch.label_positions) >= 0).sum()
        return {
            "loss_itc": losses.contrastive * num_tokens,
            "loss_itm": losses.matching * num_tokens,
            "loss_lm": losses.captioning * num_tokens,
        }
