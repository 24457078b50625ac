"""Four AdamW steps of the original, from its checkpoints to its final parameters."""

import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.paths import REFERENCE
from helpers.reference_models import CASES, NEEDS_DUMPS, build_model

from minigpt4_jax.checkpoint import model_directory
from minigpt4_jax.checkpoint.loader import load_model
from minigpt4_jax.data.batching import pad_sequences
from minigpt4_jax.models.minigpt import Batch
from minigpt4_jax.processing.sequences import build_row
from minigpt4_jax.processing.tokenizer import load_tokenizer
from minigpt4_jax.training import optimizer
from minigpt4_jax.training.train_step import make_step, split_model, trained_parts

DUMPS = REFERENCE / "dumps"

pytestmark = NEEDS_DUMPS

# The dump's rates say it: warmup over 2 of 4 steps from 1e-6 to 1e-3, then a cosine down to 1e-4.
RATES = {"init_lr": 1e-3, "min_lr": 1e-4, "warmup_lr": 1e-6, "warmup_steps": 2, "steps": 4}


FIRST = {"a": "promptlist", "b": "promptlist", "c": "instr"}  # forward pass of the batch trained on


def dumped_batch(case, model_dir, config) -> Batch:
    """The two samples of the dump, with the prompt that was drawn for them."""
    text = json.loads((DUMPS / f"{case}_forward_{FIRST[case]}.json").read_text())
    tokenizer = load_tokenizer(model_directory.tokenizer_dir(model_dir), config.tokenizer.kind)
    answers = text["samples"]["answer"]
    prompts = [(text["extra"] or {}).get("prompt")] * len(answers)
    if case == "c":  # each row has an instruction of its own, without the template
        asked = text["samples"]["instruction_input"]
        prompts = [config.prompt_template.replace("{}", prompt) for prompt in asked]
    rows = [
        build_row(tokenizer, config, prompt, answer, images=1)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    pixels = np.load(DUMPS / f"{case}_pixels.npz")["pixel_values"]
    pixels = pixels.transpose(0, 2, 3, 1)[:, None]
    return Batch(pixels, *pad_sequences(rows, tokenizer.pad_id))


# When the dump's training began, the gradient of the forward dump made just before was still in
# place: its first step used the sum of both. The three after it are as they should be.
LEFT_OVER = {"a": "instr", "b": "promptlist", "c": "textonly"}


def loaded(model_dir):
    """(split with projection and LoRA trained, configuration)"""
    model, config = load_model(model_dir, "float32")
    parts = trained_parts(freeze_vit=True, freeze_qformer=True)
    return split_model(model, parts, jnp.dtype("float32")), config


@cache
def first_gradient(case):
    """(split, configuration, batch, its loss, gradient) of a model before training"""
    split, config = loaded(build_model(case))
    batch = dumped_batch(case, build_model(case), config)
    loss = jax.jit(jax.value_and_grad(lambda p: split.join(p, split.frozen).loss(batch)))
    value, grads = loss(split.trainable)
    return split, config, batch, float(value), jax.tree.map(np.asarray, grads)


def theirs(dump, name):
    """Their array of a name, layers stacked as ours are; zero where the dump has none."""
    prefix, _, path = name.rpartition("/")
    prefix = prefix and prefix + "/"
    if not path.startswith("llm."):
        key = prefix + path.replace("projection", "llama_proj")
        return dump[key] if key in dump else np.zeros(())
    _, _, _, target, which = path.split(".")
    key = "llama_model.base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.weight"
    keys = [prefix + key.format(i, target, which[-1].upper()) for i in range(3)]
    return np.stack([dump[k] for k in keys])


@pytest.mark.parametrize(("case", "accumulate"), [("a", 1), ("b", 2), ("c", 1)])
def test_four_steps_equal_the_originals(case, accumulate):
    expected = np.load(DUMPS / f"{case}_train.npz")
    split, _, batch, loss, grads = first_gradient(case)
    lora = {f"llm.blocks.attn.{n}.lora_{ab}" for n in "qv" for ab in "ab"} if case == "c" else set()
    assert set(split.trainable) == {"projection.weight", "projection.bias"} | lora
    rate = optimizer.cosine_schedule(**RATES)
    np.testing.assert_allclose([rate(t) for t in range(4)], expected["lrs"], rtol=1e-12)
    tx = optimizer.adamw(split.decay_mask)
    params, state = split.trainable, jax.jit(tx.init)(split.trainable)

    more = np.load(DUMPS / f"{case}_forward_{LEFT_OVER[case]}.npz")
    grads = {name: g + theirs(more, f"grad/{name}") for name, g in grads.items()}

    @jax.jit
    def update(grads, state, params, rate):
        updates, state = tx.update(grads, state, params)
        return optimizer.apply_updates(params, updates, rate), state

    params, state = update(grads, state, params, rate(0))
    losses = [loss]

    step = make_step(split, tx, mesh=None, accumulate=accumulate, remat=accumulate > 1)
    for t in range(1, 4):
        params, state, metrics = step(params, state, split.frozen, batch, np.float32(rate(t)), t)
        losses.append(float(metrics.loss))
    # Adam divides by the gradient's size, so that of LoRA, tiny in places, has less certain steps.
    np.testing.assert_allclose(losses, expected["losses"], rtol=1e-5 if case == "c" else 2e-6)
    for name, final in params.items():
        wanted = theirs(expected, f"final/{name}")
        np.testing.assert_allclose(final, wanted, atol=6e-5 if case == "c" else 1e-5)
        assert np.abs(final - wanted).mean() < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_first_gradient_equals_the_originals(case):
    expected = np.load(DUMPS / f"{case}_forward_{FIRST[case]}.npz")
    *_, loss, grads = first_gradient(case)
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-6)
    for name, grad in grads.items():
        wanted = theirs(expected, f"grad/{name}")
        np.testing.assert_allclose(grad, wanted, atol=1e-4 * np.abs(wanted).max())
