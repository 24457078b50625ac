"""Training with a list of layers, as on a GPU, is training with stacked layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny

from minigpt4_jax.checkpoint.loader import load_model
from minigpt4_jax.config import IMAGE, LoraConfig
from minigpt4_jax.models.minigpt import Batch
from minigpt4_jax.training.train_step import split_model, trained_parts
from minigpt4_jax.utils import platform

PARTS = trained_parts(freeze_vit=False, freeze_qformer=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    lora = LoraConfig(rank=2)
    return tiny.write_random_model(tmp_path_factory.mktemp("lists") / "model", lora=lora)


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 700, (2, 10)).astype(np.int32)
    tokens[:, 1:4] = IMAGE
    return Batch(
        rng.integers(0, 255, (2, 1, 28, 28, 3)).astype(np.uint8), tokens,
        np.array([10, 7], np.int32), np.array([[6, 7, 8], [5, 6, -1]], np.int32),
    )  # fmt: skip


def split_and_gradient(folder, *, stacked, remat):
    model, _ = load_model(folder, stacked=stacked, trainable_parts=PARTS)
    split = split_model(model, PARTS, jnp.dtype("float32"))

    def loss(trainable):
        return split.join(trainable, split.frozen).loss(batch(), remat=remat)

    return split, *jax.jit(jax.value_and_grad(loss))(split.trainable)


@pytest.mark.parametrize("remat", [False, True])
def test_loss_and_gradient_are_those_of_stacked_layers(folder, remat, monkeypatch):
    monkeypatch.setenv("MINIGPT4_JAX_CUDNN", "0")
    wanted_split, wanted_loss, wanted = split_and_gradient(folder, stacked=True, remat=remat)
    with platform.compiling_for("gpu"):
        split, loss, gradient = split_and_gradient(folder, stacked=False, remat=remat)
    # Names, shapes and weight decay are the same, so that checkpoints of one continue the other.
    assert {n: a.shape for n, a in split.trainable.items()} == {
        n: a.shape for n, a in wanted_split.trainable.items()
    }
    assert split.decay_mask == wanted_split.decay_mask
    assert any(name.endswith("lora_a") for name in gradient)
    assert len(split.frozen) > len(wanted_split.frozen)
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    for name, array in wanted.items():
        np.testing.assert_allclose(
            gradient[name], array, atol=1e-4 * np.abs(array).max() + 1e-8, err_msg=name
        )


def test_the_frozen_patch_embedding_is_padded_once(folder):
    """To a multiple of 8 inputs, which cuBLAS wants: XLA would copy the weight in every step."""
    frozen_vit = trained_parts(freeze_vit=True, freeze_qformer=True)
    with platform.compiling_for("gpu"):
        model, _ = load_model(folder, stacked=False, trainable_parts=frozen_vit)
        split = split_model(model, frozen_vit, jnp.dtype("float32"))
        joined = split.join(split.trainable, split.frozen)
    assert model.vit.patch.weight.shape == (16, 588)
    assert joined.vit.patch.weight.shape == (16, 592)
    pixels = np.random.default_rng(0).normal(size=(2, 28, 28, 3)).astype(np.float32)
    np.testing.assert_allclose(joined.vit.embed(pixels), model.vit.embed(pixels), atol=1e-5)
