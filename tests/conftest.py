"""How tests compile programs, the order of the files, and fixtures for all of them."""

import contextlib
import gc
import os
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import shuffled_indices
from helpers.quick_codegen import quick_codegen
from PIL import Image

if find_spec("hypothesis"):
    from hypothesis import settings

    # A busy machine is no fault of the code.
    settings.register_profile("tests", settings.default, deadline=None)
    settings.load_profile("tests")

# The slowest files start first, so that no worker is left with one of them at the end. (By default
# xdist starts with the files of most tests, but a single test may restart a training many times.)
LONGEST = (
    "test_sharding.py", "test_parity.py", "test_ray.py", "test_blip2_train.py", "test_multihost.py",
    "test_buckets.py", "test_llm_families.py", "test_train_kills.py", "test_blip2_losses.py",
    "test_blip2_model.py", "test_llm_config.py", "test_page.py", "test_prefix_cache.py",
    "test_instructblip.py", "test_train_resume.py", "test_parity_answers.py", "test_keep.py",
    "test_packed_step.py", "test_quantization.py", "test_scheduler.py", "test_code_blocks.py",
    "test_vision_encoder.py", "test_prefetch.py", "test_gguf.py", "test_gpu_products.py",
    "test_chat_processes.py", "test_qformer_model.py", "test_multihost_checkpoints.py", "test_samples.py",
    "test_caption_metrics.py", "test_compatibility.py", "test_gpu_benchmark.py", "test_train_survive.py",
    "test_engine.py", "test_batch.py", "test_8bit_cache.py", "test_mixture.py",
)  # fmt: skip

# Tests that import libraries of the extra [dev] at their top; the smoke run has none of these.
REQUIRED = {
    "serving": "fastapi",
    "serving/test_page.py": "gradio",
    "serving/test_page_rendering.py": "gradio",
    "serving/test_served_exif.py": "gradio",
    "serving/test_ray_ingress.py": "ray",
    "serving/test_openai_client.py": "openai",
    "serving/test_same_text.py": "httpx",
    "serving/test_serve_command.py": "openai",
    "cli/test_ray.py": "ray",
    "cli/test_ray_formats.py": "pyarrow",
    "curation/test_captions.py": "pyarrow",
    "data/test_webdataset_members.py": "zstandard",
    "test_deploy.py": "kubernetes_validate",
}
collect_ignore = [path for path, module in REQUIRED.items() if find_spec(module) is None]


def pytest_report_header() -> list[str]:
    return [f"left out, {REQUIRED[path]} is not installed: tests/{path}" for path in collect_ignore]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick-codegen",
        action="store_true",
        help="compile programs with the code generator that needs half the time, except in modules marked "
        "default_compiler",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Processes that tests start import `helpers` too, do without PyTorch, and compile with the same flags.
    # The workers of xdist, which the main process starts, need PyTorch.
    folder = Path(__file__).parent
    is_main_process = getattr(config.option, "numprocesses", None) is not None
    paths = [str(folder), None if is_main_process else str(folder / "helpers" / "without_torch")]
    paths.append(os.environ.get("PYTHONPATH"))
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    # PyTorch's threads wait for work in a loop: for small models that costs more than their work.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: n for n, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_collection_finish() -> None:
    # A tenth of the time went to the garbage collector: imported modules and tests are never garbage, and
    # tracing makes many objects that stay.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)
    if "grain" in sys.modules:
        shuffled_indices.remember()


@pytest.fixture(scope="module", autouse=True)
def frozen_objects() -> Iterator[None]:
    """What is left after a long module, as the jaxprs in JAX's caches, is not looked at again."""
    begin = time.monotonic()
    yield
    if time.monotonic() - begin > 3.0:
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(request, tmp_path_factory):
    """JAX's cache of compiled programs, here and in the processes that tests start."""
    if not jax.config.jax_compilation_cache_dir:
        cache = getattr(request.config, "cache", None)  # absent under -p no:cacheprovider
        folder = cache.mkdir("xla") if cache else tmp_path_factory.mktemp("xla")
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compile with few optimizations, which takes a quarter of the time, here and in the processes that
    tests start; except in modules marked default_compiler."""
    if request.node.get_closest_marker("default_compiler"):
        jax.clear_caches()  # of programs that other modules compiled quickly
        yield
        jax.clear_caches()
        return
    name = "jax_disable_most_optimizations"
    with contextlib.ExitStack() as stack:
        if request.config.getoption("quick_codegen"):
            stack.enter_context(quick_codegen())
        stack.enter_context(pytest.MonkeyPatch.context()).setenv(name.upper(), "1")
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
