"""The objects of OpenAI's API that answers are sent as."""

import bisect
import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from minigpt4_jax import __version__
from minigpt4_jax.inference.requests import Completion
from minigpt4_jax.processing.boxes import parse_boxes
from minigpt4_jax.processing.tokenizer import Tokenizer
from minigpt4_jax.serving.jobs import Generation
from minigpt4_jax.serving.service import TopTokens


class Envelope:
    """What all objects of one response share."""

    def __init__(self, kind: str, prefix: str, model: str):
        """kind: the objects' name; prefix: of the response's id."""
        self.fields = {
            "id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()),
            "model": model, "system_fingerprint": f"minigpt4_jax-{__version__}",
        }  # fmt: skip

    def __call__(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """An object with these choices."""
        return {**self.fields, "choices": choices, **more}


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> dict[str, Any]:
    """The number of tokens of a request."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def usage_of(jobs: Sequence[Generation], completions: Sequence[Completion]) -> dict[str, Any]:
    """The usage of jobs that share their prompt; each prompt counts once."""
    prompts = {id(job.request.tokens): job for job in jobs}.values()
    return usage(
        sum(len(job.request.tokens) for job in prompts),
        sum(len(completion.ids) for completion in completions),
        sum(job.cached_tokens for job in prompts),
    )


def event(data: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


DONE = "data: [DONE]\n\n"  # the last event of a stream


def boxes(text: str, size: tuple[int, int]) -> list[dict[str, Any]]:
    """The boxes of an answer: phrase, and corners in pixels of an image of this size."""
    return [
        {"phrase": phrase, "box": [round(v, 2) for v in box]}
        for phrase, box in parse_boxes(text, *size)
    ]


class LogProbs:
    """The log-probabilities of an answer's tokens, in step with its text."""

    def __init__(self, tokenizer: Tokenizer, num_top: int = 0, top: TopTokens | None = None):
        """top: the most likely tokens at each place, of which num_top are returned."""
        self._tokenizer, self._num_top, self._top = tokenizer, num_top, top
        self._sent = 0  # tokens
        self._offset = 0  # characters

    def _take(self, completion: Completion, characters: int) -> range:
        """The places of the next tokens, which spell the text up to some characters."""
        ids, decode = completion.ids, self._tokenizer.decode
        text = decode(ids)
        end = characters + len(text) - len(text.lstrip())
        count = bisect.bisect_left(range(len(ids)), end, key=lambda n: len(decode(ids[:n])))
        start, self._sent = self._sent, max(self._sent, count)
        return range(start, self._sent)

    def _text(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special=False)

    def _best(self, place: int) -> list[tuple[str, float]]:
        """The most likely tokens at a place."""
        if self._top is None:
            return []
        ids, logprobs = (array[place, : self._num_top].tolist() for array in self._top)
        return [(self._text(i), logprob) for i, logprob in zip(ids, logprobs, strict=True)]

    def chat(self, completion: Completion, characters: int) -> dict[str, Any]:
        """As in /v1/chat/completions. characters: of the text that has been sent, with this piece."""
        content = [
            _token(self._text(completion.ids[n]), completion.logprobs[n])
            | {"top_logprobs": [_token(*best) for best in self._best(n)]}
            for n in self._take(completion, characters)
        ]
        return {"content": content, "refusal": None}

    def legacy(self, completion: Completion, characters: int) -> dict[str, Any]:
        """As in /v1/completions."""
        places = self._take(completion, characters)
        texts = [self._text(completion.ids[n]) for n in places]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts, "token_logprobs": [completion.logprobs[n] for n in places],
            "top_logprobs": [dict(self._best(n)) for n in places] if self._num_top else None,
            "text_offset": offsets,
        }  # fmt: skip


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
