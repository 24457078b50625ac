"""Fixtures for tests of `python -m minigpt4_jax.chat`."""

import io
import sys
from functools import cache

import pytest
from helpers import model_calls, tiny
from helpers.chat_command import arguments
from PIL import Image

from minigpt4_jax import errors
from minigpt4_jax.cli import chat
from minigpt4_jax.inference import loading


@pytest.fixture(scope="session")
def chat_home(tmp_path_factory):
    """A folder with a small random model, model/, and an image of 40 x 30 pixels, a.png."""
    folder = tmp_path_factory.mktemp("chat")
    tiny.write_random_model(folder / "model", llm_layers=1)
    Image.fromarray(model_calls.picture(0)).save(folder / "a.png")
    return folder


@pytest.fixture(scope="session")
def loaded_models():
    """Arguments of `begin_loading` -> what it returned, with a model that is loaded once."""
    return {}


@pytest.fixture
def chat_command(capsys, monkeypatch, loaded_models):
    """chat_command(*arguments) -> (exit code, stdout, stderr) of `python -m minigpt4_jax.chat`."""
    begin_loading = loading.begin_loading

    def begin_once(*args: object, **options: object) -> loading.Loading:
        key = (args, tuple(sorted(options.items())))
        if key not in loaded_models:
            begun = begin_loading(*args, **options)
            loaded_models[key] = begun._replace(finish=cache(begun.finish))
        return loaded_models[key]

    monkeypatch.setattr(loading, "begin_loading", begin_once)

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
