"""The memory estimate of a training step, and the mesh that is chosen with it."""

import dataclasses

import pytest

from minigpt4_jax.aot.presets import model_for
from minigpt4_jax.aot.topology import CHIPS
from minigpt4_jax.parallel.sharding import AXES
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.config_cli import parse
from minigpt4_jax.training.memory_estimate import BatchShape, estimate_memory, largest_batch
from minigpt4_jax.training.mesh_selection import choose_mesh_sizes

GB = 1e9


def run_of(config: str, **values) -> TrainConfig:
    c, _ = parse([f"--config={config}"], sizes_only=True)
    return dataclasses.replace(c, **values)


# (configuration, rows per device, mesh, remat) -> GB of arguments and of temporaries per device, as
# planned by XLA's TPU compiler (libtpu 0.0.42.1; benchmarks/RESULTS.md)
COMPILED = [
    ("stage2", 16, {"data": 8}, True, 15.71, 2.90),  # v5p
    ("stage2", 16, {"data": 8}, False, 15.71, 13.04),  # v6e
    ("stage2", 16, {"data": 32, "fsdp": 8}, True, 2.01, 3.12),  # v5e
    ("stage2", 16, {"data": 4, "fsdp": 2}, True, 7.88, 3.32),
    ("stage2:vicuna13b", 16, {"fsdp": 8}, True, 3.59, 4.78),
    ("v2_stage3", 2, {"fsdp": 8}, True, 2.63, 3.22),
    ("v2_stage3", 2, {"data": 8}, True, 16.14, 3.01),  # v5p
]


@pytest.mark.parametrize(("config", "rows", "mesh", "remat", "arguments", "temporaries"), COMPILED)
def test_estimate_is_close_to_the_compilers_plan(config, rows, mesh, remat, arguments, temporaries):
    sizes = dict.fromkeys(AXES, 1) | mesh
    chips = sizes["data"] * sizes["fsdp"]
    c = run_of(config, batch_size=rows * chips, accumulate=1, remat=remat)
    estimate = estimate_memory(c, model_for(c, None)[1], sizes)
    planned = pytest.approx(arguments * GB, rel=0.01)
    assert estimate.weights + estimate.trained + estimate.batch == planned
    assert estimate.activations + estimate.working == pytest.approx(temporaries * GB, rel=0.1)


def choose(config: str, chip: str, devices: int = 8, **values) -> tuple[dict[str, int], str]:
    """-> (axes larger than 1, reason)"""
    c = run_of(config, **values)
    sizes, reason = choose_mesh_sizes(c, model_for(c, None)[1], devices, CHIPS[chip].usable_hbm)
    return {name: n for name, n in sizes.items() if n > 1}, reason


def test_weights_are_sharded_over_as_few_devices_as_memory_allows():
    large = {"batch_size": 128, "remat": True, "accumulate": 1}
    mesh, reason = choose("stage2", "v6e", **large)
    assert mesh == {"data": 8}
    assert "replicated weights take an estimated 18." in reason and "of 34.1 GB" in reason
    mesh, reason = choose("stage2", "v5e", **large)
    assert mesh == {"data": 4, "fsdp": 2}
    assert "weights sharded over 2 devices take" in reason
    assert "; replicated weights would take 18." in reason
    assert "may fit" not in reason
    # an estimate above 0.9 of the memory but not above all of it: the user may try it
    mesh, reason = choose("stage2:vicuna13b", "v6e", **large)
    assert mesh == {"data": 4, "fsdp": 2}
    assert (
        "; replicated weights would take 32.6 GB, which may fit and is faster (--config.mesh=data:8)"
        in reason
    )
    # activations count
    larger = {"batch_size": 192, "accumulate": 1}
    assert choose("stage2", "v6e", **larger, remat=True)[0] == {"data": 8}
    assert choose("stage2", "v6e", **larger, remat=False)[0] == {"data": 4, "fsdp": 2}
    # with 256 chips, weights are still gathered from two
    mesh, _ = choose("stage2", "v5e", 256, **large | {"batch_size": 4096})
    assert mesh == {"data": 128, "fsdp": 2}
    # rows that cannot be divided among all devices
    mesh, reason = choose("stage2", "v6e", batch_size=12)
    assert mesh == {"data": 4, "model": 2}
    assert "12 rows can be divided among 4 of 8 devices" in reason


def test_reason_says_if_no_mesh_fits():
    mesh, reason = choose("stage2:vicuna13b", "v5e", batch_size=1024, accumulate=1)
    assert mesh == {"fsdp": 8} and "may not fit: use fewer rows at a time" in reason


def test_largest_batch_has_the_longest_allowed_answers():
    c = run_of("stage2", batch_size=4)
    config = model_for(c, None)[1]
    assert largest_batch(c, config) == BatchShape(4, 256, 160)
    packed = dataclasses.replace(c, data=dataclasses.replace(c.data, pack_tokens=512))
    assert largest_batch(packed, config).tokens == 512
