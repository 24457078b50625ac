"""The schedules against the original's dumps, and AdamW against PyTorch's."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.paths import FIXTURES
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_jax.errors import UserError
from minigpt4_jax.training import optimizer
from minigpt4_jax.training.config import TrainConfig

STAGE1 = {
    "init_lr": 1e-4, "min_lr": 8e-5, "warmup_lr": 1e-6, "warmup_steps": 5000, "steps": 20_000
}  # fmt: skip
STAGE2 = {"init_lr": 3e-5, "min_lr": 1e-5, "warmup_lr": 1e-6, "warmup_steps": 200, "steps": 1000}


@pytest.mark.parametrize(
    ("recipe", "step", "rate"),
    [
        (STAGE1, 0, 1e-6), (STAGE1, 5000, 9.707e-5), (STAGE1, 10_000, 9.0e-5),
        (STAGE2, 199, 2.9855e-5), (STAGE2, 200, 2.8090e-5), (STAGE2, 500, 2.0e-5),
    ],
)  # fmt: skip
def test_cosine_has_the_recipes_values(recipe, step, rate):
    assert optimizer.cosine_schedule(**recipe)(step) == pytest.approx(rate, rel=1e-4)


def test_v2_recipe():
    rate = optimizer.cosine_schedule(
        init_lr=1e-5, min_lr=1e-6, warmup_lr=1e-6, warmup_steps=1000, steps=50_000
    )
    assert rate(25_000) == pytest.approx(5.5e-6)


def dump(name):
    return np.load(FIXTURES / name)["lr"]  # made by the original


def test_cosine_equals_the_original_also_where_the_warmup_is_longer_than_an_epoch():
    rate = optimizer.cosine_schedule(
        init_lr=1e-4, min_lr=8e-5, warmup_lr=1e-6, warmup_steps=70, steps=200, steps_per_epoch=50
    )
    np.testing.assert_allclose([rate(t) for t in range(200)], dump("lr_cosine.npz"), rtol=1e-12)


def test_step_schedule_equals_the_original():
    rate = optimizer.step_schedule(
        init_lr=1e-4,
        min_lr=1e-6,
        warmup_lr=1e-6,
        warmup_steps=30,
        decay_rate=0.5,
        steps_per_epoch=50,
    )
    np.testing.assert_allclose([rate(t) for t in range(200)], dump("lr_step.npz"), rtol=1e-12)


def test_step_schedule_stops_at_the_minimum():
    c = TrainConfig(
        schedule="step", init_lr=1.0, min_lr=0.3, warmup_lr=0.1, warmup_steps=2, steps=99,
        steps_per_epoch=5, decay_rate=0.5,
    )  # fmt: skip
    rate = optimizer.make_schedule(c)
    assert [rate(0), rate(1), rate(2), rate(5), rate(10)] == [0.1, 0.55, 1.0, 0.5, 0.3]


def test_unknown_schedule_lists_the_known():
    with pytest.raises(UserError, match="expected cosine or step"):
        optimizer.make_schedule(TrainConfig(schedule="linear"))
    with pytest.raises(UserError, match="steps_per_epoch"):
        optimizer.make_schedule(TrainConfig(schedule="step"))


@settings(deadline=None)
@given(
    steps=st.integers(1, 5000),
    warmup=st.integers(0, 5000),
    rates=st.lists(st.floats(1e-8, 1.0), min_size=3, max_size=3),
)
def test_cosine_stays_between_its_bounds(steps, warmup, rates):
    warmup_lr, min_lr, init_lr = sorted(rates)
    rate = optimizer.cosine_schedule(
        init_lr=init_lr, min_lr=min_lr, warmup_lr=warmup_lr, warmup_steps=warmup, steps=steps
    )
    values = [rate(t) for t in range(0, steps, max(1, steps // 50))]
    slack = 1 + 1e-9
    assert all(warmup_lr / slack <= v <= init_lr * slack for v in values)
    after = [rate(t) for t in range(min(warmup, steps), steps, max(1, steps // 50))]
    assert all(a >= b / slack for a, b in itertools.pairwise(after))
    assert math.isclose(rate(steps) if steps >= warmup else min_lr, min_lr, rel_tol=1e-9)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_adamw_equals_torch(clip):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(5, 3)), "b": rng.normal(size=(3,))}
    params = {k: v.astype(np.float32) for k, v in params.items()}
    theirs = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in params.items()}
    other = torch.optim.AdamW(
        [
            {"params": [theirs["w"]], "weight_decay": 0.05},
            {"params": [theirs["b"]], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.999), eps=1e-8,
    )  # fmt: skip
    tx = optimizer.adamw({"w": True, "b": False}, clip=clip)
    ours = {k: jnp.asarray(v) for k, v in params.items()}
    state = jax.jit(tx.init)(ours)

    @jax.jit
    def update(grads, state, params, rate):
        updates, state = tx.update(grads, state, params)
        return optimizer.apply_updates(params, updates, rate), state

    for step in range(6):
        rate = 0.1 / (step + 1)
        grads = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in params.items()}
        ours, state = update(grads, state, ours, rate)
        for k, p in theirs.items():
            p.grad = torch.tensor(grads[k])
        if clip:
            torch.nn.utils.clip_grad_norm_(list(theirs.values()), clip)
        for group in other.param_groups:
            group["lr"] = rate
        other.step()
    for k in params:
        np.testing.assert_allclose(ours[k], theirs[k].detach().numpy(), rtol=2e-5, atol=2e-6)


def test_the_qformer_has_a_learning_rate_of_its_own():
    names = ("projection.kernel", "qformer.layers.0.kernel")
    params = {name: jnp.ones((2, 3)) for name in names}
    grads = {name: jnp.full((2, 3), 0.5) for name in names}

    def step(scale):
        c = TrainConfig(qformer_lr_scale=scale, weight_decay=0.05)
        tx = optimizer.make_optimizer(c, dict.fromkeys(names, True))
        return optimizer.apply_updates(params, tx.update(grads, tx.init(params), params)[0], 0.1)

    same, scaled = step(1.0), step(0.25)
    np.testing.assert_array_equal(same[names[0]], scaled[names[0]])
    np.testing.assert_allclose(1 - scaled[names[1]], 0.25 * (1 - same[names[1]]), rtol=1e-5)
