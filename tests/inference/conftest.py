"""Fixtures for tests of the Python interface."""

import pytest
from helpers import tiny

import minigpt4_jax


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model directory with small random weights; tests do not change it."""
    return tiny.write_random_model(
        tmp_path_factory.mktemp("api") / "model", max_text_length=12, llm_layers=1
    )


@pytest.fixture(scope="session")
def model(folder):
    """The model in `folder`."""
    return minigpt4_jax.load(folder, dtype="float32")
