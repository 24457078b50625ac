"""Models that answer with given tokens: the seed of a request chooses among scripts."""

import contextlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax.inference import decode_state

WIDTH = 64  # of the table of tokens: scripts of any texts share the compiled programs' shapes


@contextlib.contextmanager
def scripted(scripts: Sequence[Sequence[int]], then: int) -> Iterator[None]:
    """Programs that are compiled meanwhile choose the tokens of scripts[seed], and `then` after them.

    Everything else is real: prompts, prefill, stop sequences, checks of the text. Beam search is not
    scripted.
    """
    table = np.full((len(scripts), WIDTH), then, np.int32)
    for row, ids in zip(table, scripts, strict=True):
        row[: len(ids)] = ids

    def choose(logits, ids, num_generated, stop_tokens, keys, params, stages):
        seeds = jax.random.key_data(keys)[:, -1].astype(jnp.int32)
        return jnp.asarray(table)[seeds % len(table), jnp.minimum(num_generated, WIDTH - 1)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_state, "sample", choose)
        yield
