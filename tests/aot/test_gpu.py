"""Full-size programs for an H200 must not need more kernels, copies or memory than recorded.

Needs JAX's CUDA plugin, no GPU: `make gpu-check` runs this.
"""

import importlib.util

import pytest
from helpers.compiled_programs import compiled

MB, GB = 1e6, 1e9

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
    embedding = 32000 * 4096 * (1 if options else 2)  # of which rows are looked up
    assert record["bytes"] <= 1.1 * (record["memory"]["arguments"] - embedding)


def test_a_training_step_of_7b_copies_no_weights(tmp_path):
    """A scan over the layers copied 764 of them, 25 GB."""
    record = compiled(
        tmp_path, "--topology=h200:1", "--config=stage2", "--program=train", "--tokens=160",
        "--config.remat=false",
    )  # fmt: skip
    assert record["kernels"]["argument_copies"] == 0
    assert record["memory"]["temporaries"] <= 6.25 * GB * 1.03
    assert record["kernels"]["count"] <= 2300
