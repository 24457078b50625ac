"""Memory and communication of full-size programs for TPU v5e chips must not grow.

Needs libtpu and a few minutes: `make tpu-check` runs it, in CI too.
"""

import importlib.util

import pytest
from helpers.compiled_programs import compiled

GB = 1e9
PROJECTION = (768 * 4096 + 4096) * 4  # bytes of its gradient

# Measured with libtpu 0.0.42.1 (benchmarks/RESULTS.md); other versions may take 3 % more.
HBM = 5.25 * GB
# Every frozen matrix is gathered in the forward pass, those of the layers again in the backward pass.
SENT = 24.9 * GB


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="needs libtpu: make tpu-check runs this"
    ),
]


def test_full_size_step_needs_no_more_than_recorded(tmp_path):
    record = compiled(
        tmp_path, "--config=stage2", "--topology=v5e:2x4", "--mesh=fsdp:8",
        "--config.batch_size=128", "--config.remat=true", "--program=train", "--code",
    )  # fmt: skip
    assert record["peak"] <= HBM * 1.03
    assert record["sent"] <= SENT * 1.03
    # Chips sum only the gradient of the trained part and two scalars.
    reduced = sum(
        c["sent"] * c["count"] for c in record["collectives"] if c["kind"] == "all-reduce"
    )
    assert reduced <= 2 * 7 / 8 * PROJECTION + 100


def test_int4_decode_of_several_rows_copies_no_weights(tmp_path):
    """Copies of all packed matrices in another layout took 3.7 GB."""
    record = compiled(
        tmp_path, "--topology=v5e:1x1", "--size=vicuna7b", "--program=decode", "--quantize=int4",
        "--kv-cache=int8", "--batch=8", "--context=2000",
    )  # fmt: skip
    assert record["memory"]["temporaries"] <= 0.396 * GB * 1.03
