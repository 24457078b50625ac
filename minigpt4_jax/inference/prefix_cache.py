"""The key-value cache of a conversation's last question, which the next one continues from."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from minigpt4_jax.config import IMAGE
from minigpt4_jax.inference.decode_state import DecodeState
from minigpt4_jax.inference.requests import Request, bucket
from minigpt4_jax.models.kv_cache import KVCache


class _Entry(NamedTuple):
    request: Request
    state: DecodeState
    leaves: list[jax.Array]


class PrefixCache:
    """The cache of one request, reused by another that begins alike.

    It stays on the device until it is taken, cleared or garbage-collected.
    """

    def __init__(self) -> None:
        self._entry: _Entry | None = None

    def store(self, request: Request, state: DecodeState, leaves: list[jax.Array]) -> None:
        """state: of this request alone; leaves: the parameters that computed it."""
        self._entry = _Entry(request, state, leaves)

    def take(self, request: Request, leaves: list[jax.Array]) -> tuple[int, KVCache] | None:
        """How many tokens of a request are cached, and the cache, which may be donated.

        None if the cache would save little, or belongs to other parameters.
        """
        entry, self._entry = self._entry, None
        if entry is None or entry.leaves is not leaves:
            return None
        state = entry.state
        # An interruption may have come between donating the state and getting the new one back.
        arrays = jax.tree.leaves((state.cache, state.ids, state.num_generated, state.nonfinite))
        if any(a.is_deleted() for a in arrays):
            return None
        if bool(state.nonfinite[0]):  # so may be what is cached
            return None
        num_generated = int(state.num_generated[0])
        generated = np.asarray(state.ids)[0, : num_generated - 1].tolist()  # the last is not cached
        length = common_prefix_length(
            [*entry.request.tokens, *generated], entry.request.visual,
            request.tokens, request.visual,
        )  # fmt: skip
        total = len(request.tokens)
        length = min(length, total - 1)  # the last token is processed for its logits
        if bucket(total - length) >= bucket(total):
            return None
        return length, state.cache

    def clear(self) -> None:
        """Free the cache."""
        self._entry = None


def common_prefix_length(
    a: Sequence[int], a_visual: np.ndarray | None, b: Sequence[int], b_visual: np.ndarray | None
) -> int:
    """How many leading tokens two rows share; visual tokens are compared by their values."""
    size = min(len(a), len(b))
    a_tokens, b_tokens = np.asarray(a[:size]), np.asarray(b[:size])
    equal = a_tokens == b_tokens
    slots = np.flatnonzero(np.cumprod(equal) * (a_tokens == IMAGE))
    if len(slots):
        count = len(slots)
        equal[slots] = (np.asarray(a_visual)[:count] == np.asarray(b_visual)[:count]).all(axis=1)
    return size if equal.all() else int(np.argmin(equal))


def suffix(request: Request, length: int) -> tuple[list[int], np.ndarray | None]:
    """The tokens of a request after the first `length`, and their visual tokens."""
    slots = sum(token == IMAGE for token in request.tokens[:length])
    visual = None if request.visual is None else request.visual[slots:]
    return list(request.tokens[length:]), visual if visual is not None and len(visual) else None
