"""Fixtures for tests of downloads."""

import pytest
from helpers.hub_server import hub_server

from minigpt4_jax.storage import hub as hub_module


@pytest.fixture
def hub(tmp_path):
    with hub_server(tmp_path / "cache") as server:
        yield server


@pytest.fixture
def offline(monkeypatch):
    """Calling it sets HF_HUB_OFFLINE, as in a new process."""
    from huggingface_hub import constants

    def switch():
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        hub_module._model_directory.cache_clear()

    return switch
