"""From generated ids to an answer's text: where it is cut, as a whole and as a stream."""

import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.inference.generation_config import GenerationOutput
from minigpt4_jax.inference.requests import Completion, Progress, Request
from minigpt4_jax.inference.stop_sequences import stable_prefix
from minigpt4_jax.processing.chat_templates import (
    answer_ends,
    clean_answer,
    removed_text,
    role_names,
)
from minigpt4_jax.processing.clean_up_spaces import SPACES_BEFORE, clean_up_spaces
from minigpt4_jax.processing.sequences import stop_sequences
from minigpt4_jax.processing.tokenizer import Tokenizer

_NO_CHARACTER = "\uffff"  # Unicode keeps it out of texts


def completion_output(
    tokenizer: Tokenizer, config: ModelConfig, completion: Completion, stop_texts: Sequence[str]
) -> GenerationOutput:
    """A completion as the public API returns it, its text cut at the stop texts."""
    stops = _Stops(tokenizer, _all_stop_texts(config, stop_texts))
    text = clean_answer(config, _decode(config, completion.ids, stops))
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
    """The text of an answer that is being generated, piece by piece.

    The pieces join to the text of `completion_output`, with one exception: of an answer of the original's
    formats, only what follows its last role name is kept. A role name at the start is never shown, but one
    that follows other text comes too late: `text` has all of it then.

    Attributes:
        text: the pieces so far, joined.
    """

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig, request: Request):
        self._config = config
        self._stops = _Stops(tokenizer, _all_stop_texts(config, request.stop_texts))
        self._removed, self._roles = removed_text(config), role_names(config)
        # what is removed from the text must not be shown in part either
        removed = [self._removed] if self._removed else []
        self._hidden = [*_shown_of_stops(tokenizer, self._stops.texts), *removed]
        if config.image_first:  # neither what later tokens join
            self._hidden += [apart for apart, _ in SPACES_BEFORE]
        self.text = ""

    def push(self, completion: Completion, finished: bool) -> str:
        """The piece that an answer so far adds to the text; "" for none."""
        text = _decode(self._config, completion.ids, self._stops, finished=finished)
        if not finished:
            text = stable_prefix(text, self._hidden)
        text = self._without_role(text.replace(self._removed, "") if self._removed else text)
        might_be_role = not finished and any(role.startswith(text) for role in self._roles)
        if might_be_role or not text.startswith(self.text):
            return ""
        piece, self.text = text[len(self.text) :], text
        return piece

    def _without_role(self, text: str) -> str:
        """The text without role names at its start, stripped."""
        text = text.strip()
        while role := next((role for role in self._roles if text.startswith(role)), None):
            text = text.removeprefix(role).lstrip()
        return text


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


class _Stops:
    """Stop texts, and those of them that are written with special tokens and others, `mixed`. Decoding
    leaves the special tokens out, so that the text does not have these."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]):
        self.texts = list(texts)
        self._tokenizer = tokenizer
        self.mixed = [text for text in texts if self._is_mixed(text)]

    def _is_mixed(self, text: str) -> bool:
        ids = self._tokenizer.encode(text)
        shown = self._tokenizer.decode(ids).strip()
        return bool(shown) and shown != self._tokenizer.decode(ids, skip_special=False).strip()

    def are_in(self, ids: list[int]) -> bool:
        """Whether ids spell one of the texts."""
        text = self._tokenizer.decode(ids)
        if any(stop in text for stop in self.texts):
            return True
        return bool(self.mixed) and self._mixed_in(ids)

    def _mixed_in(self, ids: list[int]) -> bool:
        written = self._tokenizer.decode(ids, skip_special=False)
        return any(stop in written for stop in self.mixed)

    def decode(self, ids: list[int]) -> str:
        """The text of ids, up to the first mixed text."""
        if not self.mixed:
            return self._tokenizer.decode(ids)
        if self._mixed_in(ids):
            end = bisect.bisect_left(range(len(ids)), True, key=lambda n: self._mixed_in(ids[:n]))
            start = next(n for n in range(end - 1, -1, -1) if self._mixed_in(ids[n:end]))
            return self._without_start_of_stop(self._tokenizer.decode(ids[: start + 1]))
        # their usual tokens, next to which white space may be lost
        usual = [ids_ for stop in self.mixed for ids_ in stop_sequences(self._tokenizer, stop)]
        length = max((len(s) for s in usual if ids[-len(s) :] == s), default=0)
        return self._tokenizer.decode(ids[: len(ids) - length])

    def _without_start_of_stop(self, text: str) -> str:
        """A text without what its last token has of a mixed text."""
        starts = [s[:n] for s in self.mixed for n in range(1, len(s) + 1) if text.endswith(s[:n])]
        return text.removesuffix(max(starts, key=len, default=""))


def make_stop_check(
    tokenizer: Tokenizer, stop_texts: Sequence[str]
) -> Callable[[list[int]], int | None]:
    """A function: ids -> how many of them it takes to spell one of the texts, None if they do not."""
    stops = _Stops(tokenizer, stop_texts)

    def stop_check(ids: list[int]) -> int | None:
        if not stops.are_in(ids):
            return None
        return bisect.bisect_left(range(len(ids)), True, key=lambda n: stops.are_in(ids[:n]))

    return stop_check


def _decode(
    config: ModelConfig,
    ids: list[int],
    stops: _Stops,
    *,
    finished: bool = True,
) -> str:
    """The text of ids up to the first of all the stop texts. finished: no other ids follow."""
    text = stops.decode(ids)
    if config.image_first:
        # what follows a space at the end decides which mark it is joined to
        text = clean_up_spaces(text if finished else text.rstrip())
    for stop_text in stops.texts:
        text = text.split(stop_text)[0]
    return text


def _shown_of_stops(tokenizer: Tokenizer, stop_texts: Sequence[str]) -> list[str]:
    """Texts of which a part may be decoded before they are cut off."""
    shown = list(stop_texts)
    for stop_text in stop_texts:
        decoded = tokenizer.decode(tokenizer.encode(stop_text)).strip()
        if decoded and decoded != stop_text.strip():
            shown.append(decoded + _NO_CHARACTER)  # all of it is a part
    return shown


def _all_stop_texts(config: ModelConfig, stop_texts: Sequence[str]) -> list[str]:
    """The texts that an answer is cut at: the model's, the request's and its format's."""
    candidates = (config.end_symbol, *stop_texts, *answer_ends(config))
    return [text for text in candidates if text.strip() or text in stop_texts]
