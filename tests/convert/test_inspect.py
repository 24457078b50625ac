"""convert inspect: what a user reads about a model directory."""

import hashlib
import json

import numpy as np
import pytest

from minigpt4_jax.checkpoint.model_directory import Tensors, read_config
from minigpt4_jax.checkpoint.writer import write_model


@pytest.mark.smoke
def test_table_and_json(files, command):
    assert command(*files.arguments("minigpt-v2"))[0] == 0
    model = files.folder / "model_c"
    code, table, err = command("inspect", model)
    assert code == 0, err
    digest = hashlib.sha256((files.folder / "c.pth").read_bytes()).hexdigest()
    for words in ("minigpt-v2", "rank 2, alpha 16, on q, v", "vocabulary 785", "bos 1, eos 2",
                  "'[INST] {} [/INST]'", "'</s>'", digest, str(files.folder / "eva.pth"),
                  "16 px, patch 2, 2 blocks, width 16, 2 heads", "tokenizer.model"):  # fmt: skip
        assert words in table, words
    code, text, _ = command("inspect", model, "--json")
    found = json.loads(text)
    t = Tensors(model)
    assert found["parameters"] == sum(t[n].size for n in t)
    assert found["bytes"] == sum(t[n].nbytes for n in t)
    assert found["parts"]["lora"]["parameters"] == sum(t[n].size for n in t if ".lora_" in n)
    assert found["parts"]["llm"]["dtypes"] == ["float16"]
    assert found["parts"]["projection"]["source"]["sha256"] == digest
    assert found["config"] == json.loads(json.dumps(read_config(model).to_dict()))


def test_a_training_result_names_its_base(files, command):
    assert command(*files.arguments("minigpt4-vicuna", checkpoint=None))[0] == 0
    base, trained = files.folder / "model_a", files.folder / "run"
    assert "new projection, not trained" in command("inspect", base)[1]
    t = Tensors(base)
    changed = {n: t[n] + np.float32(1) for n in ("projection.weight", "projection.bias")}
    sources = {"training": {"base": str(base), "steps": 7}}
    write_model(trained, read_config(base), changed.items(), base=base, sources=sources)
    table = command("inspect", trained)[1]
    assert f"trained part of {base}" in table and "steps 7" in table
    found = json.loads(command("inspect", trained, "--json")[1])
    assert found["parts"]["projection"]["source"]["note"] == "trained here"
    assert found["parts"]["vit"]["source"]["file"] == str(files.folder / "eva.pth")
    assert found["parameters"] == sum(t[n].size for n in t)


def test_refusals(refused, tmp_path):
    assert "not a model directory" in refused("inspect", tmp_path)
    (tmp_path / "model.json").write_text("{")
    assert "damaged" in refused("inspect", tmp_path)
