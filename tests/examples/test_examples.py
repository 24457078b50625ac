"""The scripts in examples/ run on a tiny model, as a user starts them."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from helpers import blip2_reference, tiny
from helpers.blip2_reference import NEEDS_BLIP2
from helpers.paths import ROOT

from minigpt4_jax.data.datasets import DATASETS

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model in model/ and six images with rows.jsonl in data/."""
    folder = tmp_path_factory.mktemp("examples")
    tiny.write_model(folder / "model", llm_layers=1)
    tiny.write_data(folder / "data", rows=6)
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Run an example with arguments in that folder; returns what it prints."""

    def run_example(name: str, *args: str) -> str:
        monkeypatch.chdir(folder)
        model = () if "--model" in args else ("--model", "model")
        monkeypatch.setattr(sys, "argv", [name, *args, *model])
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return run_example


def test_caption_folder(run):
    lines = [json.loads(line) for line in run("caption_folder.py", "data").splitlines()]
    assert [Path(line["image"]).name for line in lines] == [f"{n}.png" for n in range(6)]
    assert all(isinstance(line["caption"], str) for line in lines)


def test_chat_two_images(run):
    output = run("chat_two_images.py", "data/0.png", "data/1.png")
    assert output.count("> ") >= 3


def test_finetune(run, folder):
    output = run(
        "finetune.py",
        "data/rows.jsonl",
        "--workdir",
        "run",
        "--steps",
        "2",
        "--image",
        "data/0.png",
    )
    assert "2 steps, loss " in output
    assert (folder / "run" / "model" / "model.json").is_file()


def test_finetune_says_what_is_wrong(run):
    with pytest.raises(SystemExit, match=r"error: .*nowhere\.jsonl"):
        run("finetune.py", "nowhere.jsonl", "--workdir", "other")


def test_rank_answers(run):
    output = run("rank_answers.py", "data/0.png", "What colour is it?", "red", "green", "blue")
    losses = [float(line.split()[0]) for line in output.splitlines()]
    assert len(losses) == 3 and losses == sorted(losses)


def test_add_dataset(run, folder):
    lines = [f"{n}.png,bird {n}" for n in range(6)]
    (folder / "data" / "labels.csv").write_text("\n".join(["file,label", *lines, "5.png,"]) + "\n")
    try:
        output = run("add_dataset.py", "data", "--workdir", "birds", "--steps", "2")
    finally:
        DATASETS.pop("birds", None)
    assert Path(folder, output.splitlines()[-1], "model.json").is_file()


@NEEDS_BLIP2
def test_retrieval(run, folder):
    rows = [{"image": f"{n}.png", "caption": [f"a {n} dog", "two men"]} for n in range(6)]
    (folder / "karpathy.json").write_text(json.dumps(rows))
    model = str(blip2_reference.shared("pretrain"))
    output = run(
        "retrieval.py", "karpathy.json", "--images", "data", "--model", model, "--k-test=3"
    )
    shares = {name: float(value) for name, value in map(str.split, output.splitlines()[-9:])}
    assert shares["text_r1"] <= shares["text_r5"] <= shares["text_r10"] <= 100.0
    assert shares["image_r10"] == 100.0 and 0 < shares["mean"] <= 100.0


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda p: p.stem)
def test_examples_are_short_and_say_how_to_run_them(script):
    text = script.read_text()
    assert 20 <= len(text.splitlines()) <= 50
    assert f"python examples/{script.name}" in text
