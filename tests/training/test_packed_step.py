"""Packed rows in the model: loss and gradient are the padded batch's, and examples do not meet."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import tiny

from minigpt4_jax.checkpoint.loader import load_model
from minigpt4_jax.checkpoint.model_directory import Tensors
from minigpt4_jax.config import IMAGE, LoraConfig
from minigpt4_jax.data.arrays import BatchArrays
from minigpt4_jax.data.config import DataConfig
from minigpt4_jax.data.packing import pack
from minigpt4_jax.models.minigpt import Batch
from minigpt4_jax.training import optimizer
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.train_step import make_step, split_model, trained_parts
from minigpt4_jax.training.trainer import train

PARTS = trained_parts(freeze_vit=True, freeze_qformer=True)
LORA = LoraConfig(rank=2, targets=("q", "k", "v", "o", "gate", "up", "down"))


def arrays(images=2) -> BatchArrays:
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
    return BatchArrays(pixels, tokens, np.array(lengths, np.int32), answers)


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


@pytest.fixture(scope="module")
def expected(split):
    """Loss and gradient of the padded batch."""
    return grads(split, Batch(*arrays()))


def test_loss_and_gradient_are_those_of_the_padded_batch(split, expected):
    batch = packed(arrays())
    assert batch.tokens.shape[0] < 5
    loss, wanted = expected
    same, found = grads(split, batch)
    assert float(same) == pytest.approx(float(loss), rel=1e-5)
    assert len(found) == 2 + 2 * 7
    for name, grad in wanted.items():
        scale = np.abs(grad).max()
        assert scale > 0
        np.testing.assert_allclose(found[name] / scale, grad / scale, atol=5e-5)


def test_micro_batches_of_packed_rows_add_up(split, expected):
    tx = optimizer.adamw(split.decay_mask)
    params = jax.tree.map(np.array, split.trainable)
    batch = packed(arrays(), micro_batches=2)
    args = (params, jax.jit(tx.init)(params), split.frozen, batch, np.float32(0.01), np.int32(0))
    joins = []

    def join(*halves):
        joins.append(halves)
        return split.join(*halves)

    step = make_step(split._replace(join=join), tx, mesh=None, accumulate=2)
    metrics = step(*args)[2]
    assert len(joins) == 1  # tracing a step takes seconds: it is traced once
    assert float(metrics.loss) == pytest.approx(float(expected[0]), rel=1e-5)
    norm = optax.global_norm(jax.tree.map(np.asarray, expected[1]))
    assert float(metrics.grad_norm) == pytest.approx(float(norm), rel=1e-4)


def test_micro_batches_without_images(split):
    """Rows without images have arrays of no size, packed or not."""
    one = arrays(images=0)
    tx = optimizer.adamw(split.decay_mask)
    step, found = make_step(split, tx, mesh=None, accumulate=2), []
    for batch in (Batch(*one), packed(one, micro_batches=2)):
        params = jax.tree.map(np.array, split.trainable)
        args = (
            params,
            jax.jit(tx.init)(params),
            split.frozen,
            batch,
            np.float32(0.01),
            np.int32(0),
        )
        found.append(float(step(*args)[2].loss))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_an_example_does_not_see_its_neighbours(tmp_path):
    """Also with a sliding window, and with anything in the rest of the row."""
    model, config = load_model(tiny.write_random_model(tmp_path / "m"))
    model.llm.blocks.attn.config = dataclasses.replace(config.llm, window=4)
    batch = packed(arrays())
    first = np.asarray(batch.segments[0] == 0)
    changed = np.where(first | (batch.tokens[0] == IMAGE), batch.tokens[0], 7)
    tokens = batch.tokens.copy()
    tokens[0] = changed
    token_nll = jax.jit(lambda model, batch: model.token_nll(batch))
    one = np.asarray(token_nll(model, batch))[0]
    two = np.asarray(token_nll(model, batch._replace(tokens=tokens)))[0]
    own = np.isin(batch.label_positions[0], np.flatnonzero(first))
    np.testing.assert_allclose(one[own], two[own], rtol=1e-6)
    assert np.abs(one[~own] - two[~own]).max() > 1e-3


@pytest.mark.slow
def test_a_packed_run_is_the_unpacked_one_and_resumes(tmp_path, traced_steps):
    """The same steps to float32's rounding, with worker processes and after a stop too."""
    tiny.write_random_model(tmp_path / "m")
    data = tiny.write_data(tmp_path / "data", rows=10)

    def run(name, stop=None, **changes):
        def after(record):
            if record["step"] == stop:
                raise KeyboardInterrupt

        c = TrainConfig(
            model=str(tmp_path / "m"), data=DataConfig(path=(str(data),), **changes), steps=4,
            batch_size=6, accumulate=2, init_lr=0.01, warmup_steps=0, dtype="float32",
            save_every=2, max_text_length=12,
        )  # fmt: skip
        return train(c, tmp_path / name, on_metrics=after)

    plain, whole = run("plain"), run("packed", pack_tokens=48, pad_answers=4)
    assert whole.metrics["loss"] == pytest.approx(plain.metrics["loss"], rel=1e-5)
    assert whole.metrics["tokens"] == plain.metrics["tokens"]
    with pytest.raises(KeyboardInterrupt):
        run("again", stop=2, pack_tokens=48, pad_answers=4)
    again = run("again", pack_tokens=48, pad_answers=4, workers=1)
    one, two = Tensors(whole.model), Tensors(again.model)
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])
