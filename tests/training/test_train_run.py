"""Whole runs of a tiny model: their output, and the errors of wrong input."""

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny
from safetensors.numpy import load_file

import minigpt4_jax
from minigpt4_jax import errors
from minigpt4_jax.checkpoint import model_directory
from minigpt4_jax.checkpoint.writer import write_model
from minigpt4_jax.cli import train as command
from minigpt4_jax.data.config import DataConfig
from minigpt4_jax.data.json_records import read_sources
from minigpt4_jax.processing.chat_templates import fill_template
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.trainer import train

pytestmark = pytest.mark.usefixtures("traced_steps")

PROMPT = "<Img><ImageHere></Img> What is it?"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    tiny.write_model(folder / "model")
    tiny.write_data(folder / "data", rows=7)
    tiny.write_data(folder / "held_out", rows=3, seed=1)
    return folder


def config(home, **changes) -> TrainConfig:
    data = DataConfig(path=(str(home / "data" / "rows.jsonl"),), prompts=(PROMPT,))
    fields = {
        "steps": 4, "batch_size": 2, "init_lr": 0.01, "warmup_steps": 1, "dtype": "float32",
        "save_every": 2, "log_every": 2, "eval_every": 2, "sample_every": 4, "sample_tokens": 4,
        "sample_images": 2, "end_symbol": "\n", "max_text_length": 12,
    }  # fmt: skip
    c = TrainConfig(model=str(home / "model"), data=data, **fields)
    return dataclasses.replace(c, **changes)


def with_data(c: TrainConfig, **changes) -> TrainConfig:
    return dataclasses.replace(c, data=dataclasses.replace(c.data, **changes))


@pytest.fixture(scope="module")
def finished(home):
    """A run with validation data, and what it printed."""
    c = with_data(config(home), val_path=(str(home / "held_out" / "rows.jsonl"),))
    result = train(c, home / "w")
    return result, home / "w"


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics(finished):
    result, workdir = finished
    steps = [r for r in records(workdir / "metrics.jsonl") if "loss" in r]
    held_out = [r for r in records(workdir / "metrics.jsonl") if "val_loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4]
    assert [r["step"] for r in held_out] == [2, 4]
    assert [r["lr"] for r in steps[:2]] == [1e-6, pytest.approx(0.0085365, rel=1e-3)]
    assert all(r["grad_norm"] > 0 and r["tokens"] > 0 for r in steps)
    assert "examples_per_second" in steps[3]
    assert result.metrics["loss"] == steps[-1]["loss"]
    assert result.metrics["val_loss"] == held_out[-1]["val_loss"] < held_out[0]["val_loss"]


def test_trained_model_is_a_model_directory_on_its_base(home, finished):
    result, workdir = finished
    assert result.model == workdir / "model"
    files = sorted(p.name for p in result.model.iterdir())
    assert files == ["model.json", "projection-00001.safetensors"]
    c = model_directory.read_config(result.model)
    assert (c.end_symbol, c.max_text_length) == ("\n", 12)
    assert c.prompt_template == model_directory.read_config(home / "model").prompt_template
    before, after = model_directory.Tensors(home / "model"), model_directory.Tensors(result.model)
    changed = {n for n in after if (after[n] != before[n]).any()}
    assert changed == {"projection.weight", "projection.bias"}


def test_validation_loss_is_what_the_written_model_scores(home, finished):
    result, workdir = finished
    model = minigpt4_jax.load(result.model, "float32")
    rows = read_sources(str(home / "held_out" / "rows.jsonl"))
    prompt = fill_template(model.config.prompt_template, PROMPT)
    nll, tokens = model.score(
        [r.images[0] for r in rows], [prompt] * len(rows), [r.answers[0] for r in rows]
    )
    assert nll.sum() / tokens.sum() == pytest.approx(result.metrics["val_loss"], rel=1e-5)
    samples = records(workdir / "samples.jsonl")
    assert [(s["step"], s["prompt"]) for s in samples] == [(4, prompt)] * 2
    texts = model.generate([s["image"] for s in samples], [prompt] * 2, max_new_tokens=4)
    assert [s["text"] for s in samples] == texts


def test_other_files_of_a_run(finished):
    _, workdir = finished
    assert (workdir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (workdir / "checkpoints").glob("0*")) == ["00000002", "00000004"]
    (events,) = (workdir / "tensorboard").iterdir()
    data = events.read_bytes()
    assert all(tag in data for tag in (b"loss", b"val_loss", b"lr", b"samples/0.png"))
    left = {p.name for p in workdir.iterdir()}
    assert left == {
        "checkpoints", "config.json", "loss.png", "metrics.jsonl", "model", "samples",
        "samples.jsonl", "tensorboard",
    }  # fmt: skip


def test_a_second_stage_starts_from_the_first_ones_model(home, finished, tmp_path):
    result, _ = finished
    c = config(home, model=str(result.model), steps=2, max_text_length=0, end_symbol="")
    second = train(c, tmp_path / "w2")
    assert model_directory.read_config(second.model).end_symbol == "\n"
    first = load_file(result.model / "projection-00001.safetensors")
    then = load_file(second.model / "projection-00001.safetensors")
    moved = np.abs(then["projection.weight"] - first["projection.weight"])
    assert 0 < moved.max() < 0.03
    assert minigpt4_jax.load(second.model, "float32").config.variant == "minigpt4-vicuna"


# --- refusals ----------------------------------------------------------------------------------


def refused(c: TrainConfig, workdir: Path) -> str:
    with pytest.raises(errors.UserError) as e:
        train(c, workdir)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_nothing_is_written_when_the_input_is_wrong(home, tmp_path):
    w, good = tmp_path / "w", config(home)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    (tmp_path / "lost.jsonl").write_text('{"image": "no.png", "caption": "x"}\n')
    assert "no_model" in refused(dataclasses.replace(good, model=str(tmp_path / "no_model")), w)
    assert "no.jsonl" in refused(with_data(good, path=(str(tmp_path / "no.jsonl"),)), w)
    assert "the dataset is empty" in refused(with_data(good, path=(str(empty),)), w)
    assert "no.png" in refused(with_data(good, path=(str(tmp_path / "lost.jsonl"),)), w)
    assert "no.jsonl" in refused(with_data(good, val_path=(str(tmp_path / "no.jsonl"),)), w)
    message = refused(dataclasses.replace(good, variant="minigpt4-llama2"), w)
    assert "is a minigpt4-vicuna model" in message and "stage2:llama2" in message
    assert "width 24" in refused(dataclasses.replace(good, llm_width=5120), w)
    assert not w.exists()


def test_another_run_is_not_continued(home, finished, tmp_path):
    _, workdir = finished
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
    good = with_data(config(home), val_path=(str(home / "held_out" / "rows.jsonl"),))
    message = refused(dataclasses.replace(good, init_lr=0.02, seed=3), workdir)
    assert "init_lr: 0.01 -> 0.02; seed: 42 -> 3" in message
    other = tiny.write_model(tmp_path / "other", seed=1)
    message = refused(dataclasses.replace(good, model=str(other)), workdir)
    assert f"with other weights than {other} holds now (its model was {good.model}" in message
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*")} == before


def test_changed_weights_are_not_continued(home, tmp_path):
    model = tiny.write_model(tmp_path / "model")
    c = config(home, model=str(model), steps=2)
    train(c, tmp_path / "w")
    write_model(
        model, tiny.config(), model_directory.Tensors(tiny.write_model(tmp_path / "m1", seed=1)).items(),
        overwrite=True,
    )  # fmt: skip
    tiny_tokenizer = model / "tokenizer"
    tiny_tokenizer.mkdir()
    for path in tiny.TOKENIZER.iterdir():
        (tiny_tokenizer / path.name).write_bytes(path.read_bytes())
    assert "started with other weights" in refused(c, tmp_path / "w")


def test_workdir_that_cannot_be_written(home, tmp_path):
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refused(config(home), tmp_path / "file" / "w")
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "config.json").write_text("{")
    assert "damaged" in refused(config(home), tmp_path / "w")
    (tmp_path / "w" / "config.json").write_text("[]")
    assert "choose another --workdir" in refused(config(home), tmp_path / "w")


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(home, tmp_path):
    c = config(home, steps=9, init_lr=1e38, min_lr=1e38, warmup_lr=0.0, warmup_steps=3)
    message = refused(c, tmp_path / "w")
    assert message.startswith("step 3: ") and "not finite" in message
    assert "the last good checkpoint, of step 2, is kept" in message
    assert [p.name for p in (tmp_path / "w" / "checkpoints").glob("0*")] == ["00000002"]
    assert [r["step"] for r in records(tmp_path / "w" / "metrics.jsonl")] == [1, 2]
    assert not (tmp_path / "w" / "model").exists()
    assert refused(c, tmp_path / "w") == message  # started again, it ends there again


def test_full_disk(home, tmp_path):
    """On a file system of a few hundred KiB; needs the right to mount one."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(small)]
    if os.name != "posix" or os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system")
    try:
        message = refused(config(home, steps=40, save_every=1, keep=40), small / "w")
        assert "the disk is full" in message
        assert not (small / "w" / "model").exists()
        assert not list(small.rglob("*tmp*"))
        subprocess.run(["mount", "-o", "remount,size=20m", str(small)], check=True)
        train(config(home, steps=40, save_every=1, keep=40), small / "w")
        steps = [r["step"] for r in records(small / "w" / "metrics.jsonl")]
        assert steps == list(range(1, 41))
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


# --- the command -------------------------------------------------------------------------------


def run_command(*args: str) -> int:
    with pytest.raises(SystemExit) as e:
        errors.run(lambda: command.main(args))
    return e.value.code


def test_help_lists_configs_and_keys(capsys):
    assert run_command("--help") == 0
    text = capsys.readouterr().out
    assert "finetune" in text and "stage2" in text
    assert "data.path = []" in text and "batch_size = 12" in text


def test_bad_command_is_one_line_and_exit_code_2(capsys, tmp_path):
    w = f"--workdir={tmp_path / 'w'}"
    assert run_command("--config=stage2", w, "--config.batch_size=0") == 2
    assert run_command("--config=stage2", w, "--config.bach_size=4") == 2
    assert run_command("--config=finetune", w, "--config.model=no", "--config.data.path=d") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("error: ") for line in lines)
    assert "did you mean config.batch_size?" in lines[1]
    assert not (tmp_path / "w").exists()
