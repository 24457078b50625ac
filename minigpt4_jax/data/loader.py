"""Batches in a fixed random order, read with Grain, resumable at any step."""

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
from absl import flags

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.data.arrays import PackedArrays, Padding
from minigpt4_jax.data.batching import BatchMaker, LoadedBatch, ProcessShard
from minigpt4_jax.data.config import DataConfig
from minigpt4_jax.data.inspection import (
    check_system_messages,
    fingerprint,
    rows_for_tokens,
    warn_of_cut_answers,
)
from minigpt4_jax.data.mixture import BatchOrder, MixtureComponent
from minigpt4_jax.data.prefetch import Prefetcher, init_worker
from minigpt4_jax.data.skipped import SkipCounter
from minigpt4_jax.errors import UserError
from minigpt4_jax.models.minigpt import Batch
from minigpt4_jax.processing.tokenizer import Tokenizer

_ENDLESS = 2**62  # batches


def make_loader(
    components: Sequence[MixtureComponent],
    data: DataConfig,
    config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    seed: int = 0,
    multiple: int = 1,
    epochs: int | None = None,
    keep_remainder: bool = False,
    shard: Callable[[int], ProcessShard] | None = None,
    pack: Callable[..., PackedArrays] | None = None,
) -> "Loader":
    """A Loader over one dataset or a mixture (see data.readers.open_components).

    data: how batches are made, already checked by training.config_check; its datasets are not read.
    batch_size: rows of the whole batch, for components without a size of their own. multiple: batch
    sizes that follow from a number of tokens are multiples of this. epochs: None: endless; only for a
    single dataset. keep_remainder: pad the last batch of the last epoch with rows without labels
    instead of dropping it. shard: which rows of a batch of a given size this process makes; None:
    all. pack: what packs a batch (see data.packing.pack); None: no packing.

    The batches are a function of the components, the model's configuration, batch_size, seed, pack and of
    mix_by, shuffle, crop, flip, image_ids, pad_tokens and pad_answers of data.
    UserError: an empty dataset, one too small for a single batch, or rows with system messages, for which
    the model's prompts have no place.
    """
    padding = Padding(data.pad_tokens, data.pad_answers)
    sized = []
    for component in components:
        if len(component.source) == 0:
            name = f"{component.name}: " if component.name else ""
            raise UserError(f"data: {name}the dataset is empty")
        if component.tokens:
            order = BatchOrder([1], [1], [1])  # not used: only its tokenization is needed
            maker = BatchMaker((component,), order, tokenizer, config, seed, padding)
            size = rows_for_tokens(component, maker, multiple)
        else:
            size = component.batch_size or batch_size
        sized.append(component._replace(batch_size=size))
    order = BatchOrder(
        [len(c.source) for c in sized], [c.ratio for c in sized], [c.batch_size for c in sized],
        mix_by=data.mix_by, seed=seed, shuffle=data.shuffle, epochs=epochs,
        keep_remainder=keep_remainder,
    )  # fmt: skip
    if order.steps == 0:
        raise UserError(
            f"data: {len(sized[0].source)} examples do not fill one batch of {batch_size}; "
            "lower batch_size"
        )
    maker = BatchMaker(
        tuple(sized), order, tokenizer, config, seed, padding, data.crop, data.flip,
        image_ids=data.image_ids,
        shards={size: shard(size) for size in set(order.batch_sizes)} if shard else {},
        keep_lengths=pack is not None,
    )  # fmt: skip
    check_system_messages(maker)
    warn_of_cut_answers(maker)
    return Loader(maker, data, pack)


class Loader:
    """An iterator of Batch whose position can be saved (`state`) and restored (`restore`).

    steps: number of batches, None if endless. batches_per_epoch: of the first component, rounded down.
    skip_counter: rows so far, and those skipped. num_rows: rows of the last batch, across processes;
    num_local_rows: those that this process made.
    `close` ends threads and worker processes.
    """

    def __init__(
        self, maker: BatchMaker, data: DataConfig, pack: Callable[..., PackedArrays] | None
    ):
        first = maker.components[0]
        self.steps = maker.order.steps
        self.batches_per_epoch = len(first.source) // first.batch_size
        num_examples = sum(len(component.source) for component in maker.components)
        self.skip_counter = SkipCounter(data.max_broken, num_examples)
        self.num_rows = self.num_local_rows = 0
        self._order, self._shards = maker.order, maker.shards
        self._fingerprint = fingerprint(maker, data.shuffle)
        self._step = 0
        batches = grain.MapDataset.range(_ENDLESS if self.steps is None else self.steps).map(maker)
        if pack is not None:
            batches = batches.map(functools.partial(_pack, pack))
        self._prefetcher = Prefetcher(
            functools.partial(_open_at, batches, data.workers, data.threads),
            workers=data.workers,
            timeout=data.timeout,
        )
        weakref.finalize(self, self._prefetcher.close)  # also when Python exits

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """UserError: more rows than max_broken allows cannot be read."""
        if self._step == self.steps:
            raise StopIteration
        loaded: LoadedBatch = self._prefetcher.read(self._step)
        before = self.skip_counter.state()
        try:
            self.skip_counter.add(loaded.num_rows, loaded.skipped)
            if loaded.arrays is None:
                raise UserError(f"{self.skip_counter}: none of the replacements tried can be read")
        except UserError:  # this batch is not returned: a run resumed after a repair counts it
            self.skip_counter.restore(before)
            raise
        self.num_rows = self.num_local_rows = self._order.batch_size(self._step)
        if self._shards:
            self.num_local_rows = len(self._shards[self.num_rows].rows)
        self._step += 1
        return Batch(**loaded.arrays._asdict())

    def ready(self, seconds: float) -> bool:
        """Whether the next batch is available; waits up to `seconds` for it."""
        return self._step == self.steps or self._prefetcher.ready(self._step, seconds)

    def state(self) -> dict[str, Any]:
        """The position, as JSON values to save with the model's checkpoint."""
        return {"step": self._step, **self._fingerprint, "tally": self.skip_counter.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a saved position: the same batches follow, with any number of workers.
        UserError: the state belongs to other data or settings."""
        for key, value in self._fingerprint.items():
            if state.get(key) != value:
                raise UserError(
                    f"data: cannot resume: {key} was {state.get(key)!r} and is now {value!r}; "
                    "use the data and settings of the interrupted run, or another workdir"
                )
        self.close()
        self._step = int(state["step"])
        self.skip_counter.restore(state.get("tally", {}))

    def close(self) -> None:
        """End threads and worker processes; iterating again starts new ones."""
        self._prefetcher.close()


def _pack(pack: Callable[..., PackedArrays], batch: LoadedBatch) -> LoadedBatch:
    if batch.arrays is None:
        return batch
    return batch._replace(arrays=pack(batch.arrays, layout=batch.layout))


def _open_at(batches: grain.MapDataset, workers: int, threads: int, step: int) -> grain.IterDataset:
    """The batches from number `step` on. Each is made from its number alone, so a start anywhere costs
    nothing, and the workers have no state to save."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    prefetched = batches.slice(slice(step, None)).to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain reads absl flags, which a library user never parses
            flags.FLAGS.mark_as_parsed()
        prefetched = prefetched.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2),
            worker_init_fn=init_worker,
        )
    return prefetched
