"""What a conversation keeps between two questions: the cache of the last one, and what is in it."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from minigpt4_jax.config import IMAGE
from minigpt4_jax.inference.requests import Request, bucket
from minigpt4_jax.models.kv_cache import KVCache


class PrefixCache:
    """The cache of one request, from which another that begins alike can go on.

    It stays on the device until it is taken, `clear`ed or let go.
    """

    def __init__(self) -> None:
        self._last: tuple[Request, Any, Any] | None = None

    def keep(self, request: Request, state: Any, leaves: Any) -> None:
        """state: the engine's of this request alone; leaves: the parameters that made it."""
        self._last = request, state, leaves

    def take(self, request: Request, leaves: Any) -> tuple[int, KVCache] | None:
        """How many tokens of a request are in the cache, and the cache, to be given up to what goes
        on from it; None when little is gained by it."""
        last, self._last = self._last, None
        if last is None or last[2] is not leaves:
            return None
        before, state, _ = last
        # an interruption may have come between giving the cache up and getting it back
        if any(a.is_deleted() for a in jax.tree.leaves((state.cache, state.ids, state.made))):
            return None
        made = int(state.made[0])
        read = [*before.tokens, *np.asarray(state.ids)[0, : made - 1].tolist()]  # not yet the last
        total = len(request.tokens)
        n = _common(read, before.visual, request.tokens, request.visual)
        n = min(n, total - 1)  # the last one is read for its scores
        return None if bucket(total - n) >= bucket(total) else (n, state.cache)

    def clear(self) -> None:
        self._last = None


def _common(a: Sequence[int], seen: Any, b: Sequence[int], visual: Any) -> int:
    """How many tokens two rows begin with alike; visual tokens are compared by what they hold."""
    size = min(len(a), len(b))
    first, second = np.asarray(a[:size]), np.asarray(b[:size])
    alike = first == second
    slots = np.flatnonzero(np.cumprod(alike) * (first == IMAGE))
    if len(slots):
        count = len(slots)
        alike[slots] = (np.asarray(seen)[:count] == np.asarray(visual)[:count]).all(axis=1)
    return size if alike.all() else int(np.argmin(alike))


def behind(request: Request, n: int) -> tuple[list[int], Any]:
    """The tokens of a request behind the first n, and their visual tokens."""
    slots = sum(t == IMAGE for t in request.tokens[:n])
    rest = None if request.visual is None else request.visual[slots:]
    return list(request.tokens[n:]), rest if rest is not None and len(rest) else None
