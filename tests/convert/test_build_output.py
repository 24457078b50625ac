"""convert build: the output is whole or not there; values that are not finite are refused."""

import errno
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from convert import build
from minigpt4_jax.checkpoint import writer
from minigpt4_jax.checkpoint.loader import load_model
from minigpt4_jax.errors import UserError


def leftovers(folder, before):
    return sorted(set(folder.iterdir()) - set(before))


def test_a_full_disk_leaves_nothing(files, refused, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = list(files.folder.iterdir())
    monkeypatch.setattr(writer, "save_file", full)
    assert "the disk is full" in refused(*files.arguments("minigpt4-vicuna"))
    assert not leftovers(files.folder, before)


def test_too_small_a_disk_is_seen_before_anything_is_read(files, refused, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    assert "the disk is full" in refused(*files.arguments("minigpt4-vicuna"))


def test_an_error_in_the_middle_leaves_nothing(files, refused, monkeypatch):
    """A file that is cut after it was opened: the error comes while tensors are being written."""
    path = files.folder / "llm" / "model.safetensors"
    before = list(files.folder.iterdir())
    make_plan = build.make_plan

    def cut(request):
        plan = make_plan(request)
        path.write_bytes(path.read_bytes()[:-200])
        return plan

    monkeypatch.setattr(build, "make_plan", cut)
    assert "truncated" in refused(*files.arguments("minigpt4-vicuna"))
    assert not leftovers(files.folder, before)


SLOW = """
import runpy, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job begins with it ignored
import convert.build as module
tensors = module._tensors
def slow(*arguments):
    for item in tensors(*arguments):
        print("writing", flush=True)
        time.sleep(30)
        yield item
module._tensors = slow
runpy.run_module("convert", run_name="__main__")
"""


@pytest.mark.parametrize("how, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_in_the_middle_leaves_nothing(files, how, code):
    before = list(files.folder.iterdir())
    command = [sys.executable, "-c", SLOW, *files.arguments("minigpt4-vicuna")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"writing\n"
        assert leftovers(files.folder, before)  # half a model, in a directory of another name
        process.send_signal(how)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert b"Traceback" not in err
    assert not leftovers(files.folder, before)


def test_output_that_exists_or_cannot_be_written_is_refused(files, refused, monkeypatch):
    taken = files.folder / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("keep")
    assert "not empty" in refused(*files.arguments("minigpt4-vicuna", out=taken))
    assert (taken / "mine.txt").read_text() == "keep"
    assert "cannot write" in refused(*files.arguments("minigpt4-vicuna", out="/proc/nowhere/model"))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_by_name(files, refused, command, tmp_path, value):
    state = {**files.llm}
    key = "model.layers.1.mlp.up_proj.weight"
    state[key] = state[key].copy()
    state[key][2, 3] = value
    save_file(state, files.folder / "llm" / "model.safetensors")
    out = tmp_path / "m"
    arguments = ["build", f"--llm={files.folder / 'llm'}", f"--out={out}"]
    line = refused(*arguments)
    assert key in line and "1 of 384 values are NaN or infinite" in line and not out.exists()
    code, _, err = command(*arguments, "--allow-nonfinite")
    assert code == 0, err
    with pytest.raises(
        UserError, match=r"llm\.blocks\.1\.mlp\.up\.weight: 1 of 384 values are NaN"
    ):
        load_model(out)
    load_model(out, allow_nonfinite=True)


def test_a_cast_that_overflows_is_refused(files, refused, tmp_path):
    state = {name: x.astype(np.float32) for name, x in files.llm.items()}
    state["lm_head.weight"][0, 0] = 1e6
    save_file(state, files.folder / "llm" / "model.safetensors")
    line = refused(
        "build", f"--llm={files.folder / 'llm'}", f"--out={tmp_path / 'm'}", "--llm-dtype=float16"
    )
    assert "lm_head.weight: 1 of " in line
    assert "too large for float16; choose --llm-dtype=bfloat16" in line
