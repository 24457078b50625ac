"""The step on a tiny model: what is trained, what is not, and that parts add up to the whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import tiny

from minigpt4_jax.checkpoint.parameters import abstract_model
from minigpt4_jax.config import LoraConfig
from minigpt4_jax.models.minigpt import Batch, MiniGpt
from minigpt4_jax.training import optimizer
from minigpt4_jax.training.train_step import (
    Split,
    is_decayed,
    make_evaluation,
    make_step,
    split_model,
    trained_parts,
)


@functools.cache
def model(**changes) -> MiniGpt:
    """With values from NumPy: compiling an initialization takes seconds."""
    made, rng = abstract_model(tiny.config(**changes)), np.random.default_rng(0)
    for path, leaf in nnx.to_flat_state(nnx.state(made)):
        drawn = rng.uniform(-1, 1, leaf.shape) * (leaf.shape or (1,))[-1] ** -0.5
        leaf.set_value(jnp.asarray(drawn + (path[-1] == "scale"), jnp.float32))
    return made


def split(*, freeze_vit=True, freeze_qformer=True, dtype="float32", of=None) -> Split:
    parts = trained_parts(freeze_vit=freeze_vit, freeze_qformer=freeze_qformer)
    return split_model(of or model(), parts, jnp.dtype(dtype))


def batch() -> Batch:
    """Four rows of several lengths, with 1 to 4 labelled tokens each."""
    rng = np.random.default_rng(0)
    rows, t, a = 4, 16, 5
    tokens = rng.integers(3, 785, (rows, t)).astype(np.int32)
    tokens[:, 1:4] = -1
    lengths = rng.integers(10, t + 1, rows).astype(np.int32)
    answers = np.full((rows, a), -1, np.int32)
    for i, n in enumerate(lengths):
        answers[i, : i + 1] = np.arange(n - i - 1, n)
    pixels = rng.normal(size=(rows, 1, 28, 28, 3)).astype(np.float32)
    return Batch(pixels, tokens, lengths, answers)


@functools.cache
def compiled(options: tuple, frozen: tuple):
    parts = split(**dict(frozen))
    tx = optimizer.adamw(parts.decay_mask)
    return parts, tx, make_step(parts, tx, mesh=None, **dict(options))


def one_step(*, rate=0.01, index=0, frozen=(), **options):
    """(parameters before, after, optimizer state, metrics) of one step from the start."""
    parts, tx, step = compiled(tuple(options.items()), tuple(frozen))
    before = jax.tree.map(np.array, parts.trainable)
    args = (parts.frozen, batch(), np.float32(rate), np.int32(index))
    return before, *step(before, jax.jit(tx.init)(before), *args)


@pytest.mark.smoke
def test_only_the_projection_has_gradient_and_optimizer_state():
    before, after, state, metrics = one_step()
    shapes = {"projection.weight": (24, 16), "projection.bias": (24,)}
    assert {k: v.shape for k, v in after.items()} == shapes
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(m.size for m in moments) == 2 * (24 * 16 + 24)
    assert all((np.asarray(after[k]) != before[k]).any() for k in shapes)
    assert int(metrics.tokens) == 10
    assert float(metrics.grad_norm) > 0


@pytest.mark.parametrize(
    ("frozen", "names"),
    [
        ({}, {"projection"}),
        ({"freeze_vit": False}, {"projection", "vit", "ln_vision"}),
        ({"freeze_qformer": False}, {"projection", "qformer"}),
    ],
)
def test_unfreezing_adds_parts(frozen, names):
    parts = split(**frozen)
    assert {n.split(".")[0] for n in parts.trainable} == names
    total = len(jax.tree.leaves(nnx.state(model())))
    assert len(parts.trainable) + len(parts.frozen) == total


def test_lora_is_trained_and_the_matrices_under_it_are_not():
    parts = split(of=model(lora=LoraConfig(rank=2)))
    layers = {f"llm.blocks.attn.{p}.lora_{ab}" for p in "qv" for ab in "ab"}
    assert set(parts.trainable) == {"projection.bias", "projection.weight"} | layers


def test_everything_unfrozen_learns_with_dropout_from_seed_and_step():
    frozen = {"freeze_vit": False, "freeze_qformer": False}.items()
    before, after, _, first = one_step(frozen=frozen, dropout_seed=1)
    still = [n for n in after if not (np.asarray(after[n]) != before[n]).any()]
    # softmax does not see a shift of all keys alike, so those biases have no gradient
    assert all(n.endswith("k.bias") for n in still)
    again = one_step(frozen=frozen, dropout_seed=1)[3]
    other = one_step(frozen=frozen, dropout_seed=1, index=1)[3]
    without = one_step()[3]
    assert float(again.loss) == float(first.loss)
    assert len({float(m.loss) for m in (first, other, without)}) == 3


def test_only_matrices_decay_also_where_layers_are_stacked():
    parts = split(freeze_vit=False, freeze_qformer=False)
    decayed = {n for n, d in parts.decay_mask.items() if d}
    assert {"vit.blocks.attn.qkv.weight", "vit.pos", "vit.cls", "projection.weight"} <= decayed
    assert {"qformer.query", "qformer.blocks.0.attn.q.weight", "vit.patch.weight"} <= decayed
    vectors = {"bias", "scale", "q_bias", "v_bias"}
    assert not {n for n in decayed if n.rsplit(".", 1)[1] in vectors}
    assert {n for n in parts.decay_mask if n.rsplit(".", 1)[1] not in vectors} == decayed
    assert not is_decayed(("llm", "blocks", "norm1", "scale"), (2, 24))


def test_parameters_decay_if_those_of_a_single_layer_are_matrices():
    from minigpt4_jax.checkpoint.parameters import parameter_shapes

    config = tiny.config()
    flat = nnx.to_flat_state(nnx.state(abstract_model(config)))
    ours = {".".join(map(str, p)): is_decayed(p, leaf.shape) for p, leaf in flat}
    for name, shape in parameter_shapes(config).items():
        part, _, rest = name.partition(".blocks.")
        stacked = f"{part}.blocks.{rest.partition('.')[2]}"
        expected = len(shape) >= 2 or name == "vit.cls"
        assert ours[stacked if stacked in ours else name] == expected, name


def test_weight_decay_reaches_the_weights():
    parts = split()
    tx = optimizer.adamw(parts.decay_mask, weight_decay=0.5)
    zero = jax.tree.map(jnp.zeros_like, parts.trainable)
    updates, _ = tx.update(zero, tx.init(parts.trainable), parts.trainable)
    after = optimizer.apply_updates(parts.trainable, updates, np.float32(0.1))
    for name, share in (("projection.weight", 0.95), ("projection.bias", 1.0)):
        np.testing.assert_allclose(after[name], share * parts.trainable[name], rtol=1e-6)


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"remat": True}])
def test_parts_of_a_batch_and_remat_give_the_same_step(options):
    """Rows have 1 to 4 labels, so a mean of the micro-batches' means would differ."""
    _, whole, _, expected = one_step()
    _, params, _, metrics = one_step(**options)
    np.testing.assert_allclose(metrics.loss, expected.loss, rtol=1e-6)
    np.testing.assert_allclose(metrics.grad_norm, expected.grad_norm, rtol=1e-5)
    assert int(metrics.tokens) == int(expected.tokens)
    for name in whole:
        np.testing.assert_allclose(params[name], whole[name], atol=2e-5)


@pytest.mark.smoke
def test_loss_is_the_mean_over_labelled_tokens():
    metrics = one_step()[3]
    total, count = make_evaluation(split(), mesh=None)(split().trainable, split().frozen, batch())
    assert int(count) == 10
    np.testing.assert_allclose(metrics.loss, total / count, rtol=1e-6)


def test_trained_matrices_are_float32_masters_that_compute_in_bfloat16():
    parts = split(freeze_vit=False, dtype="bfloat16")
    assert {a.dtype for a in parts.trainable.values()} == {jnp.dtype("float32")}
    joined = parts.join(parts.trainable, parts.frozen)
    assert joined.vit.patch.weight[...].dtype == jnp.bfloat16
    assert joined.vit.patch.bias[...].dtype == jnp.float32
    assert joined.projection.weight[...].dtype == jnp.float32
    grad = jax.grad(lambda p: parts.join(p, parts.frozen).vit.patch.weight[...].sum().astype(float))
    assert grad(parts.trainable)["vit.patch.weight"].dtype == jnp.float32
