"""Loaders that are stopped at a batch and resumed."""

import json

import numpy as np

from helpers.paths import TOKENIZER
from minigpt4_jax.config import ModelConfig, QFormerConfig, VisionConfig
from minigpt4_jax.data.batching import Padding, Share
from minigpt4_jax.data.loader import make_loader
from minigpt4_jax.models.minigpt import Batch
from minigpt4_jax.processing.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(TOKENIZER)


SIZE = 4  # of a batch
CONFIG = ModelConfig(vision=VisionConfig(image_size=14), qformer=QFormerConfig(queries=4))


def loader(parts, **changes):
    values = {"batch_size": SIZE, "seed": 3, "padding": Padding(8, 4), "threads": 0}
    return make_loader(parts, CONFIG, TOKENIZER, **{**values, **changes})


def half(host, size):
    rows = range(size * host // 2, size * (host + 1) // 2)
    return Share(tuple(rows), frozenset(rows))


def uninterrupted(batches, count):
    """The batches, and the state that is saved before each."""
    made, states = [], []
    for _ in range(count):
        states.append(json.dumps(batches.state()))
        made.append(next(batches))
    batches.close()
    return made, states


def check_resumed(state, expected, *hosts):
    """A loader, or those of several hosts, goes on from a state with the batches expected."""
    for host in hosts:
        host.restore(json.loads(state))
    for n, batch in enumerate(expected):
        shares = [next(host) for host in hosts]
        found = Batch(
            *[np.concatenate(f) if f[0] is not None else None for f in zip(*shares, strict=True)]
        )
        for name, ours, theirs in zip(Batch._fields, found, batch, strict=True):
            np.testing.assert_array_equal(ours, theirs, f"batch {n}: {name}")
    for host in hosts:
        host.close()
