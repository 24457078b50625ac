"""A Grain dataset of numbers, read by worker processes."""

import functools

import grain
from absl import flags

from minigpt4_jax.data.prefetch import Reader, init_worker

LAST = 40


def dataset(step, workers=1, make=None):
    flags.FLAGS.mark_as_parsed()
    numbers = grain.MapDataset.range(LAST)
    numbers = numbers.map(make) if make else numbers
    ahead = numbers.slice(slice(step, None)).to_iter_dataset(grain.ReadOptions(num_threads=1))
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    return ahead.mp_prefetch(options, worker_init_fn=init_worker) if workers else ahead


def reading(timeout=0.0, workers=1, **options):
    return Reader(
        functools.partial(dataset, workers=workers, **options), workers=workers, timeout=timeout
    )
