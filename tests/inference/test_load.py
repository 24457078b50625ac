"""minigpt4_jax.load: the cache of compiled programs, and directories that are no models."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers.user_errors import refused

import minigpt4_jax


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "model")


def test_load_keeps_compiled_programs_on_disk(folder, tmp_path):
    """In the folder of the variable, unless that is "off" or the user has set one up."""
    program = (
        "import sys, jax, minigpt4_jax\n"
        "minigpt4_jax.load(sys.argv[1])\n"
        "print(jax.config.jax_compilation_cache_dir)"
    )
    own = str(tmp_path / "own")
    for variables, expected in (
        ({"MINIGPT4_JAX_CACHE": str(tmp_path)}, str(tmp_path / "xla-")),
        ({"MINIGPT4_JAX_CACHE": "off"}, "None"),
        ({"MINIGPT4_JAX_CACHE": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": own}, own),
    ):
        environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        done = subprocess.run(
            [sys.executable, "-c", program, folder],
            env=environment | variables, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.startswith(expected)


def test_not_a_model_directory(tmp_path):
    line = refused(minigpt4_jax.load, tmp_path)
    assert str(tmp_path) in line and "not a model directory" in line and "convert build" in line
    assert "not a model directory" in refused(minigpt4_jax.load, tmp_path / "absent")
    (tmp_path / "file").write_text("")
    assert "file" in refused(minigpt4_jax.load, tmp_path / "file")


def test_an_unknown_chat_template_is_told_before_the_weights_are_read(copy):
    document = json.loads((copy / "model.json").read_text())
    document["config"]["chat_template"] = "moon"
    (copy / "model.json").write_text(json.dumps(document))
    for path in copy.glob("*.safetensors"):
        path.write_bytes(b"")
    assert "template 'moon' is not known; known are vicuna0" in refused(minigpt4_jax.load, copy)


def test_unknown_dtype(folder):
    line = refused(minigpt4_jax.load, folder, "float16")
    assert "float16" in line and "float32, bfloat16" in line


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_weights(copy, share):
    path = copy / "llm-00001.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    line = refused(minigpt4_jax.load, copy)
    assert path.name in line and "damaged" in line and "convert the model again" in line


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', "<html>"])
def test_damaged_document(copy, text):
    (copy / "model.json").write_text(text)
    assert "model.json is damaged" in refused(minigpt4_jax.load, copy)


def test_documents_that_do_not_fit_the_files(copy):
    document = json.loads((copy / "model.json").read_text())

    def line(**changes):
        (copy / "model.json").write_text(json.dumps(document | changes))
        return refused(minigpt4_jax.load, copy)

    assert "format 9" in line(format=9)
    assert "'new'" in line(config=document["config"] | {"new": 1})
    assert "minigpt5" in line(config=document["config"] | {"variant": "minigpt5"})
    assert "does not exist" in line(base="../gone")
    assert "is a cycle" in line(base=".")
    wider = document["config"]["llm"] | {"ffn": 48}
    message = line(config=document["config"] | {"llm": wider})
    assert str(copy) in message and "llm.blocks.0.mlp.up.weight" in message


def test_missing_files(copy):
    projection = copy / "projection-00001.safetensors"
    data = projection.read_bytes()
    projection.unlink()
    message = refused(minigpt4_jax.load, copy)
    assert str(copy) in message and "projection.weight: missing" in message
    shutil.rmtree(copy / "tokenizer")
    projection.write_bytes(data)
    assert "has no tokenizer/" in refused(minigpt4_jax.load, copy)
