"""A run that is interrupted anywhere ends with the same parameters, bit for bit."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from helpers import tiny

from minigpt4_jax.checkpoint import model_directory
from minigpt4_jax.training.preemption import Stopped
from minigpt4_jax.training.trainer import train

pytestmark = pytest.mark.usefixtures("traced_steps")

STEPS = 7
# The Q-Former is trained too: its dropout is the random state that a resumed run must continue.
FIELDS = {
    "steps": STEPS, "batch_size": 2, "init_lr": 0.01, "warmup_steps": 2, "dtype": "float32",
    "freeze_qformer": False, "save_every": 3, "log_every": 1, "keep": 2,
    "prompts": ("<Img><ImageHere></Img> What?", "<Img><ImageHere></Img> Where is it?"),
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    tiny.write_model(folder / "model")
    tiny.write_data(folder / "data", rows=5)
    return folder


def values(home) -> dict:
    fields = {k: v for k, v in FIELDS.items() if k != "prompts"}
    data = {"path": (str(home / "data" / "rows.jsonl"),), "prompts": FIELDS["prompts"]}
    return {"model": str(home / "model"), "data": data, **fields}


def outcome(workdir) -> tuple[dict[str, bytes], list[dict]]:
    """(trained parameters, the records of metrics.jsonl without the speed)"""
    tensors = {}
    for path in sorted((workdir / "model").glob("*.safetensors")):
        from safetensors.numpy import load_file

        tensors |= {name: array.tobytes() for name, array in load_file(path).items()}
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("examples_per_second", None)
    return tensors, records


@pytest.fixture(scope="module")
def uninterrupted(home):
    train(values(home), home / "whole")
    return outcome(home / "whole")


def test_uninterrupted_run(home, uninterrupted):
    tensors, records = uninterrupted
    assert {n.split(".")[0] for n in tensors} == {"projection", "qformer"}
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    before = model_directory.Tensors(home / "model")
    changed = [n for n in tensors if np.asarray(before[n]).tobytes() != tensors[n]]
    assert len(changed) > 0.8 * len(tensors)


class Crash(Exception):
    pass


def interrupted(home, workdir, step: int, act) -> list[int]:
    """Start, do something at a step, start again; the steps that the second start reports."""
    with pytest.raises((Crash, Stopped)) as stopped:
        train(values(home), workdir, on_metrics=lambda r: act() if r["step"] == step else None)
    assert stopped.type is Crash or stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    seen = []
    train(values(home), workdir, on_metrics=lambda r: seen.append(r["step"]))
    return seen


@pytest.mark.parametrize("step", [1, 5])
def test_crash_at_a_step(home, uninterrupted, tmp_path, step):
    def crash():
        raise Crash

    seen = interrupted(home, tmp_path / "w", step, crash)
    assert seen[0] == (1 if step < 3 else 4)  # there is a checkpoint of step 3
    assert outcome(tmp_path / "w") == uninterrupted
    kept = sorted(p.name for p in (tmp_path / "w" / "checkpoints").glob("0*"))
    assert kept == ["00000006", "00000007"]


def test_terminated_at_a_step(home, uninterrupted, tmp_path):
    seen = interrupted(home, tmp_path / "w", 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert seen[0] in (5, 6)  # nothing is done twice; the device was a step ahead of the report
    assert outcome(tmp_path / "w") == uninterrupted


@pytest.mark.slow
def test_interrupted_again_and_again(home, uninterrupted, tmp_path):
    def interrupt(record):
        os.kill(os.getpid(), signal.SIGTERM)

    starts = 0
    while starts < 20:
        starts += 1
        try:
            train(values(home), tmp_path / "w", on_metrics=interrupt)
            break
        except Stopped:
            continue
    assert 3 < starts < 20
    assert outcome(tmp_path / "w") == uninterrupted


def test_finished_run_is_not_run_again(home, uninterrupted):
    called = []
    result = train(values(home), home / "whole", on_metrics=called.append)
    assert not called
    assert result.model == home / "whole" / "model"
    assert result.metrics["loss"] == uninterrupted[1][-1]["loss"]


def command(home, workdir) -> list[str]:
    given = values(home)
    data = given.pop("data")
    args = [f"--config.{k}={v}" for k, v in given.items()]
    args += [f"--config.data.path={data['path'][0]}"]
    args += [f"--config.data.prompts={p}" for p in data["prompts"]]
    (home / "empty.py").write_text("def get_config():\n    return {}\n")
    head = [sys.executable, "-m", "minigpt4_jax.train", f"--config={home / 'empty.py'}"]
    return [*head, f"--workdir={workdir}", *args]


def run_until(args, step, number) -> tuple[int, str]:
    """Start the command, send the signal when it reports `step`; (exit code, output)."""
    with subprocess.Popen(
        args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith(f"step {step}/"):
                process.send_signal(number)
        return process.wait(), "".join(lines)


@pytest.mark.slow
def test_killed_processes(home, uninterrupted, tmp_path):
    args = command(home, tmp_path / "w")
    code, _ = run_until(args, 4, signal.SIGKILL)  # the checkpoint of step 3 may be half written
    assert code == -signal.SIGKILL
    code, text = run_until(args, 5, signal.SIGTERM)
    assert code == 143, text
    assert "stopped by SIGTERM" in text and "Traceback" not in text
    done = subprocess.run(args, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "continuing at step" in done.stdout
    assert outcome(tmp_path / "w") == uninterrupted
