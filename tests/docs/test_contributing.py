"""The diffs in CONTRIBUTING.md apply to the present code and do what the text says."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiny
from helpers.doc_blocks import blocks
from helpers.paths import ROOT

CHECK = """
import json
import numpy
from convert.hf_config import llm_config_from_hf
from minigpt4_jax.data.datasets import open_dataset

sizes = dict(vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=56)
biases = {"attention_bias": True, "attention_out_bias": False}
llm = llm_config_from_hf({"model_type": "seed_oss"} | biases | sizes)
assert llm.qkv_bias and not llm.o_bias

source = open_dataset("vizwiz", "vizwiz")
example = source.example(0, numpy.random.default_rng(0))
assert example.answers == ("can",) and "[vqa]" in example.questions[0], example
assert source.dropped == {"without an answer": 1}
"""
ROWS = """[{"image": "1.png", "question": "What is this?", "answers": [{"answer": "can"}]},
{"image": "1.png", "question": "And this?", "answers": []}]"""


@pytest.fixture(scope="module")
def patched(tmp_path_factory) -> Path:
    """A copy of the code with every diff applied, and small inputs."""
    folder = tmp_path_factory.mktemp("patched")
    for part in ("minigpt4_jax", "convert", "benchmarks", "tests/models"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    diffs = [block for block in blocks(ROOT / "CONTRIBUTING.md") if block.language == "diff"]
    assert len(diffs) == 3
    for block in diffs:
        done = subprocess.run(
            ["git", "apply", "--unidiff-zero", "-"],
            input=block.text, cwd=folder, text=True, capture_output=True,
            env={"GIT_CEILING_DIRECTORIES": str(folder.parent), "PATH": "/usr/bin:/bin"},
        )  # fmt: skip
        assert done.returncode == 0, f"{block}: {done.stderr}"
    data = tiny.write_data(folder / "vizwiz" / "train", rows=2).parent.parent
    (data / "train.json").write_text(ROWS)
    tiny.write_model(folder / "model", llm_layers=1)
    return folder


def python(folder: Path, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, *args], cwd=folder, text=True, capture_output=True, timeout=300,
        env={"PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_language_model_and_dataset(patched):
    python(patched, "-c", CHECK)


def test_benchmark(patched):
    output = python(patched, "benchmarks/encode.py", "--model=model", "--images=4", "--rounds=1")
    assert output.endswith("images/s\n")
