"""The options of a call to `Model.generate` and what it says about each answer."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from minigpt4_jax.errors import UserError
from minigpt4_jax.generate.beams import Beams
from minigpt4_jax.generate.sampling import Options


@dataclass(frozen=True)
class Generation:
    """One answer, as `Model.generate_details` returns it."""

    text: str
    ids: list[int]  # generated tokens, those that ended it included
    logprobs: list[float]  # of each id, by the model itself: before penalties and filters
    finish_reason: str  # "stop": at an end symbol or stop text; "length": at max_new_tokens
    score: float  # the sum of logprobs; of beams: what they were compared by


@dataclass(frozen=True)
class Wishes:
    """The options of `Model.generate`, which explains them."""

    max_new_tokens: int = 200
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    num_return_sequences: int = 1
    stop: Sequence[str] = ()
    seed: int | Sequence[int] = 0
    template: bool = False
    extra_bos: bool = True
    context: int | None = None

    @classmethod
    def of(cls, options: dict[str, Any]) -> "Wishes":
        """UserError: an unknown option, a value out of its range, options that contradict."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise UserError(f"option {name!r} is not known; known are {', '.join(known)}")
        wishes = cls(**options)
        if wishes.max_new_tokens < 1:
            raise UserError(f"max_new_tokens {wishes.max_new_tokens}: expected at least 1")
        wishes.beams().check(wishes.sampling().check())
        if isinstance(wishes.stop, str):
            raise UserError(f"stop {wishes.stop!r}: expected a list of texts")
        for i, text in enumerate(wishes.stop):
            if not isinstance(text, str) or not text:
                raise UserError(f"stop {i} is {text!r}; expected a text that ends the answer")
        return wishes

    def sampling(self) -> Options:
        return Options(
            self.temperature, self.top_k, self.top_p, self.repetition_penalty,
            self.min_new_tokens, self.min_p,
        )  # fmt: skip

    def beams(self) -> Beams:
        return Beams(
            self.num_beams, self.length_penalty, self.early_stopping, self.num_return_sequences
        )
