"""The likelihood of given answers: rows as in training, in batches of similar length."""

from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Integral, Real
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.inference.preprocess import error_context
from minigpt4_jax.inference.requests import bucket
from minigpt4_jax.inference.shared_programs import shared_programs
from minigpt4_jax.inference.visual_tokens import VisualTokens, stack_visual
from minigpt4_jax.models.minigpt import Batch, MiniGpt
from minigpt4_jax.parallel.sharding import constrain
from minigpt4_jax.processing.sequences import TokenSequence, build_row
from minigpt4_jax.processing.tokenizer import Tokenizer
from minigpt4_jax.utils.rounding import next_power_of_two

MAX_TOP = 20  # most likely tokens that `top_logprobs` returns
SCORE_BATCH = 8  # rows through the language model at a time


def answer_rows(
    tokenizer: Tokenizer,
    config: ModelConfig,
    prompts: Sequence[str | None],
    num_images: Sequence[int],
    answers: Sequence[str],
    numbers: Sequence[int] | None = None,
) -> list[TokenSequence]:
    """A row for each prompt (complete, with `<ImageHere>`) and its answer.

    numbers: of the prompts in messages. UserError: an answer that is not text, another number of answers
    than of prompts, a row longer than the model's context.
    """
    answers = [answers] if isinstance(answers, str) else list(answers)
    texts = [_answer_text(f"answer {i}", answer) for i, answer in enumerate(answers)]
    if len(answers) != len(prompts):
        raise UserError(
            f"{len(answers)} answers for {len(prompts)} prompts; expected one for each prompt"
        )
    rows = []
    for i, (prompt, answer, count) in enumerate(zip(prompts, texts, num_images, strict=True)):
        with error_context(f"prompt {i if numbers is None else numbers[i]}"):
            row = build_row(tokenizer, config, prompt, answer, images=count)
            if len(row.tokens) > config.llm.max_length:
                raise UserError(
                    f"a row of {len(row.tokens)} tokens exceeds the language model's context of "
                    f"{config.llm.max_length}; shorten the prompt"
                )
        rows.append(row)
    return rows


def _answer_text(name: str, answer: object) -> str:
    """The answer as text, also if it is a number. UserError: another type."""
    if isinstance(answer, str):
        return answer
    if isinstance(answer, Real) and not isinstance(answer, bool):
        return str(answer)
    raise UserError(f"{name}: got {type(answer).__name__}; expected text or a number")


def candidates_by_prompt(
    candidates: Sequence[Sequence[str]],
    num_prompts: int,
    counts: Sequence[int] | None,
    layout: str | None,
) -> list[list[str]]:
    """The candidates of each prompt, from either layout; see `Model.multi_select`."""
    rows = _candidate_rows(candidates, num_prompts)
    if layout not in (None, "prompt", "candidate"):
        raise UserError(f"layout {layout!r}: expected 'prompt', 'candidate' or None")
    given = None if counts is None else _counts_of_prompts(counts, num_prompts, layout)
    by_prompt = _in_layout(rows, num_prompts, counts is not None, layout)
    for i, texts in enumerate(by_prompt):
        for k, text in enumerate(texts):
            _answer_text(f"candidate {k} of prompt {i}", text)
        if given is not None and not 0 <= given[i] <= len(texts):
            raise UserError(
                f"count {i} is {given[i]}; expected 0 to {len(texts)}, the number of candidates of each "
                "prompt"
            )
    return by_prompt


def _candidate_rows(candidates: Any, num_prompts: int) -> list[list[str]]:
    """Lists of candidates, in the layout that they are given in. UserError: other types."""
    given = _as_list(candidates, "candidates", "a list of candidates for each prompt")
    if num_prompts > 1 and len(given) > 0 and all(isinstance(row, str) for row in given):
        raise UserError(
            f"one list of candidates for {num_prompts} prompts; expected a list for each prompt: "
            "[candidates] * len(prompts) ranks the same for all"
        )
    return [
        [row] if isinstance(row, str) else _as_list(row, f"candidates {i}", "a list of texts")
        for i, row in enumerate(given)
    ]


def _in_layout(
    rows: list[list[str]], num_prompts: int, counted: bool, layout: str | None
) -> list[list[str]]:
    """The candidates of each prompt. counted: counts are given, so the layout is the original's.

    UserError: both layouts fit, or none."""
    by_prompt_fits = len(rows) == num_prompts and not counted and layout != "candidate"
    transposed_fits = bool(rows) and layout != "prompt" and {*map(len, rows)} == {num_prompts}
    transposed = [list(column) for column in zip(*rows, strict=False)]
    if by_prompt_fits and (not transposed_fits or transposed == rows):
        return rows
    if transposed_fits and not by_prompt_fits:
        return transposed
    layouts = (
        "a list of candidates for each prompt (layout='prompt'), or in candidates[k] the k-th candidate "
        "of every prompt (layout='candidate')"
    )
    if by_prompt_fits:
        raise UserError(
            f"{len(rows)} x {num_prompts} candidates for {num_prompts} prompts can be read both ways: "
            f"{layouts}; pass layout="
        )
    lengths = ", ".join(str(len(row)) for row in rows[:8])
    raise UserError(
        f"{len(rows)} lists of candidates (of {lengths or 'no'} texts) for {num_prompts} prompts; expected "
        f"{layouts}"
    )


def _as_list(value: Any, name: str, expected: str) -> list[Any]:
    """UserError: not a list, such as a text, or a set, which has no order."""
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping, Set)):
        raise UserError(f"{name}: got {type(value).__name__}; expected {expected}")
    return list(value)


def _counts_of_prompts(counts: Any, num_prompts: int, layout: str | None) -> list[int]:
    """UserError: not a whole number for each prompt, or the layout has no place for them."""
    given = list(counts) if isinstance(counts, Iterable) else []
    if layout == "prompt" or len(given) != num_prompts:
        raise UserError(
            f"{len(given)} counts for {num_prompts} prompts"
            + (" with layout 'prompt'" if layout == "prompt" else "")
            + "; expected one for each prompt, and candidates[k] with the k-th candidate of each"
        )
    for i, count in enumerate(given):
        if not isinstance(count, Integral) or isinstance(count, bool):
            raise UserError(f"count {i} is {count!r}; expected a whole number")
    return [int(count) for count in given]


def padded_mean(rows: Sequence[TokenSequence], nll: np.ndarray) -> np.ndarray:
    """The original's loss of each row [B]: nll / (padded length - 1).

    It pads all prompts and all answers of a batch to their longest.
    """
    prompt_lengths = [len(row.tokens) - len(row.label_positions) for row in rows]
    answer_lengths = [len(row.label_positions) for row in rows]
    padded = max(prompt_lengths, default=2) + max(answer_lengths, default=0)
    loss: np.ndarray = nll / (padded - 1)
    return loss


class Scorer:
    """Compiled log-likelihood of answers. `state` is the model's parameters (nnx.state)."""

    def __init__(self, graphdef: Any, config: ModelConfig, mesh: Mesh | None):
        self._config = config
        compiled = shared_programs(graphdef, mesh)
        self._nll, self._top = compiled(_summed_nll), compiled(_top_logprobs)

    def top_logprobs(
        self, state: Any, tokens: Sequence[int], visual: VisualTokens | None, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The MAX_TOP most likely tokens instead of each of the last `count` tokens of a row, by the model
        itself: (ids [count, MAX_TOP], log-probabilities), most likely first."""
        padded = np.zeros((1, bucket(len(tokens))), np.int32)
        padded[0, : len(tokens)] = tokens
        positions = np.zeros(bucket(count, 16), np.int32)  # of the tokens that predict them
        positions[:count] = np.arange(len(tokens) - count, len(tokens)) - 1
        stacked = stack_visual([visual], self._config.visual_tokens, self._config.visual_width)
        ids, logprobs = self._top(state, padded, stacked, np.array([len(tokens)]), positions)
        return np.asarray(ids)[:count], np.asarray(logprobs)[:count]

    def nll(
        self, state: Any, rows: Sequence[TokenSequence], visual: Sequence[VisualTokens | None]
    ) -> np.ndarray:
        """The summed negative log-likelihood of each row's labelled tokens: [B] float32.

        visual: visual tokens [I * P, D] of each row.
        """
        nll = np.zeros(len(rows), np.float32)
        by_length = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
        for start in range(0, len(by_length), SCORE_BATCH):
            indices = by_length[start : start + SCORE_BATCH]
            batch = _score_batch([rows[i] for i in indices])
            padding = [None] * (len(batch.lengths) - len(indices))
            stacked = stack_visual(
                [*(visual[i] for i in indices), *padding],
                self._config.visual_tokens,
                self._config.visual_width,
            )
            nll[indices] = self._nll(state, batch, stacked)[: len(indices)]
        return nll


def _summed_nll(model: MiniGpt, batch: Batch, visual: jax.Array) -> jax.Array:
    return constrain(model.answer_nll(batch, visual).sum(1))


def _top_logprobs(
    model: MiniGpt, tokens: jax.Array, visual: jax.Array, length: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """tokens [1, T], visual [1, I * P, D], length [1], positions [A] -> ids and log-probabilities
    [A, MAX_TOP] of the tokens after the positions."""
    hidden = model.llm(model.merge(tokens, visual), length)
    logits = model.llm.logits(hidden[0, positions])
    best, ids = jax.lax.top_k(logits, min(MAX_TOP, logits.shape[1]))
    logprobs = best - jax.nn.logsumexp(logits, axis=1, keepdims=True)
    return constrain(ids), constrain(logprobs)


def _score_batch(rows: list[TokenSequence]) -> Batch:
    """Rows padded to bucket sizes; without pixels, as their images are encoded already."""
    b = next_power_of_two(len(rows))
    lengths = np.ones(b, np.int32)
    tokens = np.zeros((b, bucket(max(len(row.tokens) for row in rows))), np.int32)
    num_labels = bucket(max(len(row.label_positions) for row in rows), 16)
    label_positions = np.full((b, num_labels), -1, np.int32)
    for i, row in enumerate(rows):
        lengths[i] = len(row.tokens)
        tokens[i, : len(row.tokens)] = row.tokens
        label_positions[i, : len(row.label_positions)] = row.label_positions
    return Batch(np.zeros((b, 0)), tokens, lengths, label_positions)
