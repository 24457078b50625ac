"""The options of `Model.generate`, and what it returns for each answer."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

from minigpt4_jax.errors import UserError
from minigpt4_jax.inference.beam_search import BeamSearchConfig
from minigpt4_jax.inference.sampling import SamplingParams
from minigpt4_jax.utils.text import spelling_hint


@dataclass(frozen=True)
class GenerationOutput:
    """One answer, as `Model.generate_details` returns it.

    Attributes:
        text: the answer, without what ended it.
        ids: generated tokens, including those that ended it.
        logprobs: log-probability of each id by the model itself, before penalties and filters.
        finish_reason: "stop" at an end symbol or stop text, "length" at max_new_tokens, "error" where
            the answer could not be generated, or not to its end.
        score: the sum of logprobs; in beam search the score that answers were ranked by.
        error: what went wrong, for the finish_reason "error".
    """

    text: str
    ids: list[int]
    logprobs: list[float]
    finish_reason: str
    score: float
    error: str | None = None


@dataclass(frozen=True)
class GenerationConfig:
    """How answers are generated. UserError: a value out of range, or options that contradict.

    An answer ends at the model's end symbol, at EOS, at a text in `stop`, at a token in `stop_ids` or
    after `max_new_tokens`. Sampling follows transformers: repetition_penalty, temperature, top_k,
    top_p, min_p, in this order. So does beam search.

    Attributes:
        max_new_tokens: tokens of an answer at most.
        temperature: 0 is greedy decoding. Higher values sample more evenly.
        top_p: sample from the most likely tokens whose probabilities sum to this; 1 is off.
        top_k: sample from this many of the most likely tokens; 0 is off.
        min_p: drop tokens less likely than this times the most likely one; 0 is off.
        repetition_penalty: divides the scores of tokens generated before (not the prompt's); 1 is off.
        frequency_penalty: subtracted from a token's score for each time that it was generated; 0 is off.
        presence_penalty: subtracted once from the scores of generated tokens; 0 is off.
        min_new_tokens: no stop token before this many; a stop text that is spelled by others before
            cuts the text, but ends the answer only then.
        num_beams: more than 1 is beam search, which excludes sampling.
        length_penalty: beams are ranked by log-probability / length ** length_penalty. The length
            counts a BOS before the answer, as in the original.
        early_stopping: end the search at the first num_beams finished answers.
        num_return_sequences: answers of each prompt, best first; at most num_beams.
        stop: texts that end an answer and are cut off, or a list of texts for each prompt. Beam search
            recognizes a stop text only by its usual tokens.
        stop_ids: tokens that end an answer, or a list of tokens for each prompt.
        seed: of random sampling; an answer depends on its own prompt and seed only, so equal prompts
            get equal answers under one seed. A list has a seed for each prompt.
        template: True: prompts are plain questions, to be put into the template that the model was
            trained with. False: prompts are complete, with `<ImageHere>` where an image goes.
        extra_bos: released Llama-2 and MiniGPT-v2 weights were used with a BOS before the `<s>` that
            their prompts begin with. False leaves one BOS.
        compat: the original's answers begin with a BOS. True counts it: repetition_penalty applies to
            it, and min_new_tokens is the original's min_length.
        context: cut prompts on the left so that prompt and answer fit into this many tokens. None:
            a prompt that is too long for the model is an error.
    """

    max_new_tokens: int = 200
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
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

    def __post_init__(self) -> None:
        for name in ("stop", "stop_ids"):
            object.__setattr__(self, name, _as_tuple(name, getattr(self, name)))
        self._check_numbers()
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens {self.max_new_tokens}: expected at least 1")
        self.beam_search().check(self.sampling_params().check())

    @classmethod
    def merge(
        cls, config: "GenerationConfig | None", overrides: Mapping[str, Any]
    ) -> "GenerationConfig":
        """`config`, or the defaults, with single options replaced. UserError: an unknown option."""
        if config is None:
            config = cls()
        elif not isinstance(config, cls):
            raise UserError(
                f"config: got {type(config).__name__}; expected a GenerationConfig, or options by name"
            )
        known = [field.name for field in fields(cls)]
        for name in overrides:
            if name not in known:
                raise UserError(f"option {name!r} is not known; {spelling_hint(name, known)}")
        return replace(config, **overrides)

    def _check_numbers(self) -> None:
        for field in fields(self):
            value: Any = getattr(self, field.name)
            is_integer = type(field.default) is int  # not bool
            if field.name == "seed" or (not is_integer and type(field.default) is not float):
                continue
            number: Any = Integral if is_integer else Real
            if not isinstance(value, number):
                expected = "a whole number" if is_integer else "a number"
                raise UserError(f"{field.name} {value!r}: expected {expected}")
            if is_integer and not abs(value) < 1 << 31:
                raise UserError(f"{field.name} {value}: expected less than 2^31")
        if not (self.context is None or isinstance(self.context, Integral)):
            raise UserError(f"context {self.context!r}: expected a number of tokens, or None")
        if self.context is not None and self.context < 1:
            raise UserError(f"context {self.context}: expected at least 1")

    def check_streamable(self) -> None:
        """UserError for beam search, which decides on the first token at the end."""
        if self.num_beams != 1:
            raise UserError(f"num_beams {self.num_beams}: beam search cannot stream; set it to 1")

    def stop_of_prompts(self, num_prompts: int) -> list[tuple[str, ...]]:
        """The stop texts of each prompt. UserError: lists for another number of prompts."""
        return _of_prompts("stop", self.stop, num_prompts)

    def stop_ids_of_prompts(self, num_prompts: int) -> list[tuple[int, ...]]:
        """The stop tokens of each prompt. UserError: lists for another number of prompts."""
        return _of_prompts("stop_ids", self.stop_ids, num_prompts)

    def seed_of_prompts(self, num_prompts: int) -> list[int]:
        """The seed of each prompt. UserError: not a number, or another number of them."""
        if isinstance(self.seed, Integral):
            return [int(self.seed)] * num_prompts
        value: Any = self.seed
        seeds: list[Any] = list(value) if _is_list(value) else [None]
        if not all(isinstance(seed, Integral) for seed in seeds):
            raise UserError(f"seed {self.seed!r}: expected a whole number, or one for each prompt")
        if len(seeds) != num_prompts:
            raise UserError(
                f"{len(seeds)} seeds for {num_prompts} prompts; expected one, or one for each prompt"
            )
        return [int(seed) for seed in seeds]

    def sampling_params(self, bos_id: int | None = None) -> SamplingParams:
        """bos_id: the token that `compat` counts as the first of an answer."""
        params = SamplingParams(
            self.temperature, self.top_k, self.top_p, self.repetition_penalty,
            self.min_new_tokens, self.min_p,
            frequency_penalty=self.frequency_penalty, presence_penalty=self.presence_penalty,
        )  # fmt: skip
        if not self.compat or bos_id is None:
            return params
        min_new_tokens = max(0, self.min_new_tokens - 1)
        return params._replace(min_new_tokens=min_new_tokens, prior_token=bos_id)

    def beam_search(self) -> BeamSearchConfig:
        """The options of beam search."""
        return BeamSearchConfig(
            self.num_beams, self.length_penalty, self.early_stopping, self.num_return_sequences
        )


def _as_tuple(name: str, entries: Any) -> tuple[Any, ...]:
    """The entries of `stop` or `stop_ids`, or a tuple of them for each prompt. UserError: other types."""
    if not _is_list(entries):
        kind = "texts" if name == "stop" else "ids"
        raise UserError(f"{name} {entries!r}: expected a list of {kind}")
    values: tuple[Any, ...] = tuple(entries)
    if any(map(_is_list, values)):
        return tuple(_as_tuple(name, entry) for entry in values)
    for i, entry in enumerate(values):
        if name == "stop" and (not isinstance(entry, str) or not entry):
            raise UserError(f"stop {i} is {entry!r}; expected a text that ends the answer")
        if name == "stop_ids" and not (isinstance(entry, Integral) and 0 <= int(entry) < 1 << 31):
            raise UserError(f"stop_ids {i} is {entry!r}; expected a token id")
    return values


def _is_list(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str)


def _of_prompts(name: str, entries: Any, num_prompts: int) -> list[tuple[Any, ...]]:
    if not any(map(_is_list, entries)):
        return [tuple(entries)] * num_prompts
    if len(entries) != num_prompts:
        raise UserError(
            f"{len(entries)} lists of {name} for {num_prompts} prompts; expected one list, or one "
            "for each prompt"
        )
    return list(entries)
