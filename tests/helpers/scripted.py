"""Models that answer with given tokens: the seed of a request chooses among scripts."""

import contextlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax.inference import beam_search, decode_state
from minigpt4_jax.inference.shared_programs import clear_programs

WIDTH = 64  # of the table of tokens: scripts of any texts share the compiled programs' shapes


@contextlib.contextmanager
def own_programs() -> Iterator[None]:
    """Models made meanwhile share no compiled programs with others, so that these can be scripted."""
    clear_programs()
    yield
    clear_programs()


@contextlib.contextmanager
def scripted(scripts: Sequence[Sequence[int]], then: int) -> Iterator[None]:
    """Programs that are compiled meanwhile choose the tokens of scripts[seed], and `then` after them.

    Everything else is real: prompts, prefill, stop sequences, checks of the text. Beam search:
    `scripted_beams`. The models are made in `own_programs`.
    """
    table = np.full((len(scripts), WIDTH), then, np.int32)
    for row, ids in zip(table, scripts, strict=True):
        row[: len(ids)] = ids

    def choose(logits, ids, num_generated, stop_tokens, keys, params, stages, live):
        seeds = jax.random.key_data(keys)[:, -1].astype(jnp.int32)
        return jnp.asarray(table)[seeds % len(table), jnp.minimum(num_generated, WIDTH - 1)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_state, "sample", choose)
        yield


class BeamScripts:
    """What searches find: token ids, then `then`, best first. `set` changes it without a compilation."""

    def __init__(self, then: int):
        self._then, self.table = then, np.full((2, WIDTH), then, np.int32)

    def set(self, best: Sequence[int], second: Sequence[int]) -> None:
        self.table = np.full((2, WIDTH), self._then, np.int32)
        for row, ids in zip(self.table, (best, second), strict=True):
            row[: len(ids)] = ids


@contextlib.contextmanager
def scripted_beams(then: int) -> Iterator[BeamScripts]:
    """Searches that are compiled meanwhile give the tokens of two scripts log-probabilities of -0.1 and
    -0.2, and others -50. How beams continue and finish is real."""
    scripts = BeamScripts(then)

    def process(scores, s, stop_tokens, params, stages):
        shape = jax.ShapeDtypeStruct((2, WIDTH), jnp.int32)
        table = jax.pure_callback(lambda _: scripts.table, shape, s.num_generated)  # [J, W]
        width = min(WIDTH, s.ids.shape[2])
        written = jnp.arange(width) < s.num_generated[:, None, None, None]
        same = (s.ids[:, :, None, :width] == table[:, :width]) | ~written  # [B, Q, J, W]
        follows = jnp.all(same, axis=3)
        token = table[:, jnp.minimum(s.num_generated, WIDTH - 1)].T[:, None]  # [B, 1, J]
        chosen = jnp.where(follows, jnp.array([-0.1, -0.2]), -50.0)
        b, q = follows.shape[:2]
        index = jnp.arange(b)[:, None, None], jnp.arange(q)[:, None], token
        return jnp.full_like(scores, -50.0).at[index].max(chosen)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beam_search, "_process", process)
        yield scripts
