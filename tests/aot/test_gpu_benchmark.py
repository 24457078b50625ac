"""benchmarks/gpu.py on a CPU with a tiny model: figures are written as they come, and it ends in time."""

import json
import os
import subprocess
import sys
import time

import pytest
from helpers.paths import ROOT

pytestmark = pytest.mark.slow


def benchmark(folder, *arguments):
    """(exit code, output, the JSON file's content)."""
    path = folder / "gpu.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--size=tiny", f"--out={path}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout, json.loads(path.read_text())


def test_figures_and_their_share_of_a_ceiling(tmp_path):
    code, output, record = benchmark(tmp_path, "--parts=^ceilings|^prefill", "--slow=6")
    assert code == 0 and not record["missing"], output
    figures = {figure["name"]: figure for figure in record["figures"]}
    assert figures["bfloat16 product"]["value"] > 0
    prompt = figures["64 tokens"]
    assert prompt["share"] == prompt["rate"] / figures["bfloat16 product"]["value"]
    assert output.count("\n") == len(record["figures"])


def test_it_ends_in_time_and_names_what_is_missing(tmp_path):
    start = time.monotonic()
    code, _, record = benchmark(tmp_path, "--minutes=0.1", "--parts=^decode|^step$")
    assert code == 1
    assert time.monotonic() - start < 60
    assert record["missing"]["step"] == "not measured: no time is left"
    assert record["missing"]["decode bfloat16"].startswith(("ended after", "not measured"))
