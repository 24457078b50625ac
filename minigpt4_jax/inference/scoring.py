"""How likely given answers are: rows as for training, in batches of similar length."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.inference.preprocess import naming
from minigpt4_jax.inference.requests import bucket, stack_visual
from minigpt4_jax.models.minigpt import Batch
from minigpt4_jax.processing import sequences
from minigpt4_jax.processing.tokenizer import Tokenizer
from minigpt4_jax.utils.rounding import next_power_of_two

SCORE_BATCH = 8  # rows through the language model at a time


def answer_rows(
    tokenizer: Tokenizer,
    config: ModelConfig,
    prompts: Sequence[str | None],
    images: Sequence[int],
    answers: Sequence[str],
) -> list[sequences.TokenSequence]:
    """A row for each prompt with its answer. images: how many a prompt has. UserError: an answer
    that is no text, another number of answers, a row longer than the model's context."""
    answers = [answers] if isinstance(answers, str) else list(answers)
    for i, answer in enumerate(answers):
        if not isinstance(answer, str):
            raise UserError(f"answer {i}: got {type(answer).__name__}; expected text")
    if len(answers) != len(prompts):
        raise UserError(f"{len(answers)} answers for {len(prompts)} prompts; expected as many")
    rows = []
    for i, (prompt, answer, count) in enumerate(zip(prompts, answers, images, strict=True)):
        with naming(f"prompt {i}"):
            row = sequences.build_row(tokenizer, config, prompt, answer, images=count)
            if len(row.tokens) > config.llm.max_length:
                raise UserError(
                    f"a row of {len(row.tokens)} tokens exceeds the language model's context of "
                    f"{config.llm.max_length}; shorten the prompt"
                )
        rows.append(row)
    return rows


def summed_nll(
    rows: Sequence[sequences.TokenSequence],
    visual: Sequence[np.ndarray | None],
    width: int,
    program: Callable[[Batch, np.ndarray], jax.Array],
) -> np.ndarray:
    """[B] float32: the negative log-likelihood of each row's answer.

    visual: the visual tokens [I * P, D = width] of the rows. program: (batch, visual tokens of its
    rows) -> [b].
    """
    nll = np.zeros(len(rows), np.float32)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
    for at in range(0, len(order), SCORE_BATCH):
        some = order[at : at + SCORE_BATCH]
        batch = _score_batch([rows[i] for i in some])
        slots = [visual[i] for i in some] + [None] * (len(batch.lengths) - len(some))
        nll[some] = program(batch, stack_visual(slots, width))[: len(some)]
    return nll


def _score_batch(rows: list[sequences.TokenSequence]) -> Batch:
    """Rows padded to a bucket; without pixels, as the images are encoded already."""
    b = next_power_of_two(len(rows))
    lengths = np.ones(b, np.int32)
    tokens = np.zeros((b, bucket(max(len(row.tokens) for row in rows))), np.int32)
    answers = np.full((b, bucket(max(len(row.label_positions) for row in rows), 16)), -1, np.int32)
    for i, row in enumerate(rows):
        lengths[i] = len(row.tokens)
        tokens[i, : len(row.tokens)] = row.tokens
        answers[i, : len(row.label_positions)] = row.label_positions
    return Batch(np.zeros((b, 0)), tokens, lengths, answers)
