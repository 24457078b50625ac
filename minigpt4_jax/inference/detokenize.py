"""From generated ids to an answer's text: where it is cut, as a whole and as a stream."""

import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.inference.generation_config import GenerationOutput
from minigpt4_jax.inference.requests import Completion, Progress, Request
from minigpt4_jax.inference.stop_sequences import stable_prefix
from minigpt4_jax.processing.chat_templates import answer_ends, clean_answer, removed_text
from minigpt4_jax.processing.tokenizer import SPACES_BEFORE, Tokenizer, clean_up_spaces


def completion_output(
    tokenizer: Tokenizer, config: ModelConfig, completion: Completion, stop_texts: Sequence[str]
) -> GenerationOutput:
    """A completion as the public API returns it, its text cut at the stop texts."""
    text = clean_answer(config, _decode(tokenizer, config, completion.ids, stop_texts))
    error = nonfinite_error(completion)
    finish_reason = "error" if error else "stop" if completion.hit_stop else "length"
    return GenerationOutput(
        text, completion.ids, completion.logprobs, finish_reason, completion.score, error
    )


def failed_output(message: str) -> GenerationOutput:
    """The answer to a prompt that could not be used."""
    return GenerationOutput("", [], [], "error", 0.0, message)


def nonfinite_error(completion: Completion) -> str | None:
    """What is wrong with a completion that ended because the model computed NaN or infinity."""
    if not completion.nonfinite:
        return None
    return (
        f"the model's logits after {len(completion.ids)} tokens are NaN or infinite; the weights are "
        "damaged, or too large for the dtype (float32 holds more)"
    )


class TextStream:
    """The text of an answer that is being generated, piece by piece."""

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig, request: Request):
        self._tokenizer, self._config, self._stop_texts = tokenizer, config, request.stop_texts
        self._removed = removed_text(config)
        # what is removed from the text must not be shown in part either
        removed = [self._removed] if self._removed else []
        self._hidden = [*_all_stop_texts(config, request.stop_texts), *removed]
        if config.image_first:  # neither what later tokens join
            self._hidden += [apart for apart, _ in SPACES_BEFORE]
        self._streamed = ""

    def push(self, completion: Completion, finished: bool) -> str:
        """The piece that an answer so far adds to the text; "" for none."""
        text = _decode(self._tokenizer, self._config, completion.ids, self._stop_texts)
        text = (text.replace(self._removed, "") if self._removed else text).lstrip()
        text = text.rstrip() if finished else stable_prefix(text, self._hidden)
        if not text.startswith(self._streamed):
            return ""
        piece, self._streamed = text[len(self._streamed) :], text
        return piece


def stream_text(
    tokenizer: Tokenizer, config: ModelConfig, steps: Iterable[Progress]
) -> Iterator[str]:
    """Yield each new piece of an answer. steps: of one request, as `Engine.run` yields them.

    UserError, after the last piece: the answer ended because logits were NaN or infinite.
    """
    stream = None
    for step in steps:
        stream = stream or TextStream(tokenizer, config, step.request)
        if piece := stream.push(step.completion, step.finished):
            yield piece
        if error := nonfinite_error(step.completion):
            raise UserError(error)


def make_stop_check(
    tokenizer: Tokenizer, stop_texts: Sequence[str]
) -> Callable[[list[int]], int | None]:
    """A function: ids -> how many of them it takes to spell one of the texts, None if they do not."""

    def stop_check(ids: list[int]) -> int | None:
        def has_stop_text(length: int) -> bool:
            text = tokenizer.decode(ids[:length])
            return any(stop_text in text for stop_text in stop_texts)

        if not has_stop_text(len(ids)):
            return None
        return bisect.bisect_left(range(len(ids)), True, key=has_stop_text)

    return stop_check


def _decode(
    tokenizer: Tokenizer, config: ModelConfig, ids: list[int], stop_texts: Sequence[str]
) -> str:
    """The text of ids up to the first stop text."""
    text = tokenizer.decode(ids)
    if config.image_first:
        text = clean_up_spaces(text)
    for stop_text in _all_stop_texts(config, stop_texts):
        text = text.split(stop_text)[0]
    return text


def _all_stop_texts(config: ModelConfig, stop_texts: Sequence[str]) -> list[str]:
    """The texts that an answer is cut at: the model's, the request's and its format's."""
    candidates = (config.end_symbol, *stop_texts, *answer_ends(config))
    return [text for text in candidates if text.strip() or text in stop_texts]
