"""InstructBLIP: its Q-Former reads the instruction together with the image (InstructBLIP paper, section 2.2;
LAVIS' blip2_vicuna_instruct.py and blip2_t5_instruct.py)."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.inference.blip2_model import Blip2Model
from minigpt4_jax.inference.captioning import INSTRUCTED_LENGTH, INSTRUCTED_PENALTY, caption_config
from minigpt4_jax.inference.generation_config import GenerationConfig
from minigpt4_jax.inference.preprocess import Images, PreparedPrompt
from minigpt4_jax.inference.text_generator import OnFailure
from minigpt4_jax.models.minigpt import MiniGpt
from minigpt4_jax.processing.bert_tokenizer import BertTokenizer
from minigpt4_jax.processing.image_first import without_tags
from minigpt4_jax.processing.images import ImageSource, is_image
from minigpt4_jax.processing.tokenizer import Tokenizer

_NEEDS_PROMPT = (
    "InstructBLIP reads an image together with its prompt, and cannot encode it alone; use generate, answer, "
    "caption or predict_answers"
)


class _Instructed(NamedTuple):
    """An image, or its pixels [S, S, 3], with the ids of what the Q-Former reads beside it."""

    image: Any
    tokens: tuple[int, ...]


class InstructBlipModel(Blip2Model):
    """A model of InstructBLIP with Vicuna or FlanT5, as `load` returns it.

    Prompts are plain instructions; the Q-Former and the language model both read them. `answer` uses LAVIS'
    defaults. Visual tokens belong to an image and a prompt, so that `encode_images` is an error.
    """

    def __init__(
        self,
        module: MiniGpt,
        config: ModelConfig,
        tokenizer: Tokenizer,
        qformer_tokenizer: BertTokenizer,
        mesh: Mesh | None = None,
        *,
        exif: bool = False,
    ):
        """qformer_tokenizer: of what the Q-Former reads; other arguments as of `Model`."""
        super().__init__(module, config, tokenizer, mesh, exif=exif)
        self.qformer_tokenizer = qformer_tokenizer

    def answer(
        self,
        images: Iterable[ImageSource] | ImageSource,
        instructions: str | Sequence[str],
        **options: Any,
    ) -> list[str]:
        """Answers to instructions about images, one instruction for each image or one for all.

        options: as of `caption`; by default num_beams 5, max_length 256, repetition_penalty 1.5, as LAVIS'
        `generate`. UserError: as `caption`.
        """
        flat: Any = [images] if is_image(images) else list(images)  # type: ignore[arg-type]
        several = not isinstance(instructions, str)
        prompts = list(instructions) if several else [str(instructions)] * len(flat)
        defaults = {"max_length": INSTRUCTED_LENGTH, "repetition_penalty": INSTRUCTED_PENALTY}
        details = self._answer(flat, prompts, caption_config(self.config, **(defaults | options)))
        return [output.text for outputs in details for output in outputs]

    # --- images with their prompts -----------------------------------------------------------

    def with_prompts(
        self, images: Sequence[Sequence[ImageSource]], prompts: Sequence[str | None]
    ) -> list[list[ImageSource]]:
        return [
            [_Instructed(image, self._instruction(prompt)) for image in group]  # type: ignore[misc]
            for group, prompt in zip(images, prompts, strict=True)
        ]

    def _instruction(self, prompt: str | None) -> tuple[int, ...]:
        """What the Q-Former reads of a prompt: its end, if it is long."""
        positions = 0 if self.config.qformer is None else self.config.qformer.max_positions
        limit = min(self.config.max_text_length, positions)
        text = without_tags(self.config.caption_prompt if prompt is None else prompt)
        return tuple(self.qformer_tokenizer.encode_text(text, limit, cut_left=True))

    def prepare_prompts(
        self, images: Images | None, prompts: Sequence[str], config: GenerationConfig
    ) -> list[PreparedPrompt | UserError]:
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        prepared = super().prepare_prompts(images, texts, config)
        return [
            p if isinstance(p, UserError)
            else PreparedPrompt(p.request, tuple(self.with_prompts([p.images], [text])[0]), p.num_cut)
            for p, text in zip(prepared, texts, strict=True)
        ]  # fmt: skip

    def visual_tokens(self, images: Sequence[ImageSource]) -> list[jax.Array]:
        """images: of `with_prompts`. UserError: others, or an unreadable image."""
        return self._encode([self._load_pixels(image) for image in images])

    def encode_pixels(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """UserError: always, as visual tokens depend on the prompt."""
        raise UserError(_NEEDS_PROMPT)

    def _load_pixels(self, image: Any) -> Any:
        if not isinstance(image, _Instructed):
            raise UserError(_NEEDS_PROMPT)
        return _Instructed(super()._load_pixels(image.image), image.tokens)

    def _encode(self, pixels: Sequence[Any]) -> list[jax.Array]:
        images, texts = [p.image for p in pixels], [p.tokens for p in pixels]
        return self._encoder.encode(self._state, images, texts)

    def _check_images(self, prompts: Sequence[Sequence[Any]], fail: OnFailure) -> None:
        super()._check_images([[i.image for i in images] for images in prompts], fail)
