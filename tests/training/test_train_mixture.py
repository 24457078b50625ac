"""A run on a mixture with broken rows, which are counted in the log, and its exact continuation."""

import json

import pytest
from helpers import tiny

from minigpt4_jax.errors import UserError
from minigpt4_jax.training.trainer import train


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    tiny.write_model(folder / "model")
    for name in ("one", "two"):
        tiny.write_data(folder / name, rows=5)
    (folder / "two" / "3.png").write_bytes(b"<html>")
    return folder


def values(home, **data):
    one = {"reader": "files", "path": str(home / "one" / "rows.jsonl"), "ratio": 2, "batch_size": 2}
    two = {"reader": "files", "path": "two/rows.jsonl", "batch_size": 3}
    return {
        "model": str(home / "model"), "steps": 7, "init_lr": 0.01, "warmup_steps": 2, "keep": 2,
        "dtype": "float32", "save_every": 3, "log_every": 1, "end_symbol": "\n",
        "max_text_length": 12,
        "data": {"mix": {"one": one, "two": two}, "root": str(home), "pad_tokens": 48,
                 "max_broken": 0.5, **data},
    }  # fmt: skip


def metrics(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    drop = ("examples_per_second",)
    return [{k: v for k, v in json.loads(line).items() if k not in drop} for line in lines]


class Crash(Exception):
    pass


@pytest.mark.slow
def test_a_mixture_is_trained_and_continued(home, capsys):
    train(values(home), home / "whole")
    out = capsys.readouterr().out
    whole = metrics(home / "whole")
    assert "rows skipped (" in out and "two: image " in out
    assert whole[-1]["skipped"] >= 1

    def crash(record):
        if record["step"] == 5:
            raise Crash

    with pytest.raises(Crash):
        train(values(home), home / "torn", on_metrics=crash)
    train(values(home), home / "torn")
    assert metrics(home / "torn") == whole


def test_no_broken_row_is_allowed(home):
    with pytest.raises(UserError, match=r"two: image .*3\.png: is a web page"):
        train(values(home, max_broken=0.0), home / "strict")
