"""Benchmarks during training: scores in the log, the best model kept."""

import json
import signal
from dataclasses import replace

import pytest
from helpers import benchmark_layouts, tiny

import minigpt4_jax
from minigpt4_jax.data.config import DataConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.training import benchmarks
from minigpt4_jax.training.config import EvalConfig, TrainConfig
from minigpt4_jax.training.logs import read_metrics

pytestmark = pytest.mark.usefixtures("traced_steps")

TASKS = ("gqa", "hm")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train-benchmarks")
    tiny.write_model(folder / "model", llm_layers=1)
    tiny.write_data(folder / "rows")
    benchmark_layouts.write_all(folder / "data")
    return folder


def config(home, **choices):
    choice = EvalConfig(TASKS, str(home / "data"), every=2, limit=2, best="gqa")
    return TrainConfig(
        str(home / "model"), data=DataConfig(path=(str(home / "rows" / "rows.jsonl"),)),
        steps=4, batch_size=2, dtype="float32", save_every=2, warmup_steps=0, mesh="data:1",
        eval=replace(choice, **choices), max_text_length=12,
    )  # fmt: skip


def scores_of(workdir):
    """Step -> the scores of metrics.jsonl."""
    return {
        r["step"]: {k: v for k, v in r.items() if k.startswith("eval/")}
        for r in read_metrics(workdir)
        if any(k.startswith("eval/") for k in r)
    }


@pytest.fixture
def improving(monkeypatch):
    """The score of gqa is that of the list at every evaluation."""
    values = []
    run = benchmarks.run_task

    def changed(model, task, *args, **options):
        scores = run(model, task, *args, **options)
        return scores | ({"score": values.pop(0)} if task.name == "gqa" and values else {})

    monkeypatch.setattr(benchmarks, "run_task", changed)
    return values


def test_scores_are_logged_and_the_best_model_is_kept(home, tmp_path, improving):
    improving += [50.0, 40.0]
    result = minigpt4_jax.train(config(home), tmp_path)
    assert scores_of(tmp_path) == {
        2: {"eval/gqa": 50.0, "eval/hm": 0.0}, 4: {"eval/gqa": 40.0, "eval/hm": 0.0}
    }  # fmt: skip
    assert result.metrics["eval/gqa"] == 40.0
    best = json.loads((tmp_path / "best" / "model.json").read_text())["sources"]["training"]
    assert (best["steps"], best["gqa"]) == (2, 50.0)
    minigpt4_jax.load(tmp_path / "best").generate(None, ["hello"], max_new_tokens=1)
    written = json.loads((tmp_path / "eval" / "000004" / "hm" / "scores.json").read_text())
    assert written["rows"] == 2 and written["per_row"][0]["question"].startswith("This is an image")
    assert any((tmp_path / "tensorboard").iterdir())


def test_a_stop_during_benchmarks_leaves_them_for_the_next_start(home, tmp_path, monkeypatch):
    run = benchmarks.Benchmarks._run

    def stopped(self, model, task):
        signal.raise_signal(signal.SIGTERM)
        return run(self, model, task)

    monkeypatch.setattr(benchmarks.Benchmarks, "_run", stopped)
    with pytest.raises(SystemExit):
        minigpt4_jax.train(config(home), tmp_path)
    assert scores_of(tmp_path) == {}
    monkeypatch.setattr(benchmarks.Benchmarks, "_run", run)
    minigpt4_jax.train(config(home), tmp_path)
    assert list(scores_of(tmp_path)) == [2, 4]


def test_training_does_not_depend_on_benchmarks(home, tmp_path):
    with_benchmarks = minigpt4_jax.train(config(home, every=0), tmp_path / "a")
    without = minigpt4_jax.train(replace(config(home), eval=EvalConfig()), tmp_path / "b")
    assert list(scores_of(tmp_path / "a")) == [4]
    assert with_benchmarks.metrics["loss"] == without.metrics["loss"]
    assert not (tmp_path / "a" / "eval" / "000002").exists()


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"root": ""}, "config.eval.root is ''"),
        ({"root": "/nowhere"}, r"config.eval: root=/nowhere: there is no such directory"),
        ({"benchmarks": ("gqua",)}, "did you mean gqa"),
        ({"best": "pope"}, "config.eval.best is 'pope': expected one of gqa, hm"),
        ({"limit": 0}, "config.eval.limit is 0"),
    ],
)
def test_mistakes_end_a_run_before_it_starts(home, tmp_path, choices, message):
    with pytest.raises(UserError, match=message):
        minigpt4_jax.train(config(home, **choices), tmp_path / "run")
    assert not (tmp_path / "run").exists()
