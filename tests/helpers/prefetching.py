"""A Grain dataset of numbers, read by worker processes."""

import functools

import grain
from absl import flags

from minigpt4_jax.data.prefetch import Prefetcher, init_worker

LENGTH = 40


def open_at(step, workers=1, transform=None):
    flags.FLAGS.mark_as_parsed()
    numbers = grain.MapDataset.range(LENGTH)
    numbers = numbers.map(transform) if transform else numbers
    prefetched = numbers.slice(slice(step, None)).to_iter_dataset(grain.ReadOptions(num_threads=1))
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    return prefetched.mp_prefetch(options, worker_init_fn=init_worker) if workers else prefetched


def prefetcher(timeout=0.0, workers=1, **options):
    return Prefetcher(
        functools.partial(open_at, workers=workers, **options), workers=workers, timeout=timeout
    )
