"""A run that is given more steps, or other keys that do not change what is computed."""

import dataclasses
import functools
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from helpers import tiny

from minigpt4_jax import errors
from minigpt4_jax.data.config import DataConfig
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.optimizer import make_schedule
from minigpt4_jax.training.preemption import Stopped
from minigpt4_jax.training.trainer import Trainer, train

pytestmark = pytest.mark.usefixtures("quick_compilation", "traced_steps")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("extend")
    tiny.write_model(folder / "model")
    tiny.write_data(folder / "data", rows=7)
    data = DataConfig(path=(str(folder / "data" / "rows.jsonl"),))
    fields = {
        "steps": 3, "batch_size": 2, "init_lr": 0.01, "warmup_steps": 1, "dtype": "float32",
        "save_every": 2, "log_every": 1,
        "max_text_length": 12,  # batches of one width: each width is a program
    }  # fmt: skip
    return TrainConfig(model=str(folder / "model"), data=data, **fields)


def records(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def refused(c: TrainConfig, workdir: Path) -> str:
    with pytest.raises(errors.UserError) as e:
        train(c, workdir)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("finished") / "w"
    train(config, workdir)
    return workdir


@pytest.fixture
def workdir(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "w"))


def test_more_steps_extend_a_finished_run(config, workdir, capsys):
    before = records(workdir)
    longer = dataclasses.replace(config, steps=5)
    result = train(longer, workdir)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "extended from 3 to 5 steps: the cosine schedule now spans all 5 steps"
    )
    assert any(line.startswith("continuing at step 3") for line in lines)
    assert result.steps == 5
    after = records(workdir)
    assert after[:3] == before and [r["step"] for r in after] == [1, 2, 3, 4, 5]
    schedule = make_schedule(longer)
    assert [r["lr"] for r in after[3:]] == [schedule(3), schedule(4)]
    training = json.loads((workdir / "model" / "model.json").read_text())["sources"]["training"]
    assert training["steps"] == 5
    called = []
    train(longer, workdir, on_metrics=called.append)
    assert not called and "is done" in capsys.readouterr().out
    assert "steps: 5 -> 3, which may only grow" in refused(config, workdir)


def test_an_unfinished_run_is_extended_too(config, tmp_path):
    class Crash(Exception):
        pass

    def crash(record):
        if record["step"] == 3:
            raise Crash

    with pytest.raises(Crash):
        train(config, tmp_path / "w", on_metrics=crash)
    train(dataclasses.replace(config, steps=4), tmp_path / "w")
    assert [r["step"] for r in records(tmp_path / "w")] == [1, 2, 3, 4]


def test_a_finished_run_without_checkpoints_is_not_started_again(config, workdir):
    shutil.rmtree(workdir / "checkpoints")
    before = (workdir / "config.json").read_bytes()
    message = refused(dataclasses.replace(config, steps=5), workdir)
    assert "its checkpoints are gone, so it cannot be extended to 5" in message
    assert str(workdir / "model") in message
    assert (workdir / "config.json").read_bytes() == before
    train(config, workdir)  # still finished


def test_other_keys_may_change_and_are_named(config, workdir, capsys):
    longer = dataclasses.replace(config, steps=4, keep=1, save_every=1, log_every=2)
    train(longer, workdir)
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0]
        == "changed since the last start: keep: 3 -> 1; log_every: 1 -> 2; save_every: 2 -> 1"
    )
    assert [p.name for p in (workdir / "checkpoints").iterdir()] == ["00000004"]


def test_a_start_that_saves_nothing_leaves_the_run_as_it_was(config, workdir, monkeypatch, capsys):
    """Neither a typing error in `steps` that is noticed at once nor damage ends the possibilities."""
    before = (workdir / "config.json").read_bytes()
    longer = dataclasses.replace(config, steps=10**6, keep=2)
    stop = functools.partial(os.kill, os.getpid(), signal.SIGINT)
    monkeypatch.setattr(Trainer, "_log_start", lambda _: stop())
    with pytest.raises(Stopped):
        train(longer, workdir)
    assert (workdir / "config.json").read_bytes() == before
    for folder in (workdir / "checkpoints").iterdir():
        for path in folder.rglob("*"):
            if path.is_file():
                path.write_bytes(b"?")
    message = refused(longer, workdir)
    assert "is damaged" in message and "start the run again" not in message
    assert f"train {workdir / 'model'}, which the run has finished, further" in message
    assert (workdir / "config.json").read_bytes() == before
    capsys.readouterr()
    assert train(config, workdir).steps == 3 and "is done" in capsys.readouterr().out


def test_paths_may_be_written_in_another_way(config, workdir, monkeypatch, capsys):
    home = Path(config.model).parent
    monkeypatch.chdir(home)
    shutil.copytree(home / "model", home / "moved", dirs_exist_ok=True)
    data = dataclasses.replace(config.data, path=("data/../data/rows.jsonl",))
    other = dataclasses.replace(config, model="moved/", data=data)
    train(other, workdir)
    assert capsys.readouterr().out.splitlines()[0] == (
        f"changed since the last start: model: '{home / 'model'}' -> 'moved/'"
    )
    shutil.copy(home / "data" / "rows.jsonl", home / "data" / "copy.jsonl")
    data = dataclasses.replace(data, path=("data/copy.jsonl",))
    message = refused(dataclasses.replace(other, data=data), workdir)
    assert f"data.path: ['{home}/data/rows.jsonl'] -> ['data/copy.jsonl']" in message
    tiny.write_model(home / "other", seed=1)
    message = refused(dataclasses.replace(config, model="other"), workdir)
    assert "started with other weights than other holds now (its model was" in message


def test_more_steps_do_not_excuse_other_changes(config, workdir):
    message = refused(dataclasses.replace(config, steps=9, init_lr=0.5), workdir)
    assert "(init_lr: 0.01 -> 0.5)" in message
