"""What goes wrong around a run: each has one behaviour, and a line that says what was kept."""

import dataclasses
import json
from pathlib import Path

import pytest
import tiny
from safetensors.numpy import load_file

from minigpt4_jax import errors
from minigpt4_jax.training.config import DataConfig, TrainConfig
from minigpt4_jax.training.loop import train


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


def harm(checkpoint: Path) -> None:
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
    harm(checkpoints / "00000004")
    seen = []
    train(config(home), tmp_path / "w", on_metrics=lambda r: seen.append(r["step"]))
    lines = capsys.readouterr().out.splitlines()
    (said,) = [line for line in lines if "damaged" in line]
    assert said.startswith(f"checkpoint {checkpoints / '00000004'} is damaged (")
    assert "kept as damaged-00000004; continuing from the one before, of step 2" in said
    assert seen == [3, 4, 5, 6]
    assert outcome(tmp_path / "w") == uninterrupted
    assert (checkpoints / "damaged-00000004").is_dir()


def test_no_whole_checkpoint_is_left(home, tmp_path):
    with pytest.raises(Crash):
        train(config(home), tmp_path / "w", on_metrics=crash_at(3))
    log = (tmp_path / "w" / "metrics.jsonl").read_bytes()
    harm(tmp_path / "w" / "checkpoints" / "00000002")
    message = refused(config(home), tmp_path / "w")
    assert f"every checkpoint in {tmp_path / 'w' / 'checkpoints'} is damaged (00000002: " in message
    assert "remove that folder to begin the run anew" in message
    assert (tmp_path / "w" / "metrics.jsonl").read_bytes() == log


# --- the data ----------------------------------------------------------------------------------


def test_data_that_fails_in_the_middle(home, tmp_path):
    """The steps before it are saved; once it is mended the run goes on behind them."""
    data = tiny.write_data(tmp_path / "data", rows=8)
    broken = tmp_path / "data" / "6.png"  # of the fourth batch
    good = broken.read_bytes()
    broken.write_bytes(b"<html>")
    c = config(home, save_every=100)
    c = dataclasses.replace(c, data=dataclasses.replace(c.data, path=(str(data),)))
    message = refused(c, tmp_path / "w")
    assert "6.png: is a web page" in message and message.endswith("step 3 is saved")
    broken.write_bytes(good)
    seen = []
    train(c, tmp_path / "w", on_metrics=lambda r: seen.append(r["step"]))
    assert seen == [4, 5, 6]
