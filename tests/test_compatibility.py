"""What commit 50ab0cc wrote, models and a run that had not ended, still loads and continues.

Users have such folders, so a name in one of their files may not change. Nothing but the commands and
the Python interface is used here: they have to stay as well, while modules may move.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import minigpt4_jax

FIXTURE = Path(__file__).parent / "fixtures" / "written_by_50ab0cc"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())
ARRAYS = np.load(FIXTURE / "expected.npz")
SAVED = 3  # the step of the checkpoint in half/; its log goes on to step 5
SPEED = "examples_per_second"

# What is compared does not depend on how programs are optimized; half the time goes into that.


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A copy: a run is continued in its folder, and its paths are relative to where it is started."""
    return Path(shutil.copytree(FIXTURE, tmp_path_factory.mktemp("compatibility") / "home"))


@pytest.fixture(scope="module")
def continued(home) -> list[str]:
    """half/ continued by the command that began it; the lines that it printed."""
    package = Path(minigpt4_jax.__file__).parents[1]
    found = subprocess.run(
        [sys.executable, "-m", "minigpt4_jax.train", *EXPECTED["train"], "--workdir=half"],
        cwd=home, env=os.environ | {"PYTHONPATH": str(package), "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return found.stdout.splitlines()


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def assert_kept(old, new, where: str) -> None:
    """new has every key and value of old; it may have more keys."""
    if not isinstance(old, dict):
        assert new == (pytest.approx(old, rel=1e-5) if isinstance(old, float) else old), where
        return
    assert old.keys() <= new.keys(), where
    for key, value in old.items():
        assert_kept(value, new[key], f"{where}: {key}")


@pytest.mark.parametrize("name", EXPECTED["models"])  # in floats, in int4, with LoRA on a base
def test_a_model_gives_the_same_values(home, name):
    model = minigpt4_jax.load(home / name, "float32")
    images, questions = [str(home / image) for image in EXPECTED["images"]], EXPECTED["questions"]
    features = model.encode_images(images)
    np.testing.assert_allclose(features, ARRAYS[f"{name}.features"], rtol=1e-4, atol=1e-5)
    nll, tokens = model.score(images, questions, EXPECTED["answers"], template=True)
    np.testing.assert_allclose(nll, ARRAYS[f"{name}.nll"], rtol=1e-5)
    assert tokens.tolist() == EXPECTED["tokens"]
    if name == "model":  # one is enough of what takes longest to compile
        found = model.generate_details(images, questions, template=True, max_new_tokens=12)
        assert [g.ids for [g] in found] == EXPECTED["ids"]
        assert [g.text for [g] in found] == EXPECTED["texts"]


def test_a_run_continues_from_its_checkpoint(home, continued):
    assert continued[0].startswith(f"continuing at step {SAVED}: model, ")
    assert continued[-1].startswith("done: 6 steps, ")
    whole, rest = (
        [line.split()[:3] for line in lines if line.startswith("step ")]
        for lines in (EXPECTED["printed"], continued)
    )
    assert rest[0] == ["step", f"{SAVED + 1}/6", "loss"] and rest[-1][2] == "val_loss"
    assert rest == whole[whole.index(rest[0]) :]
    log = (home / "half" / "metrics.jsonl").read_text().splitlines()
    before = (FIXTURE / "half" / "metrics.jsonl").read_text().splitlines()
    assert log[: SAVED + 1] == before[: SAVED + 1]  # not recorded anew: speeds are in it


def test_a_continued_run_ends_as_one_that_was_not_stopped(home, continued):
    paths = sorted((FIXTURE / "whole" / "model").glob("*.safetensors"))
    assert [p.name for p in paths] == ["lora-00001.safetensors", "projection-00001.safetensors"]
    for path in paths:
        expected, found = load_file(path), load_file(home / "half" / "model" / path.name)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            # Bit for bit on one machine; another's CPU may round sums otherwise.
            np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-6, err_msg=name)


def test_a_continued_run_keeps_the_names_in_its_files(home, continued):
    for name in "config.json", "model/model.json":
        old, new = (
            json.loads((run / name).read_text()) for run in (FIXTURE / "whole", home / "half")
        )
        assert_kept(old, new, name)
    old, new = (records(run / "metrics.jsonl") for run in (FIXTURE / "whole", home / "half"))
    assert SPEED in new[-2]
    for a, b in zip(old, new, strict=True):
        a.pop(SPEED, None)  # also as the first step of a start has none
        assert_kept(a, b, f"metrics.jsonl, step {a['step']}")
