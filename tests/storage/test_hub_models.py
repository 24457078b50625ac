"""Model directories given by their Hugging Face id."""

import pytest
from helpers import tiny
from helpers.hub_server import files_in
from helpers.user_errors import refused

from minigpt4_jax.checkpoint import model_directory
from minigpt4_jax.checkpoint.parameters import parameter_shapes
from minigpt4_jax.checkpoint.writer import write_model
from minigpt4_jax.storage.hub import fetch_checkpoint, fetch_model_directory


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("tiny") / "model")


def test_load_by_id(hub, offline, tiny_model):
    from minigpt4_jax import load

    needed = files_in(tiny_model)
    others = {"README.md": b"x", "optimizer.bin": b"y", "checkpoints/1/x.safetensors": b"z"}
    hub.publish("org/tiny", needed | others)
    model = load("org/tiny", "float32")
    assert hub.downloaded() == sorted(needed)
    assert model.config == model_directory.read_config(tiny_model)
    offline()
    hub.requests.clear()
    again = load("org/tiny", "float32")
    assert again.tokenizer.vocab_size == model.tokenizer.vocab_size and hub.requests == []


def test_a_model_trained_from_an_id_names_the_commit_as_its_base(
    hub, offline, tiny_model, tmp_path
):
    commit = hub.publish("org/tiny", files_in(tiny_model))
    config = model_directory.read_config(tiny_model)
    name = "projection.bias"
    trained = {name: model_directory.Tensors(tiny_model)[name] + 1}
    out = write_model(tmp_path / "run", config, trained.items(), base="org/tiny")
    assert model_directory.read_model_json(out)["base"] == f"hf://org/tiny@{commit}"

    hub.publish("org/tiny", files_in(tiny_model) | {"model.json": b"{}"})  # main moves on
    hub.publish("org/tuned", files_in(out))
    assert [p.name for p in model_directory.model_chain(out)] == ["run", commit]
    tensors = model_directory.Tensors("org/tuned")
    assert set(tensors) == set(parameter_shapes(config))
    assert (tensors[name] == trained[name]).all()
    offline()
    assert model_directory.tokenizer_dir("org/tuned").parent.name == commit


def test_a_model_directory_among_the_inputs_of_build(hub, tiny_model):
    """Recognized by its model.json, also where a directory of transformers may be given."""
    hub.publish("org/tiny", (needed := files_in(tiny_model)) | {"README.md": b"x"})
    assert files_in(fetch_checkpoint("--qformer", "org/tiny", ("vocab.txt",))) == needed


def test_a_base_that_is_not_there_any_more(hub, tiny_model, tmp_path):
    hub.publish("org/tiny", files_in(tiny_model))
    config = model_directory.read_config(tiny_model)
    out = write_model(tmp_path / "run", config, [], base="org/tiny")
    path = out / "model.json"
    path.write_text(path.read_text().replace("hf://org/tiny@", "hf://org/gone@"))
    assert "no such model on" in refused(model_directory.model_chain, out)


def test_a_cached_copy_of_a_model_directory_that_is_incomplete(hub, offline, tiny_model):
    hub.publish("org/tiny", files_in(tiny_model))
    hub.failing.add("tokenizer/tokenizer.model")
    refused(fetch_model_directory, "org/tiny")
    offline()
    assert "is incomplete" in refused(fetch_model_directory, "org/tiny")
