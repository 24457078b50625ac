"""convert build: inputs given by their Hugging Face id, downloaded from a server on this machine."""

import os
import subprocess
import sys

import pytest
from helpers.gguf_files import write_gguf
from helpers.hub_server import files_in, hub_server
from helpers.released_files import llm_config, llm_state

from minigpt4_jax.checkpoint.model_directory import Tensors, read_model_json


@pytest.fixture
def hub(tmp_path):
    with hub_server(tmp_path / "cache") as server:
        yield server


def published(hub, files, repo="org/tiny"):
    """Publish the small language model; returns the commit."""
    return hub.publish(
        repo, files_in(files.folder / "llm") | {"README.md": b"readme", "x.msgpack": b"x"}
    )


def test_a_language_model_by_id(hub, files, command):
    commit = published(hub, files)
    local, downloaded = files.folder / "local", files.folder / "downloaded"
    assert command(*files.arguments("minigpt4-vicuna", local))[0] == 0
    code, _, err = command(*files.arguments("minigpt4-vicuna", downloaded, llm="org/tiny"))
    assert code == 0, err
    assert hub.downloaded() == sorted(files_in(files.folder / "llm"))
    expected, found = Tensors(local), Tensors(downloaded)
    assert set(found) == set(expected)
    assert all((found[name] == expected[name]).all() for name in found)

    document, reference = read_model_json(downloaded), read_model_json(local)
    assert document.keys() == reference.keys() and document["config"] == reference["config"]
    sources = document["sources"]
    assert sources["llm"]["hub"].startswith(f"hf://org/tiny@{commit}")
    assert sources["tokenizer"]["hub"] == f"hf://org/tiny@{commit}"
    assert sources["llm"].get("sha256") == reference["sources"]["llm"].get("sha256")
    assert "hub" not in sources["vision"]
    code, out, _ = command("inspect", downloaded)
    assert code == 0 and f"hf://org/tiny@{commit}" in out


def test_the_other_inputs_by_id(hub, files, command):
    names = {"vision": "eva.pth", "qformer": "blip2.pth", "checkpoint": "a.pth"}
    commit = hub.publish("org/parts", {n: (files.folder / n).read_bytes() for n in names.values()})
    published(hub, files, "org/words")
    ids = {option: f"org/parts@main/{name}" for option, name in names.items()}
    code, _, err = command(*files.arguments("minigpt4-vicuna", tokenizer="org/words", **ids))
    assert code == 0, err
    sources = read_model_json(files.folder / "model_a")["sources"]
    for option, name in names.items():
        assert sources[option]["hub"] == f"hf://org/parts@{commit}/{name}"
    weights = [name for name in hub.downloaded() if name.endswith((".bin", ".safetensors"))]
    assert weights == []  # of the tokenizer's repository


def test_a_gguf_file_by_its_type(hub, files, command, tmp_path):
    config = llm_config()
    path = tmp_path / "x.gguf"
    write_gguf(path, config, llm_state(config))
    commit = hub.publish("org/gguf", {"m-F32.gguf": path.read_bytes(), "m-Q4_0.gguf": b"GGUF"})
    code, _, err = command(*files.arguments("minigpt4-vicuna", llm="org/gguf:F32"))
    assert code == 0, err
    assert hub.downloaded() == ["m-F32.gguf"]
    llm = read_model_json(files.folder / "model_a")["sources"]["llm"]
    assert llm["hub"] == f"hf://org/gguf@{commit}/m-F32.gguf"


@pytest.mark.parametrize(
    "path", ["./x", "./org/x", "../x", "/nowhere/x", "x.gguf", "weights/x.gguf", "x"]
)
def test_a_path_that_does_not_exist_is_not_asked_for_on_the_hub(hub, files, refused, path):
    line = refused(*files.arguments("minigpt4-vicuna", llm=path))
    assert "does not exist, and is not a Hugging Face model id (ORG/NAME" in line
    assert hub.requests == []


def test_in_a_process_of_its_own(hub, files, tmp_path):
    """The environment variables of huggingface_hub; one line and exit code 2 where it fails."""
    published(hub, files)
    variables = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}

    def build(hub_id, **changes):
        arguments = files.arguments("minigpt4-vicuna", tmp_path / "out", llm=hub_id)
        environment = {**os.environ, **variables, **changes}
        command = [sys.executable, "-m", "convert", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    def refusal(hub_id, **changes):
        done = build(hub_id, **changes)
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert len(lines) == 1 and not (tmp_path / "out").exists()
        return lines[0]

    # other refusals, without a process: tests/storage/test_hub.py
    assert "HF_HUB_OFFLINE forbids" in refusal("org/tiny", HF_HUB_OFFLINE="1")
    assert hub.requests == []
    done = build("org/tiny")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "home/hub/models--org--tiny").is_dir()
