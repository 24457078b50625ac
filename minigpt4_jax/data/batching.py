"""From examples to padded arrays: text rows, images, one prompt a batch. NumPy alone, so that input
processes start without JAX."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.data.json_records import Example
from minigpt4_jax.data.mixture import MixtureComponent, Order, Pick
from minigpt4_jax.data.skipped import Broken, broken
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing import images
from minigpt4_jax.processing.chat_templates import IMAGE_SLOT, fill_template, with_images
from minigpt4_jax.processing.sequences import TokenSequence, build_conversation_row, build_row
from minigpt4_jax.processing.tokenizer import Tokenizer


class Padding(NamedTuple):
    """Lengths that rows are padded to: multiples, so that few programs are compiled."""

    tokens: int = 32  # T is a multiple of this
    answers: int = 16  # A is a multiple of this


PADDING = Padding()
_ATTEMPTS = 8  # examples looked at for one place of a batch


class Arrays(NamedTuple):
    """The fields of models.minigpt.Batch, in its order."""

    pixels: np.ndarray  # [B, I, S, S, 3] uint8
    tokens: np.ndarray  # [B, T] int32
    lengths: np.ndarray  # [B] int32
    label_positions: np.ndarray  # [B, A] int32


def example_row(
    example: Example, tokenizer: Tokenizer, config: ModelConfig, prompt: str | None = None
) -> TokenSequence:
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


class _Shape(NamedTuple):
    """What the rows of a batch are padded to."""

    width: int  # T
    labels: int  # A

    @classmethod
    def of(cls, rows: Sequence[TokenSequence], padding: Padding) -> "_Shape":
        return cls(
            _round_up(max(len(row.tokens) for row in rows), padding.tokens),
            _round_up(max(len(row.label_positions) for row in rows), padding.answers),
        )

    def holds(self, row: TokenSequence) -> bool:
        return len(row.tokens) <= self.width and len(row.label_positions) <= self.labels

    def fill(
        self, rows: Sequence[TokenSequence], pad_id: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens = np.full((len(rows), self.width), pad_id, np.int32)
        answers = np.full((len(rows), self.labels), -1, np.int32)
        for n, row in enumerate(rows):
            tokens[n, : len(row.tokens)] = row.tokens
            answers[n, : len(row.label_positions)] = row.label_positions
        return tokens, np.array([len(row.tokens) for row in rows], np.int32), answers


def pad_rows(
    rows: Sequence[TokenSequence], pad_id: int, padding: Padding = PADDING
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows -> tokens [B, T], lengths [B], answers [B, A] (-1 behind the last), all int32."""
    return _Shape.of(rows, padding).fill(rows, pad_id)


def _round_up(n: int, multiple: int) -> int:
    return max(1, -(-n // multiple)) * multiple


class Share(NamedTuple):
    """The rows of a batch that one of several processes makes: those its devices take."""

    rows: tuple[int, ...]  # their numbers, ascending
    counted: frozenset[int]  # of these the ones that no process before it makes as well


class BatchLayout(NamedTuple):
    """How long the examples of a whole batch are, as far as it is known before images are opened; what
    takes the place of one that cannot be opened is no longer where rows are packed."""

    lengths: tuple[int, ...]  # [B] tokens
    labels: tuple[int, ...]  # [B] of them, those that are to be learned
    rows: tuple[int, ...]  # the numbers of those that this process makes


class Made(NamedTuple):
    """A batch on its way from a process that makes batches."""

    arrays: Any  # Arrays, or what packing makes of them; None: there is nothing to read for a row
    broken: tuple[Broken, ...]  # rows left out of those that this process counts
    rows: int  # how many it counts
    plan: BatchLayout | None = None  # of the batch


class _Loaded(NamedTuple):
    example: Example
    row: TokenSequence


@dataclass
class _Place:
    """A row of a batch in the making."""

    dataset: str
    loaded: _Loaded | None  # None: nothing that was tried can be read
    trials: Iterator[_Loaded]  # what may take its place
    found: list[Broken]  # what was tried in vain


@dataclass(frozen=True)
class BatchMaker:
    """Makes batch number `step`: a pure function of the step.

    A row that cannot be read gives its place to another of the same dataset, drawn by the seed and
    the place. The lengths that a batch is padded to are those before any image is opened, as a
    process opens only those of its own rows; what takes the place of a broken image's row is no longer.
    Where rows are packed, `tight` keeps each within its own length, by which they were laid out.
    """

    parts: tuple[MixtureComponent, ...]
    order: Order
    tokenizer: Tokenizer
    config: ModelConfig
    seed: int
    padding: Padding = PADDING
    crop: bool = False  # random resized crop instead of the plain resize
    # of a batch of so many rows, what this process makes; by default all of it
    shares: Mapping[int, Share] = field(default_factory=dict)
    tight: bool = False  # what takes the place of a row is no longer than that row, not than T

    def __call__(self, step: int) -> Made:
        """-> this process's rows of the batch. Rows that are missing repeat the first without its
        labels."""
        size = self.order.size(step)
        places = [self._place(pick, step) for pick in self.order.batch(step)]
        share = self.shares.get(size) or Share(tuple(range(size)), frozenset(range(size)))
        loaded = [place.loaded for place in places if place.loaded is not None]
        if len(loaded) < len(places):
            found = tuple(b for place in places for b in place.found)
            return Made(None, found, len(share.counted))
        fill = size - len(places)
        places += [_Place(places[0].dataset, None, iter(()), [])] * fill
        loaded += [_unlabelled(loaded[0])] * fill
        shape = _Shape.of([one.row for one in loaded], self.padding)
        most = max(len(one.example.images) for one in loaded)
        edge = self.config.vision.image_size
        pixels = np.zeros((len(share.rows), most, edge, edge, 3), np.uint8)
        made = [
            self._open(out, places[n], loaded[n], self._room(loaded[n].row, shape), (step, n))
            for out, n in zip(pixels, share.rows, strict=True)
        ]
        arrays = Arrays(pixels, *shape.fill(made, self.tokenizer.pad_id))
        found = tuple(b for n in sorted(share.counted) for b in places[n].found)
        rows = [one.row for one in loaded]
        lengths, labels = (
            tuple(map(len, of))
            for of in zip(*((r.tokens, r.label_positions) for r in rows), strict=True)
        )
        return Made(arrays, found, len(share.counted), BatchLayout(lengths, labels, share.rows))

    def _room(self, row: TokenSequence, shape: _Shape) -> _Shape:
        return _Shape(len(row.tokens), len(row.label_positions)) if self.tight else shape

    def row(self, example: Example, prompt: str | None) -> TokenSequence:
        return example_row(example, self.tokenizer, self.config, prompt)

    def draw_prompt(self, step: int, part: int = 0) -> str | None:
        """The instruction of batch `step`: one for all its rows of a dataset, as in the original."""
        prompts = self.parts[part].prompts
        if not prompts:
            return None
        return prompts[np.random.default_rng([self.seed, step]).integers(len(prompts))]

    def _place(self, pick: Pick, step: int) -> _Place:
        part, found = self.parts[pick.part], list[Broken]()
        trials = self._trials(pick, self.draw_prompt(step, pick.part), found)
        return _Place(part.name, next(trials, None), trials, found)

    def _trials(self, pick: Pick, prompt: str | None, found: list[Broken]) -> Iterator[_Loaded]:
        """Examples for a place of a batch: the one whose turn it is, then those that may take its
        place. What cannot be read goes into `found`."""
        part = self.parts[pick.part]
        for attempt in range(_ATTEMPTS):
            rng = np.random.default_rng([self.seed, pick.part, pick.turn, attempt])
            index = int(rng.integers(len(part.source))) if attempt else self.order.index(pick)
            try:
                example = part.source.example(index, rng)
                loaded = _Loaded(example, self.row(example, prompt))
            except UserError as e:
                found.append(broken(part.name, e))
            else:
                yield loaded

    def _open(
        self,
        out: np.ndarray,  # [I, S, S, 3] uint8, zeros; filled
        place: _Place,
        loaded: _Loaded,  # what is there
        room: _Shape,  # for what may take its place
        at: tuple[int, int],  # step, row
    ) -> TokenSequence:
        """The images of a row, or of the first in its place whose images can be read; or else no
        images and no labels."""
        tried: _Loaded | None = loaded
        while tried is not None:
            if len(tried.example.images) <= len(out) and room.holds(tried.row):
                try:
                    for k, image in enumerate(tried.example.images):
                        out[k] = self._pixels(image, (*at, k))
                    return tried.row
                except UserError as e:
                    place.found.append(broken(place.dataset, e))
                    out[:] = 0
            tried = next(place.trials, None)
        return _unlabelled(loaded).row

    def _pixels(self, image: images.ImageSource, at: tuple[int, int, int]) -> np.ndarray:
        """[S, S, 3] uint8 of image k of a row of a step."""
        opened, size = images.open_image(image), self.config.vision.image_size
        if not self.crop:
            return images.resize(opened, size)
        rng = np.random.default_rng([self.seed, *at])
        return images.random_crop(opened, size, rng)


def _unlabelled(loaded: _Loaded) -> _Loaded:
    """The same without labels."""
    return loaded._replace(row=loaded.row._replace(label_positions=[]))
