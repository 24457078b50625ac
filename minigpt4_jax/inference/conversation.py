"""A conversation about images: its history, the images of all turns, and a prefix cache."""

import os
import warnings
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import jax

from minigpt4_jax.errors import UserError
from minigpt4_jax.inference.generation_config import GenerationConfig
from minigpt4_jax.inference.prefix_cache import PrefixCache
from minigpt4_jax.inference.preprocess import image_key
from minigpt4_jax.inference.requests import Request
from minigpt4_jax.inference.text_generator import TextGenerator
from minigpt4_jax.inference.transcript import embedded_image
from minigpt4_jax.inference.visual_tokens import VisualTokens, concatenate_visual
from minigpt4_jax.processing import chat_templates, sequences
from minigpt4_jax.processing.images import ImageSource, is_image


@dataclass(frozen=True)
class Turn:
    """A question with its images, and the answer to it."""

    question: str
    images: tuple[ImageSource, ...]
    answer: str


class Conversation:
    """A conversation with a model; `Model.conversation` starts one.

    The whole history goes into each prompt, up to the context length. An image (the same path, or the
    same object) is encoded once, and its visual tokens are kept. The keys and values of the last
    prompt and answer stay on the device: a new prompt is processed from where it first differs
    from them, which is all of it once the context has been cut.

    Attributes:
        model: the model that answers.
        system: the system message; None is the template's.
        template: the chat template.
        turns: the history, oldest first.
    """

    def __init__(
        self,
        model: TextGenerator,
        system: str | None = None,
        template: str | chat_templates.ChatTemplate | None = None,
    ):
        self.model, self.system = model, system
        self.template = chat_templates.chat_format(model.config, model.tokenizer, template)
        self.turns: list[Turn] = []
        # The model's own template ends an answer with its end symbol.
        self._stop = () if template is None else self.template.stop
        self._last_config = _with_chat_context(None, {})
        self._prefix_cache = PrefixCache()
        # Visual tokens [P, D] by image_key. The image is kept too, so that its id stays unique.
        self._encoded: dict[str | int, tuple[ImageSource, jax.Array]] = {}

    # --- questions --------------------------------------------------------------------------

    def ask(
        self,
        text: str,
        images: ImageSource | Sequence[ImageSource] | None = (),
        config: GenerationConfig | None = None,
        **overrides: Any,
    ) -> str:
        """The answer to the next question.

        images: those that come with this question, put before it unless it places them itself with
        `<ImageHere>`. config, overrides: as `Model.generate`, for one answer; context is 2000 by
        default, as in the original's chat: the oldest tokens beyond it are dropped with a warning.
        UserError: as `Model.generate`; the conversation is unchanged then.
        """
        return self._answer(text, images, _with_chat_context(config, overrides))

    def stream(
        self,
        text: str,
        images: ImageSource | Sequence[ImageSource] | None = (),
        config: GenerationConfig | None = None,
        **overrides: Any,
    ) -> Generator[str]:
        """Pieces of the answer to the next question, as `Model.stream` yields them.

        If the generator is closed early, what was yielded is kept as the answer. UserError: as `ask`,
        and for beam search.
        """
        return self._stream(None, text, images, _with_chat_context(config, overrides))

    def retry(self, **overrides: Any) -> str:
        """Answer the last question again, with its options and the next seed, or `overrides`."""
        config = self._retry_config(overrides)
        turn = self.undo()
        try:
            return self._answer(turn.question, turn.images, config)
        except BaseException:
            self.turns.append(turn)
            raise

    def stream_retry(self, **overrides: Any) -> Generator[str]:
        """As `retry`, in pieces. If it is closed before the first of them, the old answer stays."""
        config = self._retry_config(overrides)
        turn = self.undo()
        try:
            return self._stream(turn, turn.question, turn.images, config)
        finally:
            self.turns.append(turn)  # until the first piece; a generator may never be started

    def request(
        self,
        text: str,
        images: ImageSource | Sequence[ImageSource] | None = (),
        config: GenerationConfig | None = None,
        **overrides: Any,
    ) -> Request:
        """What `ask` would ask the engine; nothing is answered."""
        return self._prepare(text, images, _with_chat_context(config, overrides))[1]

    # --- history ----------------------------------------------------------------------------

    def undo(self) -> Turn:
        """Remove the last question and its answer, and return them."""
        if not self.turns:
            raise UserError("the conversation is empty; ask a question first")
        return self.turns.pop()

    def reset(self) -> None:
        """Forget the history. Encoded images are kept in case they are used again."""
        self.turns.clear()
        self._prefix_cache.clear()

    def transcript(self) -> dict[str, Any]:
        """The history for JSON; an image that is neither a path nor a file's bytes is named by its type."""
        turns = [
            {
                "question": turn.question,
                "images": [_image_name(image) for image in turn.images],
                "answer": turn.answer,
            }
            for turn in self.turns
        ]
        system = self.template.system if self.system is None else self.system
        return {"system": system, "turns": turns}

    # --- how a question is answered -----------------------------------------------------------

    def _retry_config(self, overrides: dict[str, Any]) -> GenerationConfig:
        seed = self._last_config.seed
        if isinstance(seed, Integral):
            seed = int(seed) + 1
        return GenerationConfig.merge(self._last_config, {"seed": seed} | overrides)

    def _answer(
        self,
        text: str,
        images: ImageSource | Sequence[ImageSource] | None,
        config: GenerationConfig,
    ) -> str:
        turn, request = self._prepare(text, images, config)
        (outputs,) = self.model.answer_requests([request], prefix_cache=self._prefix_cache)
        if outputs[0].error is not None:
            raise UserError(outputs[0].error)
        self._append(turn, outputs[0].text, config)
        return outputs[0].text

    def _prepare(
        self,
        text: str,
        images: ImageSource | Sequence[ImageSource] | None,
        config: GenerationConfig,
    ) -> tuple[Turn, Request]:
        """The next turn, without its answer, and the request for it."""
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"the question is {text!r}; expected text")
        if config.template or config.num_return_sequences != 1:
            raise UserError("template and num_return_sequences are not options of a conversation")
        config = GenerationConfig.merge(config, {"stop": (*self._stop, *config.stop)})
        turn = Turn(text, _as_images(images), "")
        prompt = self._prompt(turn, config.extra_bos)
        all_images = [image for t in [*self.turns, turn] for image in t.images]
        self._warn_if_cut(prompt, len(all_images), config)
        encoded_before = set(self._encoded)
        visual = self._visual_tokens(*self.model.with_prompts([all_images], [prompt]))
        try:
            (request,) = self.model.prepare_requests([all_images], [prompt], config, [visual])
        except UserError:
            self._encoded = {key: v for key, v in self._encoded.items() if key in encoded_before}
            raise
        return turn, request

    def _prompt(self, turn: Turn, extra_bos: bool) -> str:
        """The prompt for the next turn. Image tags in answers are not the user's: they are removed."""
        history: list[tuple[str, str | None]] = [
            (_question(t), t.answer.replace(chat_templates.IMAGE_TAG, "")) for t in self.turns
        ]
        return self.template.render(
            [*history, (_question(turn), None)],
            system=self.system, extra_bos=extra_bos,
        )  # fmt: skip

    def _append(self, turn: Turn, answer: str, config: GenerationConfig) -> None:
        self.turns.append(replace(turn, answer=answer))
        self._last_config = config

    def _stream(
        self,
        replaced: Turn | None,
        text: str,
        images: ImageSource | Sequence[ImageSource] | None,
        config: GenerationConfig,
    ) -> Generator[str]:
        """replaced: the turn that this one replaces once there is a first piece."""
        turn, request = self._prepare(text, images, config)
        config.check_streamable()
        return self._stream_request(replaced, turn, request, config)

    def _stream_request(
        self, replaced: Turn | None, turn: Turn, request: Request, config: GenerationConfig
    ) -> Generator[str]:
        streamed, finished = "", False
        try:
            for piece in self.model.stream_request(request, self._prefix_cache):
                streamed += piece
                yield piece
            finished = True
        finally:
            if finished or streamed:
                if replaced is not None and self.turns and self.turns[-1] is replaced:
                    self.turns.pop()
                self._append(turn, chat_templates.clean_answer(self.model.config, streamed), config)

    def _warn_if_cut(self, prompt: str, num_images: int, config: GenerationConfig) -> None:
        if config.context is None:
            return
        tokens = sequences.prompt_tokens(
            self.model.tokenizer, self.model.config, prompt,
            images=num_images, extra_bos=config.extra_bos,
        )  # fmt: skip
        context = min(config.context, self.model.config.llm.max_length)
        cut, num_visual = sequences.cut_left(tokens, config.max_new_tokens, context)
        if len(cut) < len(tokens):
            warnings.warn(
                f"the conversation is longer than its context of {context} tokens: dropped the "
                f"oldest {len(tokens) - len(cut)} of {len(tokens)} tokens of the prompt, "
                f"{num_visual} of them of images",
                stacklevel=5,  # the caller of ask or stream
            )

    def _visual_tokens(self, images: Sequence[ImageSource]) -> VisualTokens | None:
        """Visual tokens [I * P, D] of the images, on the device; only new ones are encoded."""
        new = {image_key(image): image for image in images if image_key(image) not in self._encoded}
        encoded = self.model.visual_tokens(list(new.values()))
        for (key, image), visual in zip(new.items(), encoded, strict=True):
            self._encoded[key] = (image, visual)
        return concatenate_visual([self._encoded[image_key(image)][1] for image in images])


def _with_chat_context(
    config: GenerationConfig | None, overrides: dict[str, Any]
) -> GenerationConfig:
    """The merged options, with the original chat's context unless another is given."""
    defaults = {"context": sequences.CHAT_CONTEXT}
    if config is not None and getattr(config, "context", None) is not None:
        defaults = {}
    return GenerationConfig.merge(config, defaults | overrides)


def _as_images(images: ImageSource | Sequence[ImageSource] | None) -> tuple[ImageSource, ...]:
    if is_image(images):
        return (images,)  # type: ignore[return-value]
    return () if images is None else tuple(images)  # type: ignore[arg-type]


def _question(turn: Turn) -> str:
    return chat_templates.with_images(turn.question, len(turn.images))


def _image_name(image: ImageSource) -> str:
    if isinstance(image, bytes):
        return embedded_image(image)
    return str(image) if isinstance(image, (str, os.PathLike)) else type(image).__name__
