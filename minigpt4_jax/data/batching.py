"""Make padded batches of examples: token sequences, images, one prompt per batch.

Uses only NumPy, so that worker processes start without JAX.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.data.arrays import PADDING, BatchArrays, BatchLayout, PackedArrays, Padding
from minigpt4_jax.data.json_records import Example
from minigpt4_jax.data.mixture import BatchOrder, ExampleRef, MixtureComponent
from minigpt4_jax.data.skipped import SkippedRow, skipped_row
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing import images
from minigpt4_jax.processing.chat_templates import IMAGE_SLOT, with_images
from minigpt4_jax.processing.sequences import (
    TokenSequence,
    build_conversation_row,
    build_row,
    training_prompt,
)
from minigpt4_jax.processing.tokenizer import Tokenizer
from minigpt4_jax.utils.rounding import round_up

_ATTEMPTS = 8  # examples tried for one row of a batch


class ProcessShard(NamedTuple):
    """The rows of a batch that one of several processes makes, for its own devices."""

    rows: tuple[int, ...]  # ascending
    counted: frozenset[int]  # those of rows that no process with a lower number makes as well


class LoadedBatch(NamedTuple):
    """A batch as a worker returns it."""

    arrays: BatchArrays | PackedArrays | None  # None: no readable example for some row
    skipped: tuple[SkippedRow, ...]  # among the rows that this process counts
    num_rows: int  # rows that this process counts
    layout: BatchLayout | None = None


# --- token sequences -------------------------------------------------------------------------


def tokenize_example(
    example: Example, tokenizer: Tokenizer, config: ModelConfig, prompt: str | None = None
) -> TokenSequence:
    """The training row of an example.

    prompt: the instruction for an example that is a caption without a question; None: the caption
    directly follows the visual tokens.
    """
    n = len(example.images)
    if example.questions:
        space = " " if n and config.variant == "minigpt-v2" else ""  # as in the v2 datasets
        questions = [question + space for question in example.questions]
        return build_conversation_row(
            tokenizer, config, questions, example.answers, images=n, system=example.system
        )
    answer = example.answers[0]
    if prompt is None:
        return build_row(tokenizer, config, None, answer, images=n)
    question = _with_image_slots(prompt, n)
    if config.tokenizer.chat_template:
        return build_conversation_row(tokenizer, config, [question], [answer], images=n)
    templated = training_prompt(tokenizer, config, question)
    return build_row(tokenizer, config, templated, answer, images=n)


def _with_image_slots(prompt: str, num_images: int) -> str:
    """Repeat the single image slot of a prompt for an example with several images."""
    if num_images > 1 and prompt.count(IMAGE_SLOT) == 1:
        return prompt.replace(IMAGE_SLOT, IMAGE_SLOT * num_images)
    return with_images(prompt, num_images)


class _PaddedSize(NamedTuple):
    """What the rows of a batch are padded to."""

    tokens: int  # T
    labels: int  # A

    @classmethod
    def of(cls, sequences: Sequence[TokenSequence], padding: Padding) -> "_PaddedSize":
        tokens = max(len(s.tokens) for s in sequences)
        labels = max(len(s.label_positions) for s in sequences)
        return cls(
            round_up(max(1, tokens), padding.tokens), round_up(max(1, labels), padding.answers)
        )

    def fits(self, sequence: TokenSequence) -> bool:
        return len(sequence.tokens) <= self.tokens and len(sequence.label_positions) <= self.labels

    def pad(
        self, sequences: Sequence[TokenSequence], pad_id: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """-> tokens [B, T], lengths [B], label positions [B, A] (padded with -1)."""
        tokens = np.full((len(sequences), self.tokens), pad_id, np.int32)
        label_positions = np.full((len(sequences), self.labels), -1, np.int32)
        for n, sequence in enumerate(sequences):
            tokens[n, : len(sequence.tokens)] = sequence.tokens
            label_positions[n, : len(sequence.label_positions)] = sequence.label_positions
        lengths = np.array([len(sequence.tokens) for sequence in sequences], np.int32)
        return tokens, lengths, label_positions


def pad_sequences(
    sequences: Sequence[TokenSequence], pad_id: int, padding: Padding = PADDING
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-> tokens [B, T], lengths [B], label positions [B, A] (padded with -1), all int32."""
    return _PaddedSize.of(sequences, padding).pad(sequences, pad_id)


# --- batches ---------------------------------------------------------------------------------


class _Candidate(NamedTuple):
    """An example for a row; its images have not been opened."""

    example: Example
    sequence: TokenSequence

    def without_labels(self) -> "_Candidate":
        return self._replace(sequence=self.sequence._replace(label_positions=[]))


def image_id(example: Example) -> int:
    """A number of 32 bits for the images of an example, equal for the same ones in all processes."""
    digest = hashlib.blake2b(digest_size=4)
    for image in example.images:
        digest.update(image if isinstance(image, bytes) else os.fsencode(images.name_of(image)))
    return int.from_bytes(digest.digest(), "little", signed=True)


@dataclass
class _Row:
    """A row of a batch while it is made."""

    dataset: str
    candidate: _Candidate | None  # None: no attempt could be read
    replacements: Iterator[_Candidate]  # further candidates, read when needed
    skipped: list[SkippedRow]  # failed attempts
    exif: bool = False  # rotate its images


@dataclass(frozen=True)
class BatchMaker:
    """Makes batch number `step`: a pure function of the step.

    An example that cannot be read is replaced by another of the same dataset, drawn by the seed and the
    row. Batches are padded to the lengths before any image is opened, because each process opens only
    the images of its own rows; a replacement is therefore never longer than the padded size.
    """

    components: tuple[MixtureComponent, ...]
    order: BatchOrder
    tokenizer: Tokenizer
    config: ModelConfig
    seed: int
    padding: Padding = PADDING
    crop: bool = False  # random resized crop instead of resizing the whole image
    flip: bool = False  # mirror half of the images
    image_ids: bool = False  # number the images, so that rows of the same one are known
    # batch size -> the rows that this process makes; a missing size: all rows
    shards: Mapping[int, ProcessShard] = field(default_factory=dict)
    # With packing, rows are laid out by BatchLayout: a replacement must not exceed the length of the
    # example that it replaces.
    keep_lengths: bool = False

    def __call__(self, step: int) -> LoadedBatch:
        """-> this process's rows of the batch. Missing rows repeat the first one without its labels."""
        size = self.order.batch_size(step)
        shard = self.shards.get(size) or ProcessShard(tuple(range(size)), frozenset(range(size)))
        rows = [self._start_row(ref, step) for ref in self.order.examples(step)]
        candidates = [row.candidate for row in rows if row.candidate is not None]
        if len(candidates) < len(rows):
            skipped = tuple(s for row in rows for s in row.skipped)
            return LoadedBatch(None, skipped, len(shard.counted))
        missing = size - len(rows)
        rows += [_Row(rows[0].dataset, None, iter(()), []) for _ in range(missing)]
        candidates += [candidates[0].without_labels()] * missing
        sequences = [candidate.sequence for candidate in candidates]
        padded = _PaddedSize.of(sequences, self.padding)
        max_images = max(len(candidate.example.images) for candidate in candidates)
        side = self.config.vision.image_size
        pixels = np.zeros((len(shard.rows), max_images, side, side, 3), np.uint8)
        loaded = [
            self._load_images(pixels[i], rows[n], candidates[n], padded, (step, n))
            for i, n in enumerate(shard.rows)
        ]
        arrays = BatchArrays(
            pixels, *padded.pad([c.sequence for c in loaded], self.tokenizer.pad_id),
            np.array([image_id(c.example) for c in loaded], np.int32) if self.image_ids else None,
        )  # fmt: skip
        skipped = tuple(s for n in sorted(shard.counted) for s in rows[n].skipped)
        layout = BatchLayout(
            tuple(len(s.tokens) for s in sequences),
            tuple(len(s.label_positions) for s in sequences),
            shard.rows,
        )
        return LoadedBatch(arrays, skipped, len(shard.counted), layout)

    def tokenize(self, example: Example, prompt: str | None) -> TokenSequence:
        return tokenize_example(example, self.tokenizer, self.config, prompt)

    def draw_prompt(self, step: int, component: int = 0) -> str | None:
        """The prompt of batch `step`: one for all its rows of a dataset, as in the original."""
        prompts = self.components[component].prompts
        if not prompts:
            return None
        return prompts[np.random.default_rng([self.seed, step]).integers(len(prompts))]

    def _start_row(self, ref: ExampleRef, step: int) -> _Row:
        skipped: list[SkippedRow] = []
        candidates = self._candidates(ref, self.draw_prompt(step, ref.component), skipped)
        component = self.components[ref.component]
        return _Row(component.name, next(candidates, None), candidates, skipped, component.exif)

    def _candidates(
        self, ref: ExampleRef, prompt: str | None, skipped: list[SkippedRow]
    ) -> Iterator[_Candidate]:
        """The example of the row, then randomly drawn replacements. Unreadable ones are appended to
        `skipped`."""
        component = self.components[ref.component]
        for attempt in range(_ATTEMPTS):
            rng = np.random.default_rng([self.seed, ref.component, ref.draw, attempt])
            if attempt:
                index = int(rng.integers(len(component.source)))
            else:
                index = self.order.source_index(ref)
            try:
                example = component.source.example(index, rng)
                candidate = _Candidate(example, self.tokenize(example, prompt))
            except UserError as e:
                skipped.append(skipped_row(component.name, e))
            else:
                yield candidate

    def _load_images(
        self,
        pixels: np.ndarray,  # [I, S, S, 3] uint8, zeros; filled
        row: _Row,
        first: _Candidate,
        padded: _PaddedSize,
        step_and_row: tuple[int, int],
    ) -> _Candidate:
        """Load the images of the first candidate whose images can be read, and return it. If there is
        none, the row has no images and no labels."""
        limit = padded
        if self.keep_lengths:
            limit = _PaddedSize(len(first.sequence.tokens), len(first.sequence.label_positions))
        candidate: _Candidate | None = first
        while candidate is not None:
            if len(candidate.example.images) <= len(pixels) and limit.fits(candidate.sequence):
                try:
                    for i, image in enumerate(candidate.example.images):
                        pixels[i] = self._load_image(image, (*step_and_row, i), row.exif)
                    return candidate
                except UserError as e:
                    row.skipped.append(skipped_row(row.dataset, e))
                    pixels[:] = 0
            candidate = next(row.replacements, None)
        return first.without_labels()

    def _load_image(
        self, image: images.ImageSource, crop_seed: tuple[int, int, int], exif: bool
    ) -> np.ndarray:
        """-> [S, S, 3] uint8."""
        opened, size = images.open_image(image, exif=exif), self.config.vision.image_size
        rng = np.random.default_rng([self.seed, *crop_seed])
        pixels = images.random_crop(opened, size, rng) if self.crop else images.resize(opened, size)
        return pixels[:, ::-1] if self.flip and rng.random() < 0.5 else pixels
