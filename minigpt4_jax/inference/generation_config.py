"""The options of a call to `Model.generate` and what it says about each answer."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from minigpt4_jax.errors import UserError
from minigpt4_jax.inference.beam_search import BeamSearchConfig
from minigpt4_jax.inference.sampling import SamplingParams


@dataclass(frozen=True)
class GenerationOutput:
    """One answer, as `Model.generate_details` returns it."""

    text: str
    ids: list[int]  # generated tokens, those that ended it included
    logprobs: list[float]  # of each id, by the model itself: before penalties and filters
    finish_reason: str  # "stop": at an end symbol or stop text; "length": at max_new_tokens
    score: float  # the sum of logprobs; of beams: what they were compared by


@dataclass(frozen=True)
class GenerationConfig:
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
    stop: Sequence[str] | Sequence[Sequence[str]] = ()
    stop_ids: Sequence[int] | Sequence[Sequence[int]] = ()
    seed: int | Sequence[int] = 0
    template: bool = False
    extra_bos: bool = True
    compat: bool = False
    context: int | None = None

    @classmethod
    def of(cls, options: dict[str, Any]) -> "GenerationConfig":
        """UserError: an unknown option, a value out of its range, options that contradict."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise UserError(f"option {name!r} is not known; known are {', '.join(known)}")
        lists: dict[str, Any] = {
            name: _listed(name, options[name]) for name in ("stop", "stop_ids") if name in options
        }
        generation_config = cls(**{**options, **lists})
        generation_config._check_numbers()
        if generation_config.max_new_tokens < 1:
            raise UserError(
                f"max_new_tokens {generation_config.max_new_tokens}: expected at least 1"
            )
        generation_config.beams().check(generation_config.sampling().check())
        return generation_config

    def _check_numbers(self) -> None:
        for field in fields(self):
            value: Any = getattr(self, field.name)
            whole = type(field.default) is int
            if field.name == "seed" or (not whole and type(field.default) is not float):
                continue
            kind: Any = Integral if whole else Real
            if not isinstance(value, kind):
                expected = "a whole number" if whole else "a number"
                raise UserError(f"{field.name} {value!r}: expected {expected}")
            if whole and not abs(value) < 1 << 31:
                raise UserError(f"{field.name} {value}: expected less than 2^31")
        if not (self.context is None or isinstance(self.context, Integral)):
            raise UserError(f"context {self.context!r}: expected a number of tokens, or None")

    def stop_texts(self, rows: int) -> list[tuple[str, ...]]:
        """`stop` of each of so many rows."""
        return _for_rows("stop", self.stop, rows)

    def stop_tokens(self, rows: int) -> list[tuple[int, ...]]:
        """`stop_ids` of each of so many rows."""
        return _for_rows("stop_ids", self.stop_ids, rows)

    def seeds(self, rows: int) -> list[int]:
        """Of each of so many rows."""
        if isinstance(self.seed, Integral):
            return [int(self.seed)] * rows
        given: Any = self.seed
        seeds: list[Any] = list(given) if _is_list(given) else [None]
        if not all(isinstance(s, Integral) for s in seeds):
            raise UserError(f"seed {self.seed!r}: expected a whole number, or one for each prompt")
        if len(seeds) != rows:
            raise UserError(f"{len(seeds)} seeds for {rows} prompts; expected as many or one")
        return [int(s) for s in seeds]

    def sampling(self, bos: int | None = None) -> SamplingParams:
        """bos: the token that `compat` counts as the first of an answer."""
        options = SamplingParams(
            self.temperature, self.top_k, self.top_p, self.repetition_penalty,
            self.min_new_tokens, self.min_p,
        )  # fmt: skip
        if not self.compat or bos is None:
            return options
        return options._replace(min_new_tokens=max(0, self.min_new_tokens - 1), before=bos)

    def beams(self) -> BeamSearchConfig:
        return BeamSearchConfig(
            self.num_beams, self.length_penalty, self.early_stopping, self.num_return_sequences
        )


def _listed(name: str, entries: Any) -> tuple:
    """The entries of `stop` or `stop_ids`, or a tuple of them for each row. UserError: of another kind."""
    if not _is_list(entries):
        kind = "texts" if name == "stop" else "ids"
        raise UserError(f"{name} {entries!r}: expected a list of {kind}")
    entries = tuple(entries)
    if any(map(_is_list, entries)):
        return tuple(_listed(name, row) for row in entries)
    for i, entry in enumerate(entries):
        if name == "stop" and (not isinstance(entry, str) or not entry):
            raise UserError(f"stop {i} is {entry!r}; expected a text that ends the answer")
        if name == "stop_ids" and not (isinstance(entry, Integral) and 0 <= int(entry) < 1 << 31):
            raise UserError(f"stop_ids {i} is {entry!r}; expected the id of a token")
    return entries


def _is_list(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str)


def _for_rows(name: str, entries: Any, rows: int) -> list[tuple]:
    if not any(map(_is_list, entries)):
        return [tuple(entries)] * rows
    if len(entries) != rows:
        raise UserError(
            f"{len(entries)} lists of {name} for {rows} prompts; expected as many or one"
        )
    return list(entries)
