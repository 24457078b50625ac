"""What goes wrong around a run: each has one behaviour, and a line that says what was kept."""

import dataclasses
from pathlib import Path

import pytest
import tiny

from minigpt4_jax import errors
from minigpt4_jax.training.config import DataConfig, TrainConfig
from minigpt4_jax.training.loop import train


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
