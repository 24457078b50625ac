"""Packed rows in the model: loss and gradient are the padded batch's, and examples do not meet."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from minigpt4_jax import optim
from minigpt4_jax.config import IMAGE, LoraConfig
from minigpt4_jax.data.batches import Arrays
from minigpt4_jax.data.packing import pack
from minigpt4_jax.models.minigpt import Batch
from minigpt4_jax.training.step import make_step, split_model, trained_parts
from minigpt4_jax.weights import load_model

PARTS = trained_parts(freeze_vit=True, freeze_qformer=True)
LORA = LoraConfig(rank=2, targets=("q", "k", "v", "o", "gate", "up", "down"))


def arrays(images=2) -> Arrays:
    """Eight rows of 4 to 25 tokens with none, one or two images of three tokens."""
    rng = np.random.default_rng(0)
    tokens, lengths = np.full((8, 32), 0, np.int32), []
    answers = np.full((8, 6), -1, np.int32)
    for i in range(8):
        slots = 3 * (i % (images + 1))
        n = slots + int(rng.integers(4, 20))
        row = rng.integers(3, 785, n)
        row[1 : 1 + slots] = IMAGE
        tokens[i, :n] = row
        told = int(rng.integers(1, min(6, n - slots - 1)))
        answers[i, :told] = np.arange(n - told, n)
        lengths.append(n)
    pixels = rng.normal(size=(8, images, 28, 28, 3)).astype(np.float32)
    return Arrays(pixels, tokens, np.array(lengths, np.int32), answers)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = tiny.write_random_model(tmp_path_factory.mktemp("packed") / "m", lora=LORA)
    model, _ = load_model(folder)
    return split_model(model, PARTS, jnp.dtype("float32"))


def packed(batch, width=48, **options) -> Batch:
    return Batch(*pack(batch, width, 3, 0, **options))


def grads(split, batch):
    program = jax.jit(jax.value_and_grad(lambda p: split.join(p, split.frozen).loss(batch)))
    return program(split.trainable)


def test_loss_and_gradient_are_those_of_the_padded_batch(split):
    one, batch = arrays(), packed(arrays())
    assert batch.tokens.shape[0] < 5
    loss, wanted = grads(split, Batch(*one))
    same, found = grads(split, batch)
    assert float(same) == pytest.approx(float(loss), rel=1e-5)
    assert len(found) == 2 + 2 * 7
    for name, grad in wanted.items():
        scale = np.abs(grad).max()
        assert scale > 0
        np.testing.assert_allclose(found[name] / scale, grad / scale, atol=1e-5)


def test_micro_batches_of_packed_rows_add_up(split):
    tx = optim.adamw(split.decays)
    found = []
    for accumulate, batch in ((1, Batch(*arrays())), (2, packed(arrays(), micro_batches=2))):
        params = jax.tree.map(jnp.copy, split.trainable)
        args = (params, tx.init(params), split.frozen, batch, np.float32(0.01), np.int32(0))
        found.append(make_step(split, tx, accumulate=accumulate)(*args))
    (_, _, one), (_, _, two) = found
    assert float(two.loss) == pytest.approx(float(one.loss), rel=1e-5)
    assert float(two.grad_norm) == pytest.approx(float(one.grad_norm), rel=1e-4)


def test_an_example_does_not_see_its_neighbours(tmp_path):
    """Also in a model with a window, and whatever lies in the rest of its row."""
    model, config = load_model(tiny.write_random_model(tmp_path / "m"))
    model.llm.blocks.attn.config = dataclasses.replace(config.llm, window=4)
    batch = packed(arrays())
    first = np.asarray(batch.segments[0] == 0)
    changed = np.where(first | (batch.tokens[0] == IMAGE), batch.tokens[0], 7)
    tokens = batch.tokens.copy()
    tokens[0] = changed
    one = np.asarray(model.token_nll(batch))[0]
    two = np.asarray(model.token_nll(batch._replace(tokens=tokens)))[0]
    own = np.isin(batch.answers[0], np.flatnonzero(first))
    np.testing.assert_allclose(one[own], two[own], rtol=1e-6)
    assert np.abs(one[~own] - two[~own]).max() > 1e-3
