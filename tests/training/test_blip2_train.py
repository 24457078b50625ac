"""Both stages of BLIP-2 through `train`: losses fall, models load, export and go on."""

import json

import numpy as np
import pytest
from helpers import blip2_reference as reference
from helpers.blip2_reference import NEEDS_BLIP2
from PIL import Image

import minigpt4_jax
from convert.export import export
from minigpt4_jax.checkpoint.model_directory import Tensors
from minigpt4_jax.errors import UserError

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


def run(model, rows, workdir, **changes):
    config = {
        "model": str(model), "data": {"path": str(rows), "val_path": str(rows), "flip": True},
        "freeze_qformer": False, "dtype": "float32", "steps": 4, "batch_size": 4,
        "warmup_steps": 0, "init_lr": 1e-3, "eval_every": 4, "sample_every": 4, "sample_images": 1,
        "sample_tokens": 4, "save_every": 4,
    }  # fmt: skip
    losses = []
    result = minigpt4_jax.train(
        config | changes, workdir, on_metrics=lambda m: losses.append(m.get("loss"))
    )
    return result, [loss for loss in losses if loss is not None]


@pytest.mark.parametrize("name", ["pretrain", "opt", "flant5"])
def test_train_and_export(name, rows, tmp_path):
    base = reference.build(name, tmp_path)
    result, losses = run(base, rows, tmp_path / "run")
    assert losses[-1] < losses[0]
    assert np.isfinite(result.metrics["val_loss"])
    trained, old = Tensors(result.model), Tensors(base)
    changed = {n.split(".")[0] for n in trained if not np.array_equal(trained[n], old[n])}
    assert changed == {"qformer", "ln_vision"} | ({"projection"} if name != "pretrain" else set())
    assert minigpt4_jax.load(result.model, "float32").caption(reference.pictures()[0])

    export(
        result.model, tmp_path / "trained.pth"
    )  # LAVIS' names, which the same command reads back
    variant, arguments = reference.BUILDS[name]
    again = reference.build_from(
        variant, arguments | {"checkpoint": tmp_path / "trained.pth"}, tmp_path / "again"
    )
    for key, value in Tensors(again).items():
        np.testing.assert_array_equal(value, trained[key], err_msg=key)


def test_stage2_starts_from_stage1(rows, tmp_path):
    stage1 = reference.build("pretrain", tmp_path)
    stage2 = reference.build_from(
        "blip2-opt", {"qformer": stage1, "llm": "opt", "vision": reference.VIT}, tmp_path / "stage2"
    )
    _, losses = run(stage2, rows, tmp_path / "run", steps=1, eval_every=0, sample_every=0)
    assert np.isfinite(losses).all()


def test_a_configuration_for_another_model(rows, tmp_path):
    base = reference.build("opt", tmp_path)
    with pytest.raises(UserError, match="this configuration is for blip2-flant5"):
        run(base, rows, tmp_path / "run", variant="blip2-flant5")
