"""Programs that several tests compile alike are compiled once, and found again by the next run."""

import os
from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(request, tmp_path_factory):
    """JAX's cache of compiled programs, here and in the processes that tests start."""
    if not jax.config.jax_compilation_cache_dir:
        cache = getattr(request.config, "cache", None)  # absent under -p no:cacheprovider
        folder = cache.mkdir("xla") if cache else tmp_path_factory.mktemp("xla")
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """Gets an entry whenever a program is compiled, or read from the cache on disk instead."""
    found: list[str] = []

    def note(event: str, seconds: float, **_: object) -> None:
        if "backend_compile" in event:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield found
    jax.monitoring.unregister_event_duration_listener(note)
