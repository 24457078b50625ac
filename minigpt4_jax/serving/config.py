"""The sizes of a server's caches, and how they follow from the model and the memory of the device."""

import math
import os
from pathlib import Path

import jax

from minigpt4_jax.errors import UserError
from minigpt4_jax.inference.batch_shapes import PROMPTS, SMALLEST_CACHE
from minigpt4_jax.inference.model import Model
from minigpt4_jax.models.kv_cache import bytes_per_position
from minigpt4_jax.serving.scheduler import SchedulerConfig

MEMORY_SHARE = 0.45  # of the free memory for the cache of the running answers; resizing copies it
PREFIX_SHARE = 0.1  # of the free memory for the caches of earlier prompts


def cache_bytes_per_token(model: Model) -> float:
    """Bytes of keys and values of one position, on one device."""
    itemsize = 4 if jax.default_backend() == "cpu" else 2
    split = 1 if model.mesh is None else model.mesh.shape["model"]
    return bytes_per_position(model.config.llm, model.kv_cache, itemsize) / split


def free_memory() -> float:
    """Free bytes of the first device, or of the machine if the devices are its processors."""
    stats = None if jax.default_backend() == "cpu" else jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return float(stats["bytes_limit"] - stats["bytes_in_use"])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024.0 * int(next(x.split()[1] for x in lines if x.startswith("MemAvailable:")))
    except (OSError, StopIteration):  # not Linux
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / 2


def unread_bytes(model: Model) -> float:
    """What the weights will take of the first device, as far as they are not read yet."""
    shapes = [leaf for leaf in model.engine.leaves if isinstance(leaf, jax.ShapeDtypeStruct)]
    return float(sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in shapes))


def scheduler_config(
    model: Model,
    *,
    max_batch: int,
    max_queue: int,
    context: int | None,
    max_tokens: int,
    cache_tokens: int | None = None,
    prefill_tokens: int | None = None,
) -> SchedulerConfig:
    """The scheduler's limits; None is a default that fits the model and the memory.

    context: at most the model's, by default 4096 tokens of it. UserError: the cache is too small.
    """
    context = min(context or 4096, model.config.llm.max_length)
    per_token, free = cache_bytes_per_token(model), free_memory() - unread_bytes(model)
    if cache_tokens is None:
        cache_tokens = min(int(MEMORY_SHARE * free / per_token), max_batch * _padded(context))
    on_cpu = jax.default_backend() == "cpu"
    if prefill_tokens is None:
        prefill_tokens = min(512 if on_cpu else 1024, max(context, PROMPTS[0]))
    smallest = max(SMALLEST_CACHE, prefill_tokens)
    if cache_tokens < smallest:
        raise UserError(
            f"a cache of {cache_tokens} tokens is too small; expected at least {smallest} (--cache-tokens, "
            "or more free memory)"
        )
    context = min(context, cache_tokens // 64 * 64)
    return SchedulerConfig(
        max_rows=max_batch,
        max_queue=max_queue,
        context=context,
        max_new_tokens=min(max_tokens, context),
        cache_tokens=cache_tokens,
        prefix_tokens=min(int(PREFIX_SHARE * free / per_token), 16 * _padded(context)),
        prefill_tokens=prefill_tokens,
        encode_images=2 if on_cpu else 8,
    )


def _padded(context: int) -> int:
    """Cache slots of one answer of this length."""
    return max(-(-context // 64) * 64, SMALLEST_CACHE)
