"""Full-size programs for an H200 must not need more kernels, copies or memory than recorded.

Needs JAX's CUDA plugin, no GPU: `make gpu-check` runs this.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

MB, GB = 1e6, 1e9

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda12_plugin") is None,
        reason="needs JAX's CUDA plugin: make gpu-check runs this",
    ),
]


def compiled(folder, *arguments):
    """The records of the programs, as `python -m minigpt4_jax.compile` writes them."""
    json_path = folder / "figures.json"
    command = [sys.executable, "-m", "minigpt4_jax.compile", *arguments, f"--json={json_path}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(json_path.read_text())


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
    (record,) = compiled(
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
    """A scan over the layers copied 764 of them, 25 GB. Left is the patch embedding, 1.7 MB, which cuBLAS
    wants padded from 588 to 592 inputs."""
    (record,) = compiled(
        tmp_path, "--topology=h200:1", "--config=stage2", "--program=train", "--tokens=160",
        "--config.remat=false",
    )  # fmt: skip
    assert record["kernels"]["argument_copied_bytes"] <= 2 * MB
    assert record["memory"]["temporaries"] <= 6.25 * GB * 1.03
    assert record["kernels"]["count"] <= 2300
