"""Both stages of BLIP-2 through `train`: losses fall, models load, export and go on."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers import blip2_reference as reference
from helpers import chat_families, released_files, virtual_devices
from helpers.blip2_reference import NEEDS_BLIP2
from helpers.chat_families import FAMILIES
from PIL import Image

import minigpt4_jax
from configs import stage2
from convert.build import build
from convert.build_plan import BuildRequest
from convert.export import export
from minigpt4_jax.checkpoint.model_directory import Tensors
from minigpt4_jax.errors import UserError

torch = pytest.importorskip("torch")
pytestmark = NEEDS_BLIP2
CAPTIONS = ["a red dog", "a small black cat", "two men and a woman", "a pizza with cheese"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    lines = []
    for i, pixels in enumerate(reference.pictures()[:4]):
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "caption": CAPTIONS[i]}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


def values_of_run(model, rows, **changes):
    return {
        "model": str(model), "data": {"path": str(rows), "val_path": str(rows), "flip": True},
        "freeze_qformer": False, "dtype": "float32", "steps": 4, "batch_size": 4,
        "warmup_steps": 0, "init_lr": 1e-3, "eval_every": 4, "sample_every": 4, "sample_images": 1,
        "sample_tokens": 4, "save_every": 4,
    } | changes  # fmt: skip


def run(model, rows, workdir, **changes):
    """(what `train` returns, the metrics of its steps)"""
    records = []
    values = values_of_run(model, rows, **changes)
    result = minigpt4_jax.train(values, workdir, on_metrics=records.append)
    return result, [record for record in records if "loss" in record]


@pytest.fixture(scope="module")
def stage1_base(tmp_path_factory):
    """A model for stage 1 whose Q-Former has the first two of the checkpoint's four layers, one with
    cross-attention and one without: a training step compiles in half the time."""
    folder = tmp_path_factory.mktemp("stage1_base")
    variant, arguments = reference.BUILDS["pretrain"]
    checkpoint = torch.load(reference.CHECKPOINTS / arguments["checkpoint"], weights_only=True)
    weights = checkpoint["model"]
    checkpoint["model"] = {
        name: weights[name] for name in weights if not re.search(r"encoder\.layer\.[23]\.", name)
    }
    torch.save(checkpoint, folder / "two_layers.pth")
    arguments = arguments | {"checkpoint": folder / "two_layers.pth"}
    return reference.build_from(variant, arguments, folder / "model")


@pytest.fixture(scope="module")
def of_stage1(rows, stage1_base, tmp_path_factory):
    """(result, metrics, configuration) of a run of stage 1 on two captions of each image."""
    lines, folder = rows.read_text().splitlines(), tmp_path_factory.mktemp("stage1")
    twice = rows.parent / "twice.jsonl"
    twice.write_text("\n".join([*lines, *(line.replace("a ", "the ") for line in lines)]))
    data = {"path": str(twice), "val_path": str(rows), "image_ids": True}
    values = values_of_run(stage1_base, rows, data=data)
    return *run(stage1_base, rows, folder / "run", data=data), values


@pytest.mark.parametrize("name", ["pretrain", "opt", "flant5"])
def test_train_and_export(name, rows, stage1_base, of_stage1, tmp_path):
    base = stage1_base if name == "pretrain" else reference.shared(name)
    if name == "pretrain":
        result, records, _ = of_stage1
        terms = [r["loss_itc"] + r["loss_itm"] + r["loss_lm"] for r in records]
        assert terms == pytest.approx([r["loss"] for r in records])
    else:
        result, records = run(base, rows, tmp_path / "run")
    assert records[-1]["loss"] < records[0]["loss"]
    assert np.isfinite(result.metrics["val_loss"])
    trained, old = Tensors(result.model), Tensors(base)
    changed = {n.split(".")[0] for n in trained if not np.array_equal(trained[n], old[n])}
    assert changed == {"qformer", "ln_vision"} | ({"projection"} if name != "pretrain" else set())
    assert minigpt4_jax.load(result.model, "float32").caption(reference.pictures()[0], num_beams=1)

    export(
        result.model, tmp_path / "trained.pth"
    )  # LAVIS' names, which the same command reads back
    variant, arguments = reference.BUILDS[name]
    again = reference.build_from(
        variant, arguments | {"checkpoint": tmp_path / "trained.pth"}, tmp_path / "again"
    )
    for key, value in Tensors(again).items():
        np.testing.assert_array_equal(value, trained[key], err_msg=key)


def test_stage1_on_two_devices(rows, of_stage1, tmp_path):
    """The losses of a run are those of one device, also after updates: rows of all devices are contrasted,
    and negatives drawn among them."""
    _, expected, values = of_stage1
    values |= {"mesh": "data:2", "eval_every": 0, "sample_every": 0}
    (tmp_path / "values.json").write_text(json.dumps(values))
    script = (
        "import json, sys, minigpt4_jax as m; m.train(json.load(open(sys.argv[1])), sys.argv[2])"
    )
    command = [sys.executable, "-c", script, tmp_path / "values.json", tmp_path / "two"]
    done = subprocess.run(
        command, env=virtual_devices.environment(2), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    for a, b in zip(map(json.loads, found), expected, strict=True):
        for name in ("loss", "loss_itc", "loss_itm", "loss_lm", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-5), name


def test_stage2_starts_from_stage1(rows, tmp_path):
    stage1 = reference.shared("pretrain")
    stage2 = reference.build_from(
        "blip2-opt", {"qformer": stage1, "llm": "opt", "vision": reference.VIT}, tmp_path / "stage2"
    )
    _, records = run(stage2, rows, tmp_path / "run", steps=1, eval_every=0, sample_every=0)
    assert np.isfinite([record["loss"] for record in records]).all()


def chat_model(folder):
    """A small chat model with its own template, and BLIP-2's Q-Former and vision encoder."""
    tokenizer = chat_families.write_tokenizer(folder / "tokenizer", FAMILIES["smollm2"])
    config = released_files.llm_config(vocab_size=400, max_position_embeddings=256)
    llm = released_files.save_hf(
        folder / "llm", config, released_files.llm_state(config), tokenizer
    )
    qformer = reference.CHECKPOINTS / "blip2_pretrained_flant5.pth"
    build(BuildRequest(
        variant="minigpt4-vicuna", llm=llm, qformer=qformer, vision=reference.VIT,
        out=folder / "model", settings=reference.HEADS,
    ))  # fmt: skip
    return folder / "model"


@pytest.mark.parametrize("name", ["opt", "flant5", "chat"])
def test_minigpt4s_second_stage(name, rows, tmp_path):
    """The same configuration trains the projection of BLIP-2 and of another chat model."""
    base = chat_model(tmp_path) if name == "chat" else reference.shared(name)
    config = stage2.get_config("any")
    config.update({
        "model": str(base), "data": {"path": str(rows)}, "steps": 3, "batch_size": 4,
        "warmup_steps": 0, "init_lr": 1e-2, "dtype": "float32", "eval_every": 0, "sample_every": 0,
    })  # fmt: skip
    losses = []
    result = minigpt4_jax.train(
        config, tmp_path / "run", on_metrics=lambda m: losses.append(m["loss"])
    )
    assert losses[-1] < losses[0]
    trained, old = Tensors(result.model), Tensors(base)
    changed = {n.split(".")[0] for n in trained if not np.array_equal(trained[n], old[n])}
    assert changed == {"projection"}


def test_a_configuration_for_another_model(rows, tmp_path):
    base = reference.shared("opt")
    with pytest.raises(UserError, match="this configuration is for blip2-flant5"):
        run(base, rows, tmp_path / "run", variant="blip2-flant5")
    with pytest.raises(UserError, match=r"data\.image_ids is for blip2-qformer"):
        run(base, rows, tmp_path / "run", data={"path": str(rows), "image_ids": True})
    with pytest.raises(UserError, match="rows of blip2-flant5 cannot be packed"):
        run(
            reference.shared("flant5"), rows, tmp_path / "run",
            data={"path": str(rows), "pack_tokens": 64},
        )  # fmt: skip
