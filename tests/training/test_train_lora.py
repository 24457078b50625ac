"""Training adapters: new ones on a model without, their dropout, on quantized weights; refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny

import minigpt4_jax
from minigpt4_jax.checkpoint import model_directory
from minigpt4_jax.checkpoint.loader import load_model
from minigpt4_jax.checkpoint.parameters import parameter_shapes
from minigpt4_jax.checkpoint.quantized_tensors import quantize_tensors
from minigpt4_jax.checkpoint.writer import write_model
from minigpt4_jax.config import LoraConfig
from minigpt4_jax.data.config import DataConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.models.minigpt import Batch
from minigpt4_jax.training import optimizer
from minigpt4_jax.training.config import LoraChoice, TrainConfig
from minigpt4_jax.training.model_config import read_model_config
from minigpt4_jax.training.train_step import make_evaluation, make_step, split_model, trained_parts
from minigpt4_jax.training.trainer import train

PARTS = trained_parts(freeze_vit=True, freeze_qformer=True)
pytestmark = pytest.mark.usefixtures("traced_steps")

CHOICE = LoraChoice(rank=2, targets=("q", "down"), dropout=0.3)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    tiny.write_random_model(folder / "plain")
    tiny.write_data(folder / "data", rows=6)
    c = tiny.config()
    c = dataclasses.replace(c, quantize="int8")
    tensors = model_directory.Tensors(folder / "plain")
    rounded = quantize_tensors(((n, tensors[n]) for n in tensors), "int8")
    files = {p.name: p for p in tiny.TOKENIZER.iterdir()}
    write_model(folder / "int8", c, rounded, tokenizer=files)
    return folder


def config(home, model="plain", **changes) -> TrainConfig:
    fields = {
        "model": str(home / model), "data": DataConfig(path=(str(home / "data" / "rows.jsonl"),)),
        "lora": CHOICE, "steps": 4, "batch_size": 2, "init_lr": 0.05, "warmup_steps": 0,
        "dtype": "float32", "save_every": 2, "max_text_length": 12,
    }  # fmt: skip
    return TrainConfig(**(fields | changes))


@pytest.fixture(scope="module")
def finished(home):
    return train(config(home), home / "w")


def test_new_adapters_are_trained_and_used(home, finished):
    c = model_directory.read_config(finished.model)
    assert c.lora == LoraConfig(rank=2, alpha=16.0, dropout=0.3, targets=("q", "down"))
    t = model_directory.Tensors(finished.model)
    trained = {n for n in t if ".lora_" in n}
    shapes = {n: s for n, s in parameter_shapes(c).items() if ".lora_" in n}
    assert trained == set(shapes) and len(shapes) == 8
    assert all(np.abs(t[n]).max() > 0.01 for n in trained)
    images, answers = [str(home / "data" / "0.png")], ["a red square"]
    with_lora, _ = minigpt4_jax.load(finished.model).score(images, [None], answers)
    merged, _ = minigpt4_jax.load(finished.model, merge_lora=True).score(images, [None], answers)
    np.testing.assert_allclose(merged, with_lora, rtol=1e-5)
    for n in trained:
        if n.endswith("lora_b"):
            assert t[n].any()


def test_the_same_seed_gives_the_same_adapters_and_another_others(home):
    """Before any step: A from the seed, B zero."""
    lora = LoraConfig(rank=2, targets=("q", "v"))
    first = [
        load_model(home / "plain", lora=lora, seed=s)[0].llm.blocks.attn.q.lora_a[...]
        for s in (1, 1, 2)
    ]
    np.testing.assert_array_equal(first[0], first[1])
    assert np.abs(first[0] - first[2]).max() > 0.01
    assert np.abs(first[0][0] - first[0][1]).max() > 0.01  # nor are its layers alike


def test_a_run_that_stopped_goes_on_with_the_same_masks(home, finished, monkeypatch):
    """Bit for bit the run that did not stop."""
    whole = model_directory.Tensors(finished.model)

    def stop(record):
        if record["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config(home), home / "stopped", on_metrics=stop)
    again = model_directory.Tensors(train(config(home), home / "stopped").model)
    for name in again:
        np.testing.assert_array_equal(again[name], whole[name])


def test_adapters_learn_on_quantized_weights(home):
    result = train(config(home, "int8", steps=2, save_every=2), home / "q")
    t = model_directory.Tensors(result.model)
    assert all(t[n].any() for n in t if n.endswith("lora_b"))
    assert model_directory.read_config(result.model).quantize == "int8"


def test_a_quantized_encoder_is_refused_before_anything_is_written(home):
    with pytest.raises(UserError, match="int8, so vit cannot be trained"):
        train(config(home, "int8", freeze_vit=False), home / "none")
    assert not (home / "none").exists()


def test_a_choice_that_does_not_fit_is_refused(home, finished):
    def of(model, **choice):
        return read_model_config(config(home, model, lora=LoraChoice(**choice))).lora

    with pytest.raises(UserError, match=r"lora.alpha is given.*has no LoRA.*lora.rank"):
        of("plain", alpha=8.0)
    assert of("plain") is None
    own = of(finished.model)
    assert own == of(finished.model, rank=2, targets=("down", "q"))
    assert of(finished.model, dropout=0.0) == dataclasses.replace(own, dropout=0.0)
    for wrong in ({"rank": 3}, {"alpha": 1.0}, {"targets": ("q",)}):
        with pytest.raises(UserError, match=f"config.lora.{next(iter(wrong))} is"):
            of(finished.model, **wrong)
    with pytest.raises(UserError, match="w unknown"):
        of("plain", rank=2, targets=("w",))


def row(rng) -> Batch:
    """One row of twelve tokens, the last four labelled."""
    tokens = rng.integers(3, 785, (1, 12)).astype(np.int32)
    tokens[:, 1:4] = -1
    answers = np.arange(8, 12, dtype=np.int32)[None]
    pixels = rng.normal(size=(1, 1, 28, 28, 3)).astype(np.float32)
    return Batch(pixels, tokens, np.array([12], np.int32), answers)


def split_of(home, lora):
    """(a split of the plain model with these adapters, values of them that matter)"""
    model, _ = load_model(home / "plain", lora=lora)
    split = split_model(model, PARTS, jnp.dtype("float32"))
    rng = np.random.default_rng(0)
    return split, {
        n: rng.normal(0, 0.3, a.shape).astype(np.float32) if "lora_b" in n else np.asarray(a)
        for n, a in split.trainable.items()
    }


def losses(split, start, batch, indices, **options) -> list[float]:
    """Of steps with these numbers, each from the start."""
    tx = optimizer.adamw(split.decay_mask)
    step, found = make_step(split, tx, mesh=None, **options), []
    for i in indices:
        params = jax.tree.map(jnp.asarray, start)
        args = (split.frozen, batch, np.float32(0), np.int32(i))
        found.append(float(step(params, tx.init(params), *args)[2].loss))
    return found


def test_dropout_is_by_step_and_micro_batch_and_off_in_evaluation(home):
    split, start = split_of(home, LoraConfig(rank=2, dropout=0.5))
    one = row(np.random.default_rng(0))
    total, count = make_evaluation(split, mesh=None)(start, split.frozen, one)
    on = losses(split, start, one, [0, 1, 0], dropout_seed=7, dropout_in=["lora"])
    assert on[0] == on[2] and abs(on[0] - on[1]) > 1e-4 and abs(on[0] - total / count) > 1e-4
    two = jax.tree.map(
        lambda a: np.repeat(a, 2, 0), one
    )  # the same row in each of two micro-batches
    both = losses(split, start, two, [0], dropout_seed=7, dropout_in=["lora"], accumulate=2)
    assert abs(both[0] - on[0]) > 1e-4


def test_the_frozen_qformer_has_no_dropout_beside_that_of_lora(home):
    split, start = split_of(home, LoraConfig(rank=2, dropout=0.0))
    one = row(np.random.default_rng(0))
    total, count = make_evaluation(split, mesh=None)(start, split.frozen, one)
    on = losses(split, start, one, [0], dropout_seed=7, dropout_in=["lora"])
    assert on[0] == pytest.approx(float(total / count), rel=1e-6)
