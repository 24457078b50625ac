"""Runs whose environment fails: damaged checkpoints, signals, storage and data that go away."""

import dataclasses
import json
import os
import signal
import time
from pathlib import Path

import pytest
from helpers import tiny
from safetensors.numpy import load_file

from minigpt4_jax import errors
from minigpt4_jax.checkpoint.loader import load_model
from minigpt4_jax.checkpoint.writer import write_model
from minigpt4_jax.data.config import DataConfig
from minigpt4_jax.models.minigpt import MiniGpt
from minigpt4_jax.training import trainer
from minigpt4_jax.training.checkpoints import Checkpoints
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.evaluation import Validation
from minigpt4_jax.training.preemption import Stopped
from minigpt4_jax.training.trainer import train

pytestmark = pytest.mark.usefixtures("traced_steps")

LOGS = ("metrics.jsonl", "samples.jsonl")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("survive")
    tiny.write_model(folder / "model")
    tiny.write_data(folder / "data", rows=8)
    return folder


def config(home: Path, **changes) -> TrainConfig:
    data = DataConfig(
        path=(str(home / "data" / "rows.jsonl"),),
        shuffle=False,
        prompts=("<Img><ImageHere></Img> ?",),
    )
    fields = {
        "steps": 6, "batch_size": 2, "init_lr": 0.01, "warmup_steps": 1, "dtype": "float32",
        "save_every": 2, "log_every": 1,
        "max_text_length": 12,  # batches of one width: each width is a program
    }  # fmt: skip
    return dataclasses.replace(
        TrainConfig(model=str(home / "model"), data=data, **fields), **changes
    )


def refused(c: TrainConfig, workdir: Path) -> str:
    with pytest.raises(errors.UserError) as e:
        train(c, workdir)
    assert "\n" not in str(e.value)
    return str(e.value)


class Crash(Exception):
    pass


def crash_at(step: int):
    def act(record):
        if record["step"] == step:
            raise Crash

    return act


def outcome(workdir: Path) -> tuple[dict[str, bytes], list[dict]]:
    """(trained parameters, every record of the logs without its speed)"""
    tensors = load_file(workdir / "model" / "projection-00001.safetensors")
    lines = [line for name in LOGS for line in (workdir / name).read_text().splitlines()]
    records = [json.loads(line) for line in lines]
    for record in records:
        record.pop("examples_per_second", None)
    return {name: array.tobytes() for name, array in tensors.items()}, records


@pytest.fixture(scope="module")
def uninterrupted(home):
    train(config(home), home / "whole")
    return outcome(home / "whole")


# --- checkpoints -------------------------------------------------------------------------------


def damage(checkpoint: Path) -> None:
    for path in checkpoint.rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    home, uninterrupted, tmp_path, capsys
):
    with pytest.raises(Crash):
        train(config(home), tmp_path / "w", on_metrics=crash_at(6))
    checkpoints = tmp_path / "w" / "checkpoints"
    damage(checkpoints / "00000004")
    seen = []
    train(config(home), tmp_path / "w", on_metrics=lambda r: seen.append(r["step"]))
    lines = capsys.readouterr().out.splitlines()
    (message,) = [line for line in lines if "is damaged (" in line]
    assert message.startswith(f"checkpoint {checkpoints / '00000004'} is damaged (")
    assert "kept as damaged-00000004; continuing from the one before, of step 2" in message
    assert seen == [3, 4, 5, 6]
    assert outcome(tmp_path / "w") == uninterrupted
    assert (checkpoints / "damaged-00000004").is_dir()


def test_no_whole_checkpoint_is_left(home, tmp_path):
    with pytest.raises(Crash):
        train(config(home), tmp_path / "w", on_metrics=crash_at(3))
    log = (tmp_path / "w" / "metrics.jsonl").read_bytes()
    damage(tmp_path / "w" / "checkpoints" / "00000002")
    message = refused(config(home), tmp_path / "w")
    assert f"every checkpoint in {tmp_path / 'w' / 'checkpoints'} is damaged (00000002: " in message
    assert "remove that directory to start the run again" in message
    assert (tmp_path / "w" / "metrics.jsonl").read_bytes() == log


# --- signals -----------------------------------------------------------------------------------


def terminate(*_) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def terminating(f):
    """f, with a SIGTERM when it is called."""

    def wrapped(*args, **kwargs):
        terminate()
        return f(*args, **kwargs)

    return wrapped


def stopped(c: TrainConfig, workdir: Path, **options) -> None:
    with pytest.raises(Stopped) as e:
        train(c, workdir, **options)
    assert e.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def with_validation(home: Path) -> TrainConfig:
    c = config(home, eval_every=2, sample_every=3, sample_images=1, sample_tokens=3)
    return dataclasses.replace(c, data=dataclasses.replace(c.data, val_path=c.data.path))


@pytest.fixture(scope="module")
def validated(home):
    """The outcome of an uninterrupted run with validations."""
    train(with_validation(home), home / "validated")
    return outcome(home / "validated")


def test_before_the_first_step(home, uninterrupted, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr("minigpt4_jax.training.setup.load_model", terminating(load_model))
        stopped(config(home), tmp_path / "w")
    assert capsys.readouterr().out == "stopped by SIGTERM before the first step: nothing is lost\n"
    train(config(home), tmp_path / "w")
    assert outcome(tmp_path / "w") == uninterrupted


def test_while_the_step_is_compiled(
    home, uninterrupted, traced_steps, tmp_path, monkeypatch, capsys
):
    traced_steps.clear()
    with monkeypatch.context() as patch:
        patch.setattr(MiniGpt, "token_nll", terminating(MiniGpt.token_nll))  # runs when traced
        stopped(config(home), tmp_path / "w")
    assert "stopped by SIGTERM; step 1 is saved: start the same comm" in capsys.readouterr().out
    train(config(home), tmp_path / "w")
    assert outcome(tmp_path / "w") == uninterrupted


@pytest.mark.parametrize("method", ["loss", "captions"])
def test_during_validation(home, validated, tmp_path, monkeypatch, method):
    """What was cut short is done by the next start; nothing is missing in the logs, or twice."""
    c = with_validation(home)
    with monkeypatch.context() as patch:
        patch.setattr(Validation, method, terminating(getattr(Validation, method)))
        for _ in range(5):  # each start gets as far as the next validation
            try:
                train(c, tmp_path / "w")
            except Stopped as e:
                assert e.code == 143
    train(c, tmp_path / "w")
    tensors, records = outcome(tmp_path / "w")
    assert (tensors, records) == validated
    assert [r["step"] for r in records if "val_loss" in r] == [2, 4, 6]
    assert [r["step"] for r in records if "text" in r] == [3, 6]


def test_while_the_model_is_written(home, uninterrupted, tmp_path, monkeypatch):
    """It is written to the end: the run is done."""
    monkeypatch.setattr(trainer, "write_trained_model", terminating(trainer.write_trained_model))
    train(config(home), tmp_path / "w")
    assert outcome(tmp_path / "w") == uninterrupted


def test_at_the_last_step(home, uninterrupted, tmp_path):
    act = lambda r: terminate() if r["step"] == 6 else None  # noqa: E731
    stopped(config(home), tmp_path / "w", on_metrics=act)
    assert not (tmp_path / "w" / "model").exists()
    seen = []
    train(config(home), tmp_path / "w", on_metrics=seen.append)
    assert seen == []
    assert outcome(tmp_path / "w") == uninterrupted


def test_again_while_the_state_is_saved(home, uninterrupted, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        for method in ("save", "wait"):
            patch.setattr(Checkpoints, method, terminating(getattr(Checkpoints, method)))
        stopped(config(home, save_every=100), tmp_path / "w", on_metrics=terminate)
    seen = []
    train(config(home), tmp_path / "w", on_metrics=lambda r: seen.append(r["step"]))
    assert seen[0] in (2, 3)
    assert outcome(tmp_path / "w") == uninterrupted


# --- storage --------------------------------------------------------------------------


def test_a_store_that_goes_away(home, uninterrupted, tmp_path):
    store, elsewhere = tmp_path / "w" / "checkpoints", tmp_path / "elsewhere"

    def take(record):
        if record["step"] == 3:
            while not (store / "00000002").exists():
                time.sleep(0.01)
            store.rename(elsewhere)
            store.write_text("")

    with pytest.raises(errors.UserError) as e:
        train(config(home), tmp_path / "w", on_metrics=take)
    assert f"cannot write checkpoints in {store}: " in str(e.value) and "\n" not in str(e.value)
    assert "Check that the directory can be reached and written and start the same" in str(e.value)
    store.unlink()
    elsewhere.rename(store)
    seen = []
    train(config(home), tmp_path / "w", on_metrics=lambda r: seen.append(r["step"]))
    assert seen == [3, 4, 5, 6]
    assert outcome(tmp_path / "w") == uninterrupted


@pytest.mark.parametrize("workdir", ["s3://bucket/run", Path("s3://bucket/run")])
def test_an_address_is_refused_and_makes_no_folder(home, tmp_path, monkeypatch, workdir):
    monkeypatch.chdir(tmp_path)
    local = "only local paths and gs://bucket/... work: mount the bucket"
    assert local in refused(config(home), workdir)
    assert local in refused(config(home, model="s3://bucket/m"), tmp_path / "w")
    rows = DataConfig(path=("gs://bucket/rows.jsonl",))
    assert "only local paths work" in refused(config(home, data=rows), tmp_path / "w")
    with pytest.raises(errors.UserError, match="only local paths and gs"):
        write_model(workdir, tiny.config(), ())
    assert not list(tmp_path.iterdir())


# --- the data ----------------------------------------------------------------------------------


def test_data_that_fails_in_the_middle(home, tmp_path):
    """The steps before it are saved. Once the file is repaired the run continues after them."""
    data = tiny.write_data(tmp_path / "data", rows=8)
    broken = tmp_path / "data" / "6.png"  # of the fourth batch
    good = broken.read_bytes()
    broken.write_bytes(b"<html>")
    c = config(home, save_every=100)
    strict = dataclasses.replace(c.data, path=(str(data),), max_broken=0.0)
    c = dataclasses.replace(c, data=strict)
    message = refused(c, tmp_path / "w")
    assert "6.png: is a web page" in message and message.endswith("step 3 is saved")
    broken.write_bytes(good)
    seen = []
    train(c, tmp_path / "w", on_metrics=lambda r: seen.append(r["step"]))
    assert seen == [4, 5, 6]
