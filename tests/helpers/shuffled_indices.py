"""Grain's shuffled indices, each computed once.

Grain encrypts 16 bits again and again until they are an index of the dataset. For one of 5 rows that
takes 7 ms, which was most of the time of tests with many loaders of the same rows. The function is pure.
"""

import functools
import types


def remember() -> None:
    """Shuffle with a cache in this process; without one if Grain's private module has changed."""
    try:
        from grain._src.python.dataset.transformations import shuffle

        function = shuffle.index_shuffle.index_shuffle
    except (ImportError, AttributeError):
        return
    if not hasattr(function, "cache_info"):
        cached = functools.lru_cache(1 << 16)(function)
        shuffle.index_shuffle = types.SimpleNamespace(index_shuffle=cached)
