"""The demo command: which models it opens, and examples."""

import json
import sys

import pytest
from PIL import Image

from minigpt4_jax.cli import demo, serve
from minigpt4_jax.errors import UserError
from minigpt4_jax.serving.ui.examples import demonstration_examples, read_examples


@pytest.fixture
def started(monkeypatch, tmp_path):
    """The arguments that `serve` was started with."""
    calls = []
    monkeypatch.setattr(serve, "main", lambda argv: calls.append(argv) or 0)
    monkeypatch.chdir(tmp_path)
    return calls


def test_demonstrations_that_have_not_been_made(started):
    with pytest.raises(UserError, match="make quickstart"):
        demo.main([])
    assert not started


def test_the_demonstration_that_has_been_made(started, tmp_path):
    folder = tmp_path / "quickstart/stage2/model"
    folder.mkdir(parents=True)
    (folder / "model.json").write_text("{}")
    demo.main(["--port=0"])
    options = ["--port=0", "--model=quickstart/stage2/model", "--served-name=quickstart", "--ui"]
    assert started == [["--repetition_penalty=1", *options]]


def test_a_model_of_the_user(started):
    demo.main(["--model=somewhere"])
    assert started == [["--model=somewhere", "--ui"]]


def test_examples_of_a_file(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    path = tmp_path / "examples.jsonl"
    path.write_text(json.dumps({"image": "a.png", "question": "what?"}) + "\n\n")
    assert read_examples(path) == [(tmp_path / "a.png", "what?")]
    path.write_text('{"image": "a.png"}\n')
    with pytest.raises(UserError, match=r'examples.jsonl:1: expected \{"image": FILE'):
        read_examples(path)
    assert demonstration_examples(str(tmp_path)) == []


def test_examples_need_the_page():
    with pytest.raises(UserError, match="add --ui"):
        serve.main(["--model=/nowhere", "--examples=x.jsonl"])


def test_a_missing_package_of_the_page_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"pip install 'minigpt4_jax\[demo\]'"):
        serve.main(["--model=/nowhere", "--ui"])
