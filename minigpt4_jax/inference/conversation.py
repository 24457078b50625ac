"""A dialogue about images: history, images of any turn, and cuts on the left when it grows long."""

import os
import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Protocol

import numpy as np

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.inference.engine import Engine
from minigpt4_jax.inference.generation_config import GenerationConfig, GenerationOutput
from minigpt4_jax.inference.prefix_cache import PrefixCache
from minigpt4_jax.inference.preprocess import Images
from minigpt4_jax.inference.requests import Completion, Request
from minigpt4_jax.processing import chat_templates as texts
from minigpt4_jax.processing import sequences
from minigpt4_jax.processing.images import ImageSource, is_image
from minigpt4_jax.processing.tokenizer import Tokenizer


class _Model(Protocol):
    """What a dialogue needs of `minigpt4_jax.Model`."""

    config: ModelConfig
    tokenizer: Tokenizer
    _engine: Engine

    def _requests(
        self,
        images: Images | None,
        prompts: Sequence[str],
        generation_config: GenerationConfig,
        visual: list[np.ndarray | None] | None = None,
    ) -> list[Request]: ...

    def _pieces(
        self, requests: list[Request], stop: Sequence[str], kept: PrefixCache | None = None
    ) -> Iterator[str]: ...

    def _generation(self, answer: Completion, stop: Sequence[str]) -> GenerationOutput: ...

    def _encode_all(self, images: Sequence[ImageSource], names: Sequence[str]) -> np.ndarray: ...


@dataclass(frozen=True)
class Turn:
    """A question with its images, and the answer to it."""

    question: str
    images: tuple[ImageSource, ...]
    answer: str


class Conversation:
    """A dialogue with a model; `Model.conversation` begins one.

    turns: what was said, oldest first; all of it goes into the next prompt, as far as the context
    reaches. An image (the same path, or the same object) is encoded once and its visual tokens are
    kept. So are the keys and values of what was read and answered, on the device: a question is read from
    where it first differs from that, which is all of it once the context has been cut.
    """

    def __init__(
        self,
        model: _Model,
        system: str | None = None,
        template: str | texts.ChatTemplate | None = None,
    ):
        self.model, self.system = model, system
        self.template = texts.find_template(model.config, template)
        self.turns: list[Turn] = []
        # the model's own template ends an answer with its end symbol
        self._stop = () if template is None else texts.answer_endings(self.template)
        self._options: dict[str, Any] = {}
        self._kept = PrefixCache()
        self._visual: dict[Any, tuple[ImageSource, np.ndarray]] = {}  # [P, D] of each image

    def ask(
        self, text: str, images: ImageSource | Sequence[ImageSource] | None = (), **options: Any
    ) -> str:
        """The answer to the next question.

        images: those that come with this question, put before it unless it places them itself with
        `<ImageHere>`. options: as of `Model.generate`, for one answer; context is the original
        chat's 2000, beyond which the oldest tokens are dropped with a warning. UserError: as
        `Model.generate`; the conversation then is as it was before.
        """
        turn, request, generation_config = self._prepare(text, images, options)
        answers = self.model._engine.answer([request], kept=self._kept)[0]
        answer = self.model._generation(answers[0], generation_config.stop_texts(1)[0]).text
        self._keep(turn, answer, options)
        return answer

    def stream(
        self, text: str, images: ImageSource | Sequence[ImageSource] | None = (), **options: Any
    ) -> Generator[str]:
        """Pieces of the answer to the next question, as `Model.stream` yields them.

        If it is stopped on the way, what was shown is kept as the answer. UserError: as `ask`, and
        for beams.
        """
        return self._stream(None, text, images, options)

    def retry(self, **options: Any) -> str:
        """Another answer to the last question: as it was asked, with the next seed, save options."""
        options = self.retry_options() | options
        turn = self.undo()
        try:
            return self.ask(turn.question, turn.images, **options)
        except BaseException:
            self.turns.append(turn)
            raise

    def stream_retry(self, **options: Any) -> Generator[str]:
        """As `retry`, in pieces; stopped before the first of them, the old answer stays."""
        options = self.retry_options() | options
        turn = self.undo()
        try:
            return self._stream(turn, turn.question, turn.images, options)
        finally:
            self.turns.append(turn)  # until the first piece; a stream that is not begun has none

    def undo(self) -> Turn:
        """Take back the last question and its answer, and return them."""
        if not self.turns:
            raise UserError("the conversation is empty; ask a question first")
        return self.turns.pop()

    def reset(self) -> None:
        """Forget what was said; encoded images are kept for their next use."""
        self.turns.clear()
        self._kept.clear()

    def retry_options(self) -> dict[str, Any]:
        """The options of the last question with the next seed."""
        seed = self._options.get("seed", 0)
        return self._options | {"seed": seed + 1 if isinstance(seed, Integral) else seed}

    def transcript(self) -> dict[str, Any]:
        """What was said, for JSON; an image that is not a file is named by its type."""
        turns = [
            {"question": t.question, "images": [_name(i) for i in t.images], "answer": t.answer}
            for t in self.turns
        ]
        system = self.template.system if self.system is None else self.system
        return {"system": system, "turns": turns}

    # --- a question ---------------------------------------------------------------------------

    def _prepare(
        self, text: str, images: ImageSource | Sequence[ImageSource] | None, options: dict[str, Any]
    ) -> tuple[Turn, Request, GenerationConfig]:
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"the question is {text!r}; expected text")
        chosen = {"context": sequences.CHAT_CONTEXT} | options
        chosen["stop"] = (*self._stop, *_texts(chosen.get("stop", ())))
        generation_config = GenerationConfig.of(chosen)
        if generation_config.template or generation_config.num_return_sequences != 1:
            raise UserError("template and num_return_sequences are not options of a conversation")
        turn = Turn(text, _images(images), "")
        asked = [*self.turns, turn]
        dialogue: list[tuple[str, str | None]] = [
            (_question(t), t.answer.replace(texts.IMAGE_TAG, "")) for t in self.turns
        ]
        prompt = texts.render_chat(
            self.template, [*dialogue, (_question(turn), None)],
            system=self.system, extra_bos=generation_config.extra_bos,
        )  # fmt: skip
        shown = [image for t in asked for image in t.images]
        self._warn_of_cut(prompt, len(shown), generation_config)
        known = set(self._visual)
        visual = self._encoded(shown)
        try:
            (request,) = self.model._requests([shown], [prompt], generation_config, visual)
        except UserError:
            self._visual = {key: v for key, v in self._visual.items() if key in known}
            raise
        return turn, request, generation_config

    def _keep(self, turn: Turn, answer: str, options: dict[str, Any]) -> None:
        self.turns.append(Turn(turn.question, turn.images, answer))
        self._options = dict(options)

    def _stream(
        self,
        old: Turn | None,
        text: str,
        images: ImageSource | Sequence[ImageSource] | None,
        options: dict[str, Any],
    ) -> Generator[str]:
        """old: the turn that this one replaces, if it comes to a first piece."""
        turn, request, generation_config = self._prepare(text, images, options)
        if generation_config.num_beams != 1:
            raise UserError(
                f"num_beams {generation_config.num_beams}: a stream cannot search; set it to 1"
            )
        return self._pieces(old, turn, request, generation_config, options)

    def _pieces(
        self,
        old: Turn | None,
        turn: Turn,
        request: Request,
        generation_config: GenerationConfig,
        options: dict[str, Any],
    ) -> Generator[str]:
        shown, over = "", False
        try:
            for piece in self.model._pieces(
                [request], generation_config.stop_texts(1)[0], self._kept
            ):
                shown += piece
                yield piece
            over = True
        finally:
            if over or shown:
                if old is not None and self.turns and self.turns[-1] is old:
                    self.turns.pop()
                self._keep(turn, texts.clean_answer(shown), options)

    def _warn_of_cut(self, prompt: str, images: int, generation_config: GenerationConfig) -> None:
        tokens = sequences.prompt_tokens(
            self.model.tokenizer, self.model.config, prompt,
            images=images, extra_bos=generation_config.extra_bos,
        )  # fmt: skip
        if generation_config.context is None:
            return
        context = min(generation_config.context, self.model.config.llm.max_length)
        kept, lost = sequences.cut_left(tokens, generation_config.max_new_tokens, context)
        if len(kept) < len(tokens):
            warnings.warn(
                f"the conversation is longer than its context of {context} tokens: dropped the "
                f"oldest {len(tokens) - len(kept)} of {len(tokens)} tokens of the prompt, "
                f"{lost} of them of images",
                stacklevel=4,
            )

    def _encoded(self, images: Sequence[ImageSource]) -> list[np.ndarray | None]:
        """The visual tokens [I * P, D] of the images, of which the new ones are encoded."""
        new = {_key(image): image for image in images if _key(image) not in self._visual}
        names = [f"image {i}" for i in range(len(new))]
        if new:
            encoded = self.model._encode_all(list(new.values()), names)
            for (key, image), visual in zip(new.items(), encoded, strict=True):
                self._visual[key] = (image, visual)  # the image too: ids of live objects differ
        found = [self._visual[_key(image)][1] for image in images]
        return [np.concatenate(found) if found else None]


def _images(images: ImageSource | Sequence[ImageSource] | None) -> tuple[ImageSource, ...]:
    if is_image(images):
        return (images,)  # type: ignore[return-value]
    return () if images is None else tuple(images)  # type: ignore[arg-type]


def _question(turn: Turn) -> str:
    return texts.with_images(turn.question, len(turn.images))


def _texts(stop: Any) -> tuple[str, ...]:
    if isinstance(stop, str):
        raise UserError(f"stop {stop!r}: expected a list of texts")
    return tuple(stop)


def _key(image: ImageSource) -> Any:
    return str(image) if isinstance(image, (str, os.PathLike)) else id(image)


def _name(image: ImageSource) -> str:
    return str(image) if isinstance(image, (str, os.PathLike)) else type(image).__name__
