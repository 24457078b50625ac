"""Fixtures for tests of `python -m minigpt4_jax.chat`."""

import argparse
import io
import sys

import pytest
from helpers import model_calls, tiny
from helpers.chat_command import arguments
from PIL import Image

from minigpt4_jax import errors
from minigpt4_jax.cli import chat, common


@pytest.fixture(scope="session")
def chat_home(tmp_path_factory):
    """A folder with a small random model, model/, and an image of 40 x 30 pixels, a.png."""
    folder = tmp_path_factory.mktemp("chat")
    tiny.write_random_model(folder / "model")
    Image.fromarray(model_calls.picture(0)).save(folder / "a.png")
    return folder


@pytest.fixture(scope="session")
def loaded_models():
    """Options of loading -> the model that they name, loaded once."""
    return {}


@pytest.fixture
def chat_command(capsys, monkeypatch, loaded_models):
    """chat_command(*arguments) -> (exit code, stdout, stderr) of `python -m minigpt4_jax.chat`."""
    load_model = common.load_model

    def load_once(args: argparse.Namespace):
        options = (args.model, args.dtype, args.quantize, args.kv_cache, args.exif)
        if options not in loaded_models:
            loaded_models[options] = load_model(args)
        return loaded_models[options]

    monkeypatch.setattr(common, "load_model", load_once)

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            errors.run(lambda: chat.main([str(a) for a in arguments]))
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return run


@pytest.fixture
def chat_piped(chat_command, chat_home, monkeypatch):
    """chat_piped(text, *arguments) -> as chat_command, with this text on stdin."""

    def run(text, *more):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        return chat_command(*arguments(chat_home, "--temperature=0", *more))

    return run
