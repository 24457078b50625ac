"""The step on a tiny model: what is trained, what is not, and that parts add up to the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from minigpt4_jax import optim
from minigpt4_jax.config import LoraConfig
from minigpt4_jax.models.minigpt import Batch, MiniGpt
from minigpt4_jax.training.step import (
    decays,
    make_evaluation,
    make_step,
    split_model,
    trained_parts,
)

FROZEN = trained_parts(freeze_vit=True, freeze_qformer=True)


def model(**changes) -> MiniGpt:
    return MiniGpt(tiny.config(**changes), nnx.Rngs(0))


def batch(rows: int = 4, seed: int = 0) -> Batch:
    """Rows of several lengths, with 1 to 4 labelled tokens each."""
    rng = np.random.default_rng(seed)
    t, a = 16, 5
    tokens = rng.integers(3, 785, (rows, t)).astype(np.int32)
    tokens[:, 1:4] = -1
    lengths = rng.integers(10, t + 1, rows).astype(np.int32)
    answers = np.full((rows, a), -1, np.int32)
    for i, n in enumerate(lengths):
        count = 1 + i % 4
        answers[i, :count] = np.arange(n - count, n)
    pixels = rng.normal(size=(rows, 1, 28, 28, 3)).astype(np.float32)
    return Batch(pixels, tokens, lengths, answers)


def one_step(split, batch, rate=0.1, index=0, weight_decay=0.0, **options):
    tx = optim.adamw(split.decays, weight_decay=weight_decay)
    step = make_step(split, tx, **options)
    params = jax.tree.map(jnp.copy, split.trainable)  # the step takes them
    state = tx.init(params)
    return step(params, state, split.frozen, batch, np.float32(rate), np.int32(index))


def test_only_the_projection_has_gradient_and_optimizer_state():
    split = split_model(model(), FROZEN, jnp.dtype("float32"))
    params, state, metrics = one_step(split, batch())
    shapes = {"projection.weight": (24, 16), "projection.bias": (24,)}
    assert {k: v.shape for k, v in params.items()} == shapes
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(m.size for m in moments) == 2 * (24 * 16 + 24)
    changed = {k: bool((params[k] != split.trainable[k]).any()) for k in params}
    assert changed == dict.fromkeys(shapes, True)
    assert int(metrics.tokens) == int((batch().answers >= 0).sum()) == 10
    assert float(metrics.grad_norm) > 0


@pytest.mark.parametrize(
    ("freeze_vit", "freeze_qformer", "names"),
    [
        (False, True, {"projection", "vit", "ln_vision"}),
        (True, False, {"projection", "qformer"}),
        (False, False, {"projection", "vit", "ln_vision", "qformer"}),
    ],
)
def test_unfreezing_adds_parts(freeze_vit, freeze_qformer, names):
    parts = trained_parts(freeze_vit=freeze_vit, freeze_qformer=freeze_qformer)
    split = split_model(model(), parts, jnp.dtype("float32"))
    assert {n.split(".")[0] for n in split.trainable} == names
    total = len(jax.tree.leaves(nnx.state(model())))
    assert len(split.trainable) + len(split.frozen) == total
    params, _, _ = one_step(split, batch(), rate=0.01)
    still = [n for n in params if not (np.asarray(params[n]) != split.trainable[n]).any()]
    # softmax does not see a shift of all keys alike, so those biases have no gradient
    assert all(n.endswith("k.bias") for n in still)


def test_lora_is_trained_and_the_matrices_under_it_are_not():
    split = split_model(model(lora=LoraConfig(rank=2)), FROZEN, jnp.dtype("float32"))
    assert {n.rsplit(".", 1)[1] for n in split.trainable} == {"weight", "bias", "lora_a", "lora_b"}
    assert [n for n in split.trainable if "lora" not in n] == ["projection.bias", "projection.weight"]


def test_weight_decay_is_for_matrices_alone_also_where_layers_are_stacked():
    parts = trained_parts(freeze_vit=False, freeze_qformer=False)
    split = split_model(model(), parts, jnp.dtype("float32"))
    decayed = {n for n, d in split.decays.items() if d}
    assert {"vit.blocks.attn.qkv.weight", "vit.pos", "vit.cls", "projection.weight"} <= decayed
    assert {"qformer.query", "qformer.blocks.0.attn.q.weight", "vit.patch.weight"} <= decayed
    vectors = {"bias", "scale", "q_bias", "v_bias"}
    assert not {n for n in decayed if n.rsplit(".", 1)[1] in vectors}
    assert {n for n in split.decays if n.rsplit(".", 1)[1] not in vectors} == decayed
    assert not decays(("llm", "blocks", "norm1", "scale"), (2, 24))


def test_weight_decay_reaches_the_weights():
    split = split_model(model(), FROZEN, jnp.dtype("float32"))
    plain, _, _ = one_step(split, batch(), rate=0.1)
    decayed, _, _ = one_step(split, batch(), rate=0.1, weight_decay=0.5)
    moved = {n: np.asarray(plain[n] - decayed[n]) for n in plain}
    expected = 0.1 * 0.5 * np.asarray(split.trainable["projection.weight"])
    np.testing.assert_allclose(moved["projection.weight"], expected, atol=1e-6)
    assert not moved["projection.bias"].any()


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"accumulate": 4}, {"remat": True}])
def test_parts_of_a_batch_and_remat_give_the_same_step(options):
    """Rows have 1 to 4 labels, so a mean of the micro-batches' means would differ."""
    split = split_model(model(), FROZEN, jnp.dtype("float32"))
    whole, _, expected = one_step(split, batch(), rate=0.1)
    params, _, metrics = one_step(split, batch(), rate=0.1, **options)
    np.testing.assert_allclose(metrics.loss, expected.loss, rtol=1e-6)
    np.testing.assert_allclose(metrics.grad_norm, expected.grad_norm, rtol=1e-5)
    assert int(metrics.tokens) == int(expected.tokens)
    for name in whole:
        np.testing.assert_allclose(params[name], whole[name], atol=2e-4)


def test_loss_is_the_mean_over_labelled_tokens():
    split = split_model(model(), FROZEN, jnp.dtype("float32"))
    _, _, metrics = one_step(split, batch())
    total, count = make_evaluation(split)(split.trainable, split.frozen, batch())
    np.testing.assert_allclose(metrics.loss, total / count, rtol=1e-6)
    whole = split.join(split.trainable, split.frozen).loss(batch())
    np.testing.assert_allclose(metrics.loss, whole, rtol=1e-6)


def test_dropout_follows_from_seed_and_step():
    parts = trained_parts(freeze_vit=True, freeze_qformer=False)
    split = split_model(model(), parts, jnp.dtype("float32"))

    def loss(index, **options):
        return float(one_step(split, batch(), index=index, **options)[2].loss)

    off, first = loss(0), loss(0, dropout_seed=1)
    assert first == loss(0, dropout_seed=1)
    assert len({off, first, loss(1, dropout_seed=1), loss(0, dropout_seed=2)}) == 4


def test_bfloat16_rounds_the_masters_for_the_step_only():
    parts = trained_parts(freeze_vit=False, freeze_qformer=True)
    split = split_model(model(), parts, jnp.dtype("bfloat16"))
    assert {a.dtype for a in split.trainable.values()} == {jnp.dtype("float32")}
    joined = split.join(split.trainable, split.frozen)
    assert joined.vit.patch.weight[...].dtype == jnp.bfloat16
    assert joined.vit.patch.bias[...].dtype == jnp.float32
    assert joined.projection.weight[...].dtype == jnp.float32
    params, _, _ = one_step(split, batch(), rate=1e-6)
    moved = np.asarray(params["vit.blocks.mlp.up.weight"]) - split.trainable["vit.blocks.mlp.up.weight"]
    # steps of 1e-6 on values near 0.1 would be lost in bfloat16
    assert 0 < np.abs(moved).max() < 1e-5
    assert {a.dtype for a in params.values()} == {jnp.dtype("float32")}
