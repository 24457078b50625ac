"""Loaders that are stopped at a batch and resumed."""

import json

import numpy as np

from helpers.paths import TOKENIZER
from minigpt4_jax.config import ModelConfig, QFormerConfig, VisionConfig
from minigpt4_jax.data.batching import ProcessShard
from minigpt4_jax.data.config import DataConfig
from minigpt4_jax.data.loader import make_loader
from minigpt4_jax.models.minigpt import Batch
from minigpt4_jax.processing.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(TOKENIZER)
BATCH_SIZE = 4
CONFIG = ModelConfig(vision=VisionConfig(image_size=14), qformer=QFormerConfig(queries=4))


def data_config(**data):
    """A DataConfig for small tests: tight padding, no threads, no unreadable rows allowed."""
    values = {"pad_tokens": 8, "pad_answers": 4, "threads": 0, "timeout": 0.0, "max_broken": 0.0}
    return DataConfig(**{**values, **data})


def loader(components, shard=None, **data):
    return make_loader(
        components, data_config(**data), CONFIG, TOKENIZER, batch_size=BATCH_SIZE, seed=3,
        shard=shard,
    )  # fmt: skip


def half(process, batch_size):
    """The rows of the first or the second of two processes."""
    rows = range(batch_size * process // 2, batch_size * (process + 1) // 2)
    return ProcessShard(tuple(rows), frozenset(rows))


def same_batch(first, second):
    return all(np.array_equal(x, y) for x, y in zip(first, second, strict=True))


def joined(shards):
    """The batches of several processes as one batch."""
    fields = zip(*shards, strict=True)
    return Batch(*[np.concatenate(f) if f[0] is not None else None for f in fields])


def answers_of(batch):
    """The labelled text of each row."""
    return [
        TOKENIZER.decode([tokens[t] for t in labels if t >= 0]).removesuffix("###")
        for tokens, labels in zip(batch.tokens, batch.label_positions, strict=True)
    ]


def uninterrupted(batches, count):
    """-> (the first batches, the state before each)."""
    read, states = [], []
    for _ in range(count):
        states.append(json.dumps(batches.state()))
        read.append(next(batches))
    batches.close()
    return read, states


def check_resumed(state, expected, *loaders):
    """A loader, or one per process, continues from a state with the expected batches."""
    for batches in loaders:
        batches.restore(json.loads(state))
    for n, batch in enumerate(expected):
        resumed = joined([next(batches) for batches in loaders])
        for name, ours, theirs in zip(Batch._fields, resumed, batch, strict=True):
            np.testing.assert_array_equal(ours, theirs, f"batch {n}: {name}")
    for batches in loaders:
        batches.close()
