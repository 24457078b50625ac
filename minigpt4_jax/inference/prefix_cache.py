"""The key-value caches of finished requests, which requests that begin alike continue from."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from minigpt4_jax.config import IMAGE
from minigpt4_jax.inference.requests import Request, bucket
from minigpt4_jax.inference.visual_tokens import VisualTokens
from minigpt4_jax.models.kv_cache import KVCache


def bucket_of_prompt(tokens: int, resumed: bool) -> int:
    """What a prompt takes with its padding, or what follows its cached beginning."""
    return bucket(tokens)


class _Entry(NamedTuple):
    tokens: list[int]  # of the prompt and the answer, as far as they are cached
    visual: VisualTokens | None
    cache: KVCache  # of one row
    leaves: list[jax.Array]
    nonfinite: jax.Array | None  # [1] bool: cannot be used; None: can


class PrefixCache:
    """Caches of the last `max_entries` requests, each reused by one that begins alike.

    They stay on the device until they are taken, replaced, cleared or garbage-collected.
    """

    def __init__(
        self, max_entries: int = 1, max_tokens: int | None = None, *, compare_visual: bool = True
    ) -> None:
        """
        Args:
            max_tokens: of all entries together, see `num_tokens`.
            compare_visual: compare visual tokens by their values, for which the host waits until they are
                computed. Otherwise they are equal only if they are the same array.
        """
        self._max_entries, self._max_tokens = max_entries, max_tokens
        self._compare_visual = compare_visual
        self._entries: list[_Entry] = []  # oldest first

    @property
    def num_tokens(self) -> int:
        """Cache slots, one per token, that the entries take on the device."""
        return sum(entry.cache.length for entry in self._entries)

    def store(
        self,
        request: Request,
        generated: Sequence[int],
        cache: KVCache,
        leaves: list[jax.Array],
        nonfinite: jax.Array | None = None,
    ) -> None:
        """Keep the cache of a request.

        Args:
            generated: ids of its answer, the last of which is not cached.
            leaves: the parameters that computed it.
            nonfinite: [1] bool, whether it cannot be used, as NaN spread through it. Read when it is taken.
        """
        tokens = [*request.tokens, *generated[:-1]]
        self._entries.append(_Entry(tokens, request.visual, cache, leaves, nonfinite))
        del self._entries[: -self._max_entries]
        while self._max_tokens is not None and self.num_tokens > self._max_tokens:
            del self._entries[0]

    def take(
        self,
        request: Request,
        leaves: list[jax.Array],
        padded: Callable[[int, bool], int] = bucket_of_prompt,
    ) -> tuple[int, KVCache] | None:
        """How many tokens of a request are cached, and the cache, which may be donated.

        padded: (tokens to process, whether others are cached) -> how many that takes with their padding.

        The entry that shares most is removed if the request continues all of it, or there is only room
        for one; else a copy is returned, as others may continue it. None if none saves much or belongs
        to these parameters; then the oldest makes room, if there are as many as there may be.
        """
        self._entries = [e for e in self._entries if e.leaves is leaves and not is_deleted(e.cache)]
        lengths = [
            common_prefix_length(
                e.tokens, e.visual, request.tokens, request.visual, self._compare_visual
            )
            for e in self._entries
        ]
        total = len(request.tokens)
        best = max(range(len(lengths)), key=lambda i: (lengths[i], i), default=None)
        # the last token is processed for its logits
        length = 0 if best is None else min(lengths[best], total - 1)
        if best is None or padded(total - length, True) >= padded(total, False):
            del self._entries[: max(0, len(self._entries) - self._max_entries + 1)]
            return None
        entry = self._entries.pop(best)
        if entry.nonfinite is not None and np.asarray(entry.nonfinite).any():
            return self.take(request, leaves, padded)
        if self._max_entries == 1 or length >= len(entry.tokens):
            return length, entry.cache
        self._entries.append(entry)
        return length, _copy(entry.cache)

    def clear(self) -> None:
        """Free the caches."""
        self._entries.clear()


@jax.jit
def _copy(cache: KVCache) -> KVCache:
    copied: KVCache = jax.tree.map(jnp.copy, cache)
    return copied


def is_deleted(cache: KVCache) -> bool:
    """Whether an interruption came between donating a cache and getting the new one back."""
    return any(a.is_deleted() for a in jax.tree.leaves(cache))


def common_prefix_length(
    a: Sequence[int],
    a_visual: VisualTokens | None,
    b: Sequence[int],
    b_visual: VisualTokens | None,
    compare_visual: bool = True,
) -> int:
    """How many leading tokens two rows share. compare_visual: see PrefixCache."""
    size = min(len(a), len(b))
    a_tokens, b_tokens = np.asarray(a[:size]), np.asarray(b[:size])
    equal = a_tokens == b_tokens
    slots = np.flatnonzero(np.cumprod(equal) * (a_tokens == IMAGE))
    if len(slots) and a_visual is not b_visual:
        if not compare_visual:
            return int(slots[0])
        count = len(slots)
        equal[slots] = (np.asarray(a_visual)[:count] == np.asarray(b_visual)[:count]).all(axis=1)
    return size if equal.all() else int(np.argmin(equal))
