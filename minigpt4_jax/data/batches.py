"""From examples to padded arrays: text rows, images, one prompt a batch. NumPy alone, so that input
processes start without JAX."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minigpt4_jax import images
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.data.sources import Example
from minigpt4_jax.prompts import (
    IMAGE_SLOT,
    Row,
    build_conversation_row,
    build_row,
    fill_template,
    with_images,
)
from minigpt4_jax.tokenizer import Tokenizer


class Padding(NamedTuple):
    """Lengths that rows are padded to: multiples, so that few programs are compiled."""

    tokens: int = 32  # T is a multiple of this
    answers: int = 16  # A is a multiple of this


PADDING = Padding()


class Arrays(NamedTuple):
    """The fields of models.minigpt.Batch, in its order."""

    pixels: np.ndarray  # [B, I, S, S, 3] float32
    tokens: np.ndarray  # [B, T] int32
    lengths: np.ndarray  # [B] int32
    answers: np.ndarray  # [B, A] int32


def example_row(
    example: Example, tokenizer: Tokenizer, config: ModelConfig, prompt: str | None = None
) -> Row:
    """The training row of an example. `prompt` is asked where it is a caption without a question;
    None: the caption follows the bare visual tokens."""
    n = len(example.images)
    if example.questions:
        space = " " if n and config.variant == "minigpt-v2" else ""  # v2's datasets end them so
        questions = [question + space for question in example.questions]
        return build_conversation_row(tokenizer, config, questions, example.answers, images=n)
    asked = None
    if prompt is not None:
        asked = fill_template(config.prompt_template, _with_slots(prompt, n))
    return build_row(tokenizer, config, asked, example.answers[0], images=n)


def _with_slots(prompt: str, n: int) -> str:
    """A drawn prompt has one image slot; a row with more images gets as many in its place."""
    if n > 1 and prompt.count(IMAGE_SLOT) == 1:
        return prompt.replace(IMAGE_SLOT, IMAGE_SLOT * n)
    return with_images(prompt, n)


def pad_rows(
    rows: Sequence[Row], pad_id: int, padding: Padding = PADDING
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows -> tokens [B, T], lengths [B], answers [B, A] (-1 behind the last), all int32."""
    width = _round_up(max(len(row.tokens) for row in rows), padding.tokens)
    count = _round_up(max(len(row.answers) for row in rows), padding.answers)
    tokens = np.full((len(rows), width), pad_id, np.int32)
    answers = np.full((len(rows), count), -1, np.int32)
    for n, row in enumerate(rows):
        tokens[n, : len(row.tokens)] = row.tokens
        answers[n, : len(row.answers)] = row.answers
    return tokens, np.array([len(row.tokens) for row in rows], np.int32), answers


def _round_up(n: int, multiple: int) -> int:
    return max(1, -(-n // multiple)) * multiple


@dataclass(frozen=True)
class BatchMaker:
    """Makes batch number `step` of the examples at `indices`: a pure function of these two."""

    examples: Sequence[Example]
    tokenizer: Tokenizer
    config: ModelConfig
    prompts: tuple[str, ...]  # one is drawn for each batch; none: bare visual tokens
    batch_size: int
    seed: int
    padding: Padding
    crop: bool  # random resized crop instead of the plain resize
    shard: tuple[int, int]  # this process and how many there are: each makes its rows of the batch

    def __call__(self, step: int, indices: np.ndarray) -> Arrays:
        """indices [batch_size or fewer] -> this process's rows of the batch. Rows that are missing
        repeat the first without its labels."""
        chosen = [self.examples[i] for i in indices]
        fill = self.batch_size - len(chosen)
        prompt = self.draw_prompt(step)
        rows = [self.row(example, prompt) for example in chosen]
        rows += [rows[0]._replace(answers=[])] * fill
        chosen += chosen[:1] * fill
        tokens, lengths, answers = pad_rows(rows, self.tokenizer.pad_id, self.padding)
        process, processes = self.shard
        share = self.batch_size // processes
        mine = slice(process * share, (process + 1) * share)
        pixels = self._pixels(step, mine, [example.images for example in chosen])
        return Arrays(pixels, tokens[mine], lengths[mine], answers[mine])

    def row(self, example: Example, prompt: str | None) -> Row:
        return example_row(example, self.tokenizer, self.config, prompt)

    def draw_prompt(self, step: int) -> str | None:
        """The instruction of batch `step`: one for all its rows, as in the original."""
        if not self.prompts:
            return None
        return self.prompts[np.random.default_rng([self.seed, step]).integers(len(self.prompts))]

    def _pixels(self, step: int, mine: slice, paths: Sequence[Sequence[str]]) -> np.ndarray:
        """[B, I, S, S, 3] float32; I is the most that a row of the batch has, zeros where it has
        fewer."""
        size, most = self.config.vision.image_size, max(map(len, paths))
        pixels = np.zeros((len(paths[mine]), most, size, size, 3), np.float32)
        for n, row in enumerate(paths[mine]):
            for k, path in enumerate(row):
                image = images.open_image(path)
                if self.crop:
                    rng = np.random.default_rng([self.seed, step, mine.start + n, k])
                    small = images.random_crop(image, size, rng)
                else:
                    small = images.resize(image, size)
                pixels[n, k] = images.normalize(small)
        return pixels
