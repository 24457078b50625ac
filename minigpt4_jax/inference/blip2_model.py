"""BLIP-2 with a language model: captions and answers as LAVIS writes them."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from minigpt4_jax.errors import UserError
from minigpt4_jax.inference.captioning import (
    VQA_PROMPT,
    answer_config,
    caption_config,
    cut_prompt,
    question_prompts,
)
from minigpt4_jax.inference.generation_config import GenerationConfig, GenerationOutput
from minigpt4_jax.inference.model import Model
from minigpt4_jax.inference.preprocess import Images
from minigpt4_jax.processing.images import ImageSource, is_image


class Blip2Model(Model):
    """A model of BLIP-2 with OPT or FlanT5, as `load` returns it.

    Its prompts are plain text, which follows the image; `<ImageHere>` is not needed. `generate` and the
    other methods of `Model` take them as they are, `caption` and `predict_answers` use LAVIS' defaults.
    """

    def caption(
        self,
        images: Iterable[ImageSource] | ImageSource,
        prompt: str | Sequence[str] | None = None,
        **options: Any,
    ) -> list[str]:
        """Captions of images, num_captions of each, in order.

        prompt: the beginning of the captions, or one for each image; None: the model's own
        (config.caption_prompt). It is not part of what is returned. options: of
        `captioning.caption_config`: num_beams (5), max_length (30), min_length (1), length_penalty,
        repetition_penalty, num_captions, sample, top_p (0.9), temperature, seed.

        UserError: an unreadable image, an option out of range, another number of prompts than of images.
        """
        details = self.caption_details(images, prompt, **options)
        return [output.text for outputs in details for output in outputs]

    def caption_details(
        self,
        images: Iterable[ImageSource] | ImageSource,
        prompt: str | Sequence[str] | None = None,
        **options: Any,
    ) -> list[list[GenerationOutput]]:
        """As `caption`: for each image its captions with ids, log-probabilities and scores."""
        flat: Any = [images] if is_image(images) else list(images)  # type: ignore[arg-type]
        prompt = self.config.caption_prompt if prompt is None else prompt
        prompts = [prompt] * len(flat) if isinstance(prompt, str) else list(prompt)
        return self._answer(flat, prompts, caption_config(self.config, **options))

    def predict_answers(
        self,
        images: Iterable[ImageSource] | ImageSource,
        questions: str | Sequence[str],
        *,
        prompt: str = VQA_PROMPT,
        history: Sequence[Sequence[tuple[str, str]]] | None = None,
        **options: Any,
    ) -> list[str]:
        """Short answers to questions about images, one for each image.

        prompt: text around a question, which replaces {}; "" for none. history: earlier (question,
        answer) turns of each image. options: of `captioning.answer_config`: num_beams (5), max_len (10),
        min_len (1), length_penalty (0 for OPT, -1 for FlanT5). UserError: as `caption`.
        """
        details = self.answer_details(images, questions, prompt=prompt, history=history, **options)
        return [outputs[0].text for outputs in details]

    def answer_details(
        self,
        images: Iterable[ImageSource] | ImageSource,
        questions: str | Sequence[str],
        *,
        prompt: str = VQA_PROMPT,
        history: Sequence[Sequence[tuple[str, str]]] | None = None,
        **options: Any,
    ) -> list[list[GenerationOutput]]:
        """As `predict_answers`, with ids, log-probabilities and scores."""
        flat: Any = [images] if is_image(images) else list(images)  # type: ignore[arg-type]
        texts = [questions] * len(flat) if isinstance(questions, str) else list(questions)
        prompts = question_prompts(texts, prompt, history)
        return self._answer(flat, prompts, answer_config(self.config, **options))

    def _answer(
        self, images: Images, prompts: list[str], config: GenerationConfig
    ) -> list[list[GenerationOutput]]:
        prepared = [
            p
            if isinstance(p, UserError)
            else replace(p, request=cut_prompt(p.request, self.config))
            for p in self.prepare_prompts(images, prompts, config)
        ]
        details = self.answer_all(prepared)
        for i, outputs in enumerate(details):
            if outputs[0].error is not None:
                raise UserError(f"image {i}: {outputs[0].error}")
        return details
