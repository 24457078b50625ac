"""Batches in a fixed random order, from Grain, resumed exactly where they stopped."""

import functools
import hashlib
import json
import logging
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.data.batches import PADDING, Arrays, BatchMaker, Padding
from minigpt4_jax.data.packing import Packed
from minigpt4_jax.data.reader import Reader, init_worker
from minigpt4_jax.data.sources import Example
from minigpt4_jax.errors import UserError
from minigpt4_jax.models.minigpt import Batch
from minigpt4_jax.tokenizer import Tokenizer

_CHECKED_FOR_LENGTH = 10_000  # examples looked at for the warning about answers that are cut

_log = logging.getLogger(__name__)


def make_loader(
    examples: Sequence[Example],
    config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    seed: int = 0,
    prompts: Sequence[str] = (),
    shuffle: bool = True,
    epochs: int | None = None,
    keep_remainder: bool = False,
    crop: bool = False,
    padding: Padding = PADDING,
    workers: int = 0,
    threads: int = 2,
    timeout: float = 0.0,
    shard: tuple[int, int] = (0, 1),
    pack: Callable[[Arrays], Packed] | None = None,
) -> "Loader":
    """A Loader over examples (see data.sources.read_sources).

    batch_size: rows of the whole batch; shard (index, count) makes one process's equal share of it.
    prompts: instructions with `<Img><ImageHere></Img>`, without template; one is drawn for each
    batch and asked where an example has no question. None of them: bare visual tokens (stage 1).
    epochs: None goes on for ever. keep_remainder: the last batch of the last epoch is filled up
    with rows that have no labels, instead of being left out. crop: version 1's random resized crop.
    workers: processes that make batches (0: this one); threads: in each of them. timeout: seconds
    without a batch until these count as hung (0: never); see data.reader for what happens then.
    pack: see data.packing; what becomes of a batch, its arguments given; for one process.
    The batches depend on the data, the model's configuration, batch_size, seed, prompts, shuffle,
    crop, padding and pack alone. UserError: a value out of range, no data, not even one batch.
    """
    _check(examples, batch_size, seed, epochs, workers, threads, shard)
    if pack is not None and shard[1] > 1:  # each would make another number of rows
        raise UserError(f"data: packed rows are for one process, not for {shard[1]}: pack_tokens=0")
    maker = BatchMaker(
        examples, tokenizer, config, tuple(prompts), batch_size, seed, padding, crop, shard
    )
    _warn_of_cut_answers(maker)
    indices = grain.MapDataset.range(len(examples))
    if shuffle:  # by a hash of the seed: Grain's second epoch is its first with the next seed
        indices = indices.shuffle(seed=int(np.random.SeedSequence(seed).generate_state(1)[0]))
    batches = indices.repeat(epochs).batch(batch_size, drop_remainder=not keep_remainder)
    if len(batches) == 0:
        raise UserError(
            f"data: {len(examples)} examples do not fill one batch of {batch_size}; "
            "lower batch_size"
        )
    return Loader(
        batches, maker, endless=epochs is None, shuffle=shuffle, readers=(workers, threads),
        timeout=timeout, pack=pack,
    )  # fmt: skip


class Loader:
    """An iterator of Batch whose position can be saved (`state`) and gone back to (`restore`).

    steps: how many batches there are, None without end; batches_per_epoch: how many, rounded down,
    go through the examples once. `close` ends its threads and worker processes.
    """

    def __init__(
        self,
        batches: grain.MapDataset,  # of indices [B]
        maker: BatchMaker,
        *,
        endless: bool,
        shuffle: bool,
        readers: tuple[int, int],  # worker processes, threads in each
        timeout: float,
        pack: Callable[[Arrays], Packed] | None,
    ):
        self.steps = None if endless else len(batches)
        self.batches_per_epoch = len(maker.examples) // maker.batch_size
        self._batches = batches.map_with_index(maker)
        if pack is not None:
            self._batches = self._batches.map(pack)
        self._identity = {
            "seed": maker.seed,
            "batch_size": maker.batch_size,
            "shuffle": shuffle,
            "examples": len(maker.examples),
            "contents": _digest(maker),
        }
        self._step = 0
        self._reader = Reader(
            functools.partial(_from, self._batches, readers), workers=readers[0], timeout=timeout
        )
        weakref.finalize(self, self._reader.close)  # also when Python exits

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._step == self.steps:
            raise StopIteration
        batch = Batch(*self._reader.read(self._step))
        self._step += 1
        return batch

    def ready(self, seconds: float) -> bool:
        """Whether the next batch is there; waits for it so long."""
        return self._step == self.steps or self._reader.ready(self._step, seconds)

    def state(self) -> dict[str, Any]:
        """The position, as a dict of JSON values to save beside the model's checkpoint."""
        return {"step": self._step, **self._identity}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a saved position: the next batch is the one that was next then, whatever the number
        of workers. UserError when the data or their settings are not those of the state."""
        for key, value in self._identity.items():
            if state.get(key) != value:
                raise UserError(
                    f"data: cannot resume: {key} was {state.get(key)!r} and is now {value!r}; "
                    "take the data and settings of the interrupted run, or another workdir"
                )
        self.close()
        self._step = int(state["step"])

    def close(self) -> None:
        """End threads and worker processes; iterating again starts them anew."""
        self._reader.close()


def _from(batches: grain.MapDataset, readers: tuple[int, int], step: int) -> grain.IterDataset:
    """Batches from number `step` on. Batches are made at random access from their number, so a
    start anywhere costs nothing, and the workers' own states need not be saved."""
    workers, threads = readers
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    ahead = batches.slice(slice(step, None)).to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain reads its own; a library caller has parsed none
            flags.FLAGS.mark_as_parsed()
        ahead = ahead.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2),
            worker_init_fn=init_worker,
        )
    return ahead


def _check(
    examples: Sequence[Example],
    batch_size: int,
    seed: int,
    epochs: int | None,
    workers: int,
    threads: int,
    shard: tuple[int, int],
) -> None:
    index, count = shard
    rules = [
        (len(examples) > 0, "the dataset is empty"),
        (batch_size >= 1, f"batch_size {batch_size} must be 1 or more"),
        (seed >= 0, f"seed {seed} must not be negative"),
        (epochs is None or epochs >= 1, f"epochs {epochs} must be 1 or more, or None"),
        (workers >= 0, f"workers {workers} must not be negative"),
        (threads >= 0, f"threads {threads} must not be negative"),
        (0 <= index < count, f"shard {shard}: expected (index, count) with index below count"),
        (count < 1 or batch_size % count == 0,
         f"batch_size {batch_size} does not divide among {count} processes"),
    ]  # fmt: skip
    for holds, message in rules:
        if not holds:
            raise UserError(f"data: {message}")


def _warn_of_cut_answers(maker: BatchMaker) -> None:
    """One warning with a count, before training; a large dataset is sampled evenly."""
    total = len(maker.examples)
    looked_at = range(0, total, -(-total // _CHECKED_FOR_LENGTH))
    prompt = maker.draw_prompt(0)
    cut = sum(maker.row(maker.examples[i], prompt).cut for i in looked_at)
    if cut:
        _log.warning(
            "data: %d of %d answers are longer than max_text_length %d tokens and are cut there, "
            "without their end symbol",
            cut, len(looked_at), maker.config.max_text_length,
        )  # fmt: skip


def _digest(maker: BatchMaker) -> str:
    """Short hash of the texts and image names, in order, and of what is asked about them."""
    digest = hashlib.sha256(json.dumps(maker.prompts).encode())
    for example in maker.examples:
        names = [os.path.basename(image) for image in example.images]
        digest.update(json.dumps([names, example.questions, example.answers]).encode())
    return digest.hexdigest()[:16]
