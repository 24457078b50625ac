"""Programs that several tests compile alike are compiled once, and found again by the next run."""

import os
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

# The files that take longest begin first, so that no worker is left alone with one at the end. (Of its
# own, xdist begins with the files of most tests; one test may be that of fifty kills.)
LONGEST = (
    "test_sharding.py", "test_train_kills.py", "test_prefix_cache.py", "test_multihost.py",
    "test_int8_cache.py", "test_buckets.py", "test_train_survive.py", "test_engine.py",
    "test_train_resume.py", "test_beam_search.py", "test_smollm2.py",
)  # fmt: skip


def pytest_configure() -> None:
    # Processes that tests start import `helpers` too.
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: n for n, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(request, tmp_path_factory):
    """JAX's cache of compiled programs, here and in the processes that tests start."""
    if not jax.config.jax_compilation_cache_dir:
        cache = getattr(request.config, "cache", None)  # absent under -p no:cacheprovider
        folder = cache.mkdir("xla") if cache else tmp_path_factory.mktemp("xla")
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """For modules whose subject is not the arithmetic of their programs: LLVM optimizes these little,
    which takes a third off their compilation. Also in the processes that the tests start."""
    name = "jax_disable_most_optimizations"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name.upper(), "1")
        jax.config.update(name, True)
        yield
        jax.config.update(name, False)


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


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Paths of ten PNG files of noise, 40 x 30."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for n in range(10):
        noise = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{n}.png")
    return [str(folder / f"{n}.png") for n in range(10)]
