"""From generated ids to an answer's text: where it is cut, as a whole and piece by piece."""

import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.inference.generation_config import GenerationOutput
from minigpt4_jax.inference.requests import Completion
from minigpt4_jax.inference.stop_sequences import certain_part
from minigpt4_jax.processing import chat_templates as texts
from minigpt4_jax.processing.tokenizer import Tokenizer


def generation(
    tokenizer: Tokenizer, config: ModelConfig, answer: Completion, stop: Sequence[str]
) -> GenerationOutput:
    """What the interface says of an answer. stop: the texts it was to end at."""
    text = texts.clean_answer(_cut(tokenizer, config, answer.ids, stop))
    ended = "stop" if answer.stopped else "length"
    return GenerationOutput(text, answer.ids, answer.logprobs, ended, answer.score)


def pieces(
    tokenizer: Tokenizer,
    config: ModelConfig,
    progress: Iterable[tuple[int, Completion, bool]],
    stop: Sequence[str],
) -> Iterator[str]:
    """What is new in an answer as it grows. progress: as `Engine.run` yields it, of one request."""
    shown, endings = "", [*_endings(config, stop), "<s>"]  # "<s>" is taken out of the text
    for _, answer, over in progress:
        text = _cut(tokenizer, config, answer.ids, stop).replace("<s>", "").lstrip()
        text = text.rstrip() if over else certain_part(text, endings)
        if text.startswith(shown) and len(text) > len(shown):
            yield text[len(shown) :]
            shown = text


def halting(tokenizer: Tokenizer, stop: Sequence[str]) -> Callable[[list[int]], int | None]:
    """Says how many of some ids it takes to write a text of `stop`; None while there is none."""

    def halt(ids: list[int]) -> int | None:
        def written(count: int) -> bool:
            text = tokenizer.decode(ids[:count])
            return any(s in text for s in stop)

        if not written(len(ids)):
            return None
        return bisect.bisect_left(range(len(ids)), True, key=written)

    return halt


def _cut(tokenizer: Tokenizer, config: ModelConfig, ids: list[int], stop: Sequence[str]) -> str:
    text = tokenizer.decode(ids)
    for end in _endings(config, stop):
        text = text.split(end)[0]
    return text


def _endings(config: ModelConfig, stop: Sequence[str]) -> list[str]:
    """The texts that an answer is cut at."""
    return [e for e in (config.end_symbol, *stop, "###", "</s>") if e.strip() or e in stop]
