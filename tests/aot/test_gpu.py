"""Full-size programs for an H200 must not need more kernels, copies or memory than recorded.

Needs JAX's CUDA plugin, no GPU: `make gpu-check` runs this.
"""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from helpers.compiled_programs import compiled
from jax.sharding import SingleDeviceSharding

from minigpt4_jax.aot.presets import PRESETS
from minigpt4_jax.aot.programs import AbstractEngine
from minigpt4_jax.aot.topology import chip_of, slice_devices
from minigpt4_jax.models.kv_cache import bytes_per_position
from minigpt4_jax.parallel.sharding import single_device_mesh
from minigpt4_jax.quantization.matmul import linear
from minigpt4_jax.utils import platform

MB, GB = 1e6, 1e9
EMBEDDING = 32000 * 4096  # numbers, of which a step looks up a few rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda12_plugin") is None,
        reason="needs JAX's CUDA plugin: make gpu-check runs this",
    ),
]


@pytest.mark.parametrize(
    ("options", "kernels", "temporaries"),
    [
        ([], 500, 8 * MB),
        (["--quantize=int8"], 540, 8 * MB),
        (["--quantize=int4"], 560, 8 * MB),
        (["--quantize=int4", "--batch=8"], 600, 32 * MB),
        (["--quantize=int8", "--kv-cache=int8"], 540, 8 * MB),
        (["--kv-cache=float8"], 500, 8 * MB),
    ],
)
def test_decoding_7b(tmp_path, options, kernels, temporaries):
    """No unpacked weight is ever in memory, and hardly anything but weights and cache is read."""
    record = compiled(
        tmp_path,
        "--topology=h200:1",
        "--size=vicuna7b",
        "--program=decode",
        "--context=512",
        *options,
    )
    assert record["kernels"]["count"] <= kernels
    assert record["kernels"]["argument_copies"] == 0
    assert record["memory"]["temporaries"] <= temporaries
    embedding = EMBEDDING * (1 if any("--quantize" in o for o in options) else 2)
    assert record["bytes"] <= 1.1 * (record["memory"]["arguments"] - embedding)


def test_decoding_with_adapters_copies_no_weights(tmp_path):
    """MiniGPT-v2, 8 rows: products joined with those of the adapters copied a quarter of the weights. What is
    left are the adapters in bfloat16, 67 MB, converted before the loop."""
    record = compiled(
        tmp_path, "--topology=h200:1", "--size=v2", "--program=decode", "--context=512", "--batch=8"
    )  # fmt: skip
    assert record["memory"]["temporaries"] <= 80 * MB
    assert record["bytes"] <= 1.15 * (record["memory"]["arguments"] - 2 * EMBEDDING)


@pytest.mark.parametrize("rows", [1, 8])
def test_decoding_7b_on_eight_gpus_exchanges_no_weights(tmp_path, rows):
    """Every device gathered the embedding, or the output matrix, for every token: 262 MB."""
    record = compiled(
        tmp_path, "--topology=h200:8", "--size=vicuna7b", "--program=decode", "--context=512",
        f"--batch={rows}",
    )  # fmt: skip
    assert record["sent"] <= rows * 2 * MB
    assert record["kernels"]["argument_copies"] == 0
    assert record["memory"]["temporaries"] <= 8 * MB
    assert record["bytes"] <= 1.15 * (record["memory"]["arguments"] - 2 * EMBEDDING / 8)


def test_decoding_in_int8_on_eight_gpus_unpacks_no_matrix(tmp_path):
    """A GPU has 1,376 of an MLP's 11,008 inputs, which XLA padded for products of several rows: 12 MB."""
    record = compiled(
        tmp_path, "--topology=h200:8", "--mesh=model:8", "--size=vicuna7b", "--program=decode",
        "--context=512", "--quantize=int8", "--batch=8",
    )  # fmt: skip
    assert record["memory"]["temporaries"] <= 4 * MB


def test_decoding_reads_few_unused_cache_slots(tmp_path):
    """Weights and live cache are 1 / 1.1 of what a step reads at least, at any length of the rows."""
    rows, tokens = 8, 513
    config = dataclasses.replace(PRESETS["vicuna7b"], quantize="int4")
    chip = chip_of("h200:1")
    engine = AbstractEngine(config, single_device_mesh(), chip=chip)
    weights = engine._weight_slots
    with platform.compiling_for(chip.platform, chip.compute_capability):
        length = engine.cache_length(tokens, rows)
        for n in range(129, 4097):
            slots = engine.cache_length(n, 32)
            assert 1.05 * (weights / 32 + slots) <= 1.1 * (weights / 32 + n), n
    record = compiled(
        tmp_path, "--topology=h200:1", "--size=vicuna7b", "--program=decode", "--quantize=int4",
        f"--batch={rows}", f"--context={length}",
    )  # fmt: skip
    unused = rows * (length - tokens) * bytes_per_position(config.llm, None, 2)
    assert record["bytes"] <= 1.1 * (record["memory"]["arguments"] - EMBEDDING - unused)
    assert record["memory"]["temporaries"] <= 32 * MB


def test_a_training_step_of_7b_copies_no_weights(tmp_path):
    """A scan over the layers copied 764 of them, 25 GB."""
    record = compiled(
        tmp_path, "--topology=h200:1", "--config=stage2", "--program=train", "--tokens=160",
        "--config.remat=false",
    )  # fmt: skip
    assert record["kernels"]["argument_copies"] == 0
    assert record["memory"]["temporaries"] <= 6.25 * GB * 1.03
    assert record["kernels"]["count"] <= 2300


@pytest.mark.parametrize(
    ("topology", "products"), [("h100:1", 2), ("h200:1", 2), ("rtx4090:1", 2), ("a100-80:1", 0)]
)
def test_frozen_matrices_in_float8_are_multiplied_by_cublaslt(topology, products):
    """Forward and backward, as in a training step."""
    chip, sharding = chip_of(topology), SingleDeviceSharding(slice_devices(topology)[0])

    def f(x, levels, scale):
        return linear(x, levels, None, None, scale)

    def step(x, levels, scale, dy):
        return jax.vjp(lambda x: f(x, levels, scale), x)[1](dy), f(x, levels, scale)

    shapes = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for shape, dtype in (
            ((12, 160, 4096), jnp.bfloat16), ((11008, 4096), jnp.float8_e4m3fn),
            ((11008,), jnp.bfloat16), ((12, 160, 11008), jnp.bfloat16),
        )
    ]  # fmt: skip
    with platform.compiling_for(chip.platform, chip.compute_capability):
        options = platform.compiler_options("products")
        traced = jax.jit(step, compiler_options=options).trace(*shapes)
        text = traced.lower(lowering_platforms=("cuda",)).compile().as_text()
    assert text.count('"__cublas$lt$matmul$f8"') == products
    assert text.count('"__cublas$lt$matmul"') == 2 - products
