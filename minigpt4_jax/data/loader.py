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
from minigpt4_jax.data.batching import PADDING, BatchMaker, Made, Padding, Share
from minigpt4_jax.data.dataset import ExampleList
from minigpt4_jax.data.json_records import Example
from minigpt4_jax.data.mixture import MIXED_BY, MixtureComponent, Order
from minigpt4_jax.data.packing import Packed
from minigpt4_jax.data.prefetch import Reader, init_worker
from minigpt4_jax.data.skipped import SkipCounter
from minigpt4_jax.errors import UserError
from minigpt4_jax.models.minigpt import Batch
from minigpt4_jax.processing.images import name_of
from minigpt4_jax.processing.tokenizer import Tokenizer

_LOOKED_AT = 10_000  # examples in memory looked at for answers that are cut
_OPENED = 200  # examples of other sources, for that and for telling data apart
_ENDLESS = 2**62  # batches

_log = logging.getLogger(__name__)


def make_loader(
    data: Sequence[Example] | Sequence[MixtureComponent],
    config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    seed: int = 0,
    prompts: Sequence[str] = (),
    mix_by: str = "step",
    shuffle: bool = True,
    epochs: int | None = None,
    keep_remainder: bool = False,
    crop: bool = False,
    padding: Padding = PADDING,
    max_broken: float = 0.0,
    workers: int = 0,
    threads: int = 2,
    timeout: float = 0.0,
    share: Callable[[int], Share] | None = None,
    multiple: int = 1,
    pack: Callable[..., Packed] | None = None,
) -> "Loader":
    """A Loader over examples (see data.sources.read_sources) or over a mixture of parts.

    batch_size: rows of the whole batch, of parts that have no size of their own. share: which rows
    this process makes of a batch of so many; by default all. prompts: for examples, as
    MixtureComponent.prompts: instructions with `<Img><ImageHere></Img>`, without template; none of them: bare
    visual tokens (stage 1). mix_by: what a turn of a part is, a batch ("step") or a row ("example").
    epochs: None goes on for ever, as a mixture always does. keep_remainder: the last batch of the
    last epoch is filled up with rows that have no labels, instead of being left out.
    crop: version 1's random resized crop. max_broken: the share of rows that may be left out because
    they cannot be read; 0: the first is an error. workers: processes that make batches (0: this
    one); threads: in each of them. timeout: seconds without a batch until these count as hung (0:
    never); see data.reader for what happens then.
    multiple: what the sizes of batches that follow from a number of tokens are multiples of.
    pack: see data.packing; what becomes of a batch, its arguments given.
    The batches depend on the data, the model's configuration, batch_size, seed, prompts, mix_by,
    shuffle, crop, padding and pack alone. UserError: a value out of range, no data, not even one batch.
    """
    parts = _parts(data, tuple(prompts), batch_size)
    order = Order([1], [1], [1])  # enough to make rows
    parts = tuple(
        _sized(p, BatchMaker((p,), order, tokenizer, config, seed, padding), multiple)
        for p in parts
    )
    _check(parts, seed, mix_by, epochs, max_broken, workers, threads)
    order = Order(
        [len(p.source) for p in parts], [p.ratio for p in parts], [p.batch_size for p in parts],
        by=mix_by, seed=seed, shuffle=shuffle, epochs=epochs, keep_remainder=keep_remainder,
    )  # fmt: skip
    if order.steps == 0:
        raise UserError(
            f"data: {len(parts[0].source)} examples do not fill one batch of {batch_size}; "
            "lower batch_size"
        )
    shares = {size: share(size) for size in set(order.sizes)} if share else {}
    maker = BatchMaker(
        parts, order, tokenizer, config, seed, padding, crop, shares, tight=pack is not None
    )
    _warn_of_cut_answers(maker)
    tally = SkipCounter(max_broken, sum(len(p.source) for p in parts))
    return Loader(
        maker, tally, shuffle=shuffle, readers=(workers, threads), timeout=timeout, pack=pack,
    )  # fmt: skip


class Loader:
    """An iterator of Batch whose position can be saved (`state`) and gone back to (`restore`).

    steps: how many batches there are, None without end; batches_per_epoch: how many of the first
    part, rounded down, go through its examples once; tally: rows so far, and those left out; size:
    rows of the whole batch that was given last, and here: how many of them this process has made.
    `close` ends its threads and worker processes.
    """

    def __init__(
        self,
        maker: BatchMaker,
        tally: SkipCounter,
        *,
        shuffle: bool,
        readers: tuple[int, int],  # worker processes, threads in each
        timeout: float,
        pack: Callable[..., Packed] | None,
    ):
        first = maker.parts[0]
        self.steps, self.tally, self.size, self.here = maker.order.steps, tally, 0, 0
        self._shares = maker.shares
        self.batches_per_epoch = len(first.source) // first.batch_size
        steps = _ENDLESS if self.steps is None else self.steps
        batches = grain.MapDataset.range(steps).map(maker)
        if pack is not None:
            batches = batches.map(functools.partial(_packed, pack))
        self._identity = _identity(maker, shuffle)
        self._step, self._size_of = 0, maker.order.size
        self._reader = Reader(
            functools.partial(_from, batches, readers), workers=readers[0], timeout=timeout
        )
        weakref.finalize(self, self._reader.close)  # also when Python exits

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """UserError: more rows cannot be read than max_broken allows."""
        if self._step == self.steps:
            raise StopIteration
        made = self._reader.read(self._step)
        before = self.tally.state()
        try:
            self.tally.add(made.rows, made.broken)
            if made.arrays is None:
                raise UserError(f"{self.tally}: nor can the rows tried in its place be read")
        except UserError:  # this batch is not given: it counts when it is, after a repair
            self.tally.restore(before)
            raise
        self.size = self.here = self._size_of(self._step)
        if self._shares:
            self.here = len(self._shares[self.size].rows)
        self._step += 1
        return Batch(*made.arrays)

    def ready(self, seconds: float) -> bool:
        """Whether the next batch is there; waits for it so long."""
        return self._step == self.steps or self._reader.ready(self._step, seconds)

    def state(self) -> dict[str, Any]:
        """The position, as a dict of JSON values to save beside the model's checkpoint."""
        return {"step": self._step, **self._identity, "tally": self.tally.state()}

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
        self.tally.restore(state.get("tally", {}))

    def close(self) -> None:
        """End threads and worker processes; iterating again starts them anew."""
        self._reader.close()


def _packed(pack: Callable[..., Packed], made: Made) -> Made:
    return made if made.arrays is None else made._replace(arrays=pack(made.arrays, plan=made.plan))


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


def _parts(
    data: Sequence[Example] | Sequence[MixtureComponent], prompts: tuple[str, ...], batch_size: int
) -> tuple[MixtureComponent, ...]:
    """The parts of a mixture, each with its batch size; examples are a mixture of one."""
    parts = [one for one in data if isinstance(one, MixtureComponent)]
    if not parts:
        examples = [one for one in data if isinstance(one, Example)]
        parts = [MixtureComponent("", ExampleList("", examples), prompts=prompts)]
    return tuple(
        p if p.batch_size or p.tokens else p._replace(batch_size=batch_size) for p in parts
    )


def _sized(part: MixtureComponent, maker: BatchMaker, multiple: int) -> MixtureComponent:
    """With the batch size that its number of tokens allows: of rows as long as the longest among
    those looked at."""
    if not part.tokens:
        return part
    prompt = maker.draw_prompt(0)
    rows = [maker.row(example, prompt) for example in _some(part, maker.seed, _OPENED)]
    longest = max((len(row.tokens) for row in rows), default=1)
    width = -(-longest // maker.padding.tokens) * maker.padding.tokens
    size = part.tokens // width // multiple * multiple
    if size == 0:
        raise UserError(
            f"data {part.name}: {multiple} rows of {width} tokens are more than its {part.tokens} "
            "tokens a batch; raise tokens"
        )
    _log.info("data %s: batches of %d rows of up to %d tokens", part.name, size, width)
    return part._replace(batch_size=size)


def _check(
    parts: Sequence[MixtureComponent],
    seed: int,
    mix_by: str,
    epochs: int | None,
    max_broken: float,
    workers: int,
    threads: int,
) -> None:
    rules = [
        (seed >= 0, f"seed {seed} must not be negative"),
        (mix_by in MIXED_BY, f"mix_by {mix_by!r} is none of {', '.join(MIXED_BY)}"),
        (epochs is None or epochs >= 1, f"epochs {epochs} must be 1 or more, or None"),
        (epochs is None or len(parts) == 1, f"epochs {epochs}: a mixture has no end, give None"),
        (0 <= max_broken <= 1, f"max_broken {max_broken} must be from 0 to 1"),
        (workers >= 0, f"workers {workers} must not be negative"),
        (threads >= 0, f"threads {threads} must not be negative"),
    ]
    for part in parts:
        at, size = f"{part.name}: " if part.name else "", part.batch_size
        rules += [
            (len(part.source) > 0, f"{at}the dataset is empty"),
            (size >= 1, f"{at}batch_size {size} must be 1 or more"),
            (part.ratio > 0, f"{at}ratio {part.ratio} must be above 0"),
            (mix_by == "step" or size == parts[0].batch_size,
             f"{at}a batch size of its own, {size}, needs mix_by step"),
        ]  # fmt: skip
    for holds, message in rules:
        if not holds:
            raise UserError(f"data: {message}")


def _some(part: MixtureComponent, seed: int, most_in_memory: int | None) -> Iterator[Example]:
    """Examples of a part, evenly spaced where there are many; those that cannot be read are left
    out."""
    total = len(part.source)
    most = most_in_memory or total if isinstance(part.source, ExampleList) else _OPENED
    for i in range(0, total, -(-total // most)):
        try:
            yield part.source.example(i, np.random.default_rng([seed, i]))
        except UserError:  # counted when its turn comes
            continue


def _warn_of_cut_answers(maker: BatchMaker) -> None:
    """One warning with a count for each dataset, before training."""
    for number, part in enumerate(maker.parts):
        prompt, cut, looked_at = maker.draw_prompt(0, number), 0, 0
        for example in _some(part, maker.seed, _LOOKED_AT):
            looked_at += 1
            cut += maker.row(example, prompt).cut
        if cut:
            _log.warning(
                "data%s: %d of %d answers are longer than max_text_length %d tokens and are cut "
                "there, without their end symbol",
                f" {part.name}" if part.name else "", cut, looked_at, maker.config.max_text_length,
            )  # fmt: skip


def _identity(maker: BatchMaker, shuffle: bool) -> dict[str, Any]:
    """What tells that a saved position belongs to these data and settings."""
    found: dict[str, Any] = {"seed": maker.seed, "shuffle": shuffle, "mix_by": maker.order.by}
    for part in maker.parts:
        own = {
            "batch_size": part.batch_size,
            "ratio": part.ratio,
            "examples": len(part.source),
            "contents": _digest(part, maker.seed),
        }
        found |= {f"{part.name} {key}".strip(): value for key, value in own.items()}
    return found


def _digest(part: MixtureComponent, seed: int) -> str:
    """Short hash of the texts and image names, in order, and of what is asked about them; of what is
    not in memory, of a sample."""
    digest = hashlib.sha256(json.dumps(part.prompts).encode())
    for example in _some(part, seed, None):
        names = [os.path.basename(name_of(image)) for image in example.images]
        digest.update(json.dumps([names, example.questions, example.answers]).encode())
    return digest.hexdigest()[:16]
