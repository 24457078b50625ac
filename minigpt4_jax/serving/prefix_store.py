"""Caches of processed prompts, which later prompts with the same beginning continue from."""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from minigpt4_jax.config import IMAGE
from minigpt4_jax.models.kv_cache import KVCache


def prompt_key(tokens: Sequence[int], digests: Sequence[bytes], visual_tokens: int) -> np.ndarray:
    """Token ids [T] int64 in which an image's slots have a number of that image.

    visual_tokens: P. If the prompt was cut on the left, its slots are of the last images.
    """
    key = np.asarray(tokens, np.int64)
    (slots,) = np.nonzero(key == IMAGE)
    of_images = [_negative(digest) for digest in digests]
    numbers = np.repeat(np.array(of_images, np.int64), visual_tokens)
    key[slots] = numbers[len(numbers) - len(slots) :]
    return key


def _negative(digest: bytes) -> int:
    """A number below all token ids and IMAGE."""
    return -(int.from_bytes(digest[:8], "big") >> 2) - (1 << 32)


class PrefixStore:
    """The caches of the most recently used prompts, up to a number of tokens in all.

    Caches stay on the device, each with one row. They are shared: whoever continues one copies it.
    """

    def __init__(self, max_tokens: int):
        self._max_tokens = max_tokens
        self._entries: OrderedDict[bytes, tuple[np.ndarray, KVCache]] = OrderedDict()

    @property
    def size(self) -> int:
        """Positions of all caches together."""
        return sum(cache.length for _, cache in self._entries.values())

    def find(self, key: np.ndarray) -> tuple[int, KVCache | None]:
        """(how many leading tokens of a prompt are cached, in which cache).

        At most all but the last, which is processed for its logits.
        """
        longest, name = 0, None
        for entry, (tokens, _) in self._entries.items():
            length = min(common_prefix_length(tokens, key), len(key) - 1)
            if length > longest:
                longest, name = length, entry
        if name is None:
            return 0, None
        self._entries.move_to_end(name)
        return longest, self._entries[name][1]

    def put(self, key: np.ndarray, cache: KVCache) -> None:
        """Keep the cache of a whole prompt, and drop prompts that are its beginning."""
        if cache.length > self._max_tokens:
            return
        for name, (tokens, _) in list(self._entries.items()):
            if common_prefix_length(tokens, key) == len(tokens):
                del self._entries[name]
        self._entries[key.tobytes()] = (key, cache)
        while self.size > self._max_tokens:
            self._entries.popitem(last=False)

    def clear(self) -> None:
        """Free all caches."""
        self._entries.clear()


def common_prefix_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading numbers two arrays share."""
    size = min(len(a), len(b))
    different = a[:size] != b[:size]
    return int(np.argmax(different)) if different.any() else size
