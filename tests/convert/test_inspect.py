"""convert inspect: what a user reads about a model directory."""

import ast
import dataclasses
import hashlib
import json
import re
import shlex
import shutil

import numpy as np
import pytest
from flax import nnx
from helpers import chat_families, tiny
from helpers.released_files import CHECKPOINTS

from convert.chat_format import tokenizer_format
from convert.inspect import describe
from convert.usage import QUESTION, commands, describe_usage
from minigpt4_jax.aot.presets import PRESETS
from minigpt4_jax.checkpoint.loader import load_model
from minigpt4_jax.checkpoint.model_directory import Tensors, read_config, tokenizer_dir
from minigpt4_jax.checkpoint.writer import write_model
from minigpt4_jax.cli import batch, chat
from minigpt4_jax.cli.common import check_kind
from minigpt4_jax.inference.instructblip_model import InstructBlipModel
from minigpt4_jax.inference.qformer_model import QFormerModel
from minigpt4_jax.processing.chat_templates import with_images
from minigpt4_jax.processing.sequences import build_row
from minigpt4_jax.processing.tokenizer import load_tokenizer
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.config_cli import read_config_file
from minigpt4_jax.training.model_config import read_model_config


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


@pytest.mark.parametrize("variant, letter", CHECKPOINTS.items())
def test_usage_of_the_originals_formats(files, command, variant, letter):
    assert command(*files.arguments(variant))[0] == 0
    model = files.folder / f"model_{letter}"
    config = read_config(model)
    usage = json.loads(command("inspect", model, "--json")[1])["usage"]
    tokenizer = load_tokenizer(tokenizer_dir(model))
    template, places = usage["template"], config.visual_tokens
    assert template["ids"].count(-1) == places
    image = template["ids"].index(-1)
    before, after = template["prompt"].split("<ImageHere>")
    assert template["ids"][:image] == tokenizer.encode(before, bos=True)
    assert template["ids"][image + places :] == tokenizer.encode(after)
    row = build_row(
        tokenizer, config, template.get("training_prompt", template["prompt"]), "red", images=1
    )
    prompt_ids = template.get("training_ids", template["ids"])
    assert row.tokens[: len(prompt_ids)] == prompt_ids
    assert template["end"] == config.end_symbol and template["end_ids"]
    table = command("inspect", model)[1]
    assert f"[IMAGE x {places}]" in table and repr(template["prompt"]) in table
    assert "training_prompt" not in template or repr(template["training_prompt"]) in table


@pytest.mark.parametrize("family", ["llama3", "mistral v3", "zephyr"])
def test_usage_of_a_tokenizers_own_template(tmp_path, command, family):
    model = tiny.write_model(tmp_path / "model")
    folder = model / "tokenizer"
    shutil.rmtree(folder)
    chat_families.write_tokenizer(folder, chat_families.FAMILIES[family])
    hf = load_tokenizer(folder, "hf")
    fields = {"kind": "hf", "bos_id": hf.bos_id, "eos_id": hf.eos_id, "pad_id": hf.pad_id}
    document = json.loads((model / "model.json").read_text())
    document["config"]["tokenizer"] |= fields | {"chat_template": True}
    document["config"] |= tokenizer_format(hf)
    (model / "model.json").write_text(json.dumps(document))
    template = json.loads(command("inspect", model, "--json")[1])["usage"]["template"]
    assert template["name"] == "tokenizer" and "training_prompt" not in template
    rendered = hf.apply_chat_template(
        [{"role": "user", "content": with_images(QUESTION, 1)}], add_generation_prompt=True
    )
    assert template["prompt"] == rendered
    assert [i for i in template["ids"] if i >= 0] == [
        i for text in rendered.split("<ImageHere>") for i in hf.encode(text)
    ]


@pytest.mark.parametrize("dtype, quantize", [("float32", None), ("bfloat16", None),
                                             ("bfloat16", "int8"), ("bfloat16", "int4")])  # fmt: skip
def test_memory_is_what_loading_takes(tmp_path, dtype, quantize):
    model = tiny.write_model(tmp_path / "model")
    module, config = load_model(model, dtype, stacked=False, quantize=quantize)
    loaded = sum(leaf.get_value().nbytes for _, leaf in nnx.to_flat_state(nnx.state(module)))
    memory = describe(model)["usage"]["memory"][quantize or dtype]
    assert memory["weights"] == loaded
    size = 4 if dtype == "float32" else 2
    llm = config.llm
    assert memory["cache_per_1000_tokens"] == 2000 * llm.layers * llm.kv_heads * llm.head_dim * size


def test_a_quantized_model_has_one_precision(files, command):
    assert command(*files.arguments("minigpt4-llama2"), "--quantize=int8")[0] == 0
    usage = json.loads(command("inspect", files.folder / "model_b", "--json")[1])["usage"]
    assert list(usage["memory"]) == ["int8"]


def test_commands_can_be_copied(tmp_path, command):
    folder = tmp_path / "it's a model"
    tiny.write_model(folder)
    table = command("inspect", folder)[1]
    commands = json.loads(command("inspect", folder, "--json")[1])["usage"]["commands"]
    for name, line in commands.items():
        assert line in table
        module, *arguments = shlex.split(line)[2:]
        option = "--config.model" if name == "train" else "--model"
        assert f"{option}={folder}" in arguments and module == f"minigpt4_jax.{name}"
    assert str(chat.parse(shlex.split(commands["chat"])[3:]).model) == str(folder)
    assert batch.parse(shlex.split(commands["batch"])[3:]).prompt == QUESTION


def test_a_missing_tokenizer_is_noted(tmp_path, command):
    model = tiny.write_model(tmp_path / "model")
    shutil.rmtree(model / "tokenizer")
    code, table, err = command("inspect", model)
    assert code == 0 and "cannot be rendered" in table and "no tokenizer/" in table, err


def test_refusals(refused, tmp_path):
    assert "not a model directory" in refused("inspect", tmp_path)
    (tmp_path / "model.json").write_text("{")
    assert "damaged" in refused("inspect", tmp_path)


def kinds_of_models():
    t5 = PRESETS["blip2-flant5xl"]
    instructed = dataclasses.replace(t5.qformer, vocab=30523, max_positions=512)
    bare = dataclasses.replace(PRESETS["blip2-stage1"].qformer, lm_head=False, itc_width=0)
    return {
        "minigpt4": PRESETS["vicuna7b"],
        "blip2-flant5": t5,
        "instructblip": dataclasses.replace(t5, variant="instructblip-flant5", qformer=instructed),
        "stage1": PRESETS["blip2-stage1"],
        "stage1 without heads": dataclasses.replace(PRESETS["blip2-stage1"], qformer=bare),
    }


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("minigpt4", ["chat", "batch", "train"]),
        ("blip2-flant5", ["chat", "batch", "train"]),
        ("instructblip", ["chat", "batch", "python"]),
        ("stage1", ["compare", "caption", "train"]),
        ("stage1 without heads", ["train"]),
    ],
)
def test_commands_are_those_that_a_kind_of_model_can_do(tmp_path, kind, names):
    config, model = kinds_of_models()[kind], tmp_path / "it's one"
    model.mkdir()
    (model / "model.json").write_text(
        json.dumps({"format": 1, "config": dataclasses.asdict(config)})
    )
    lines = commands(model, config)
    assert list(lines) == names
    methods = dir(QFormerModel if config.is_stage1 else InstructBlipModel)
    for name, line in lines.items():
        _, option, *arguments = shlex.split(line)
        settings = dict(word.split("=", 1) for word in arguments[1:] if "=" in word)
        if option == "-c":
            path, method = re.search(r"load\((.*?)\)\.(\w+)\(", arguments[0]).groups()
            ast.parse(arguments[0])
            assert ast.literal_eval(path) == str(model) and method in methods
        elif name == "train":
            values = read_config_file(settings["--config"])
            c = TrainConfig(model=settings["--config.model"], variant=values.get("variant", ""))
            assert read_model_config(c).variant == config.variant
        else:
            check_kind(settings["--model"])


def test_a_model_without_a_language_model_has_no_prompt(tmp_path):
    usage = describe_usage(tmp_path, PRESETS["blip2-stage1"])
    assert "has no language model" in usage["template"]["error"]
    assert list(usage["memory"]) == ["float32", "bfloat16"]
