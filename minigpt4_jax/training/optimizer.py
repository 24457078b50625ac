"""The optimizer of the original: AdamW on plain trees, and its two learning-rate schedules
(MiniGPT-4's runner and LAVIS' optims.py)."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from minigpt4_jax.errors import UserError

Schedule = Callable[[int], float]  # step (0 is the first) -> learning rate


def cosine_schedule(
    *,
    init_lr: float,
    min_lr: float,
    warmup_lr: float,
    warmup_steps: int,
    steps: int,
    steps_per_epoch: int = 0,
) -> Schedule:
    """Linear warmup, then a cosine over all `steps` that the warmup does not shift, so that the
    rate drops where the warmup ends (LinearWarmupCosineLRScheduler).

    steps_per_epoch: where an epoch is shorter than the warmup, the original starts the ramp anew at
    each epoch until the warmup is over; 0 is one long epoch.
    """

    def rate(step: int) -> float:
        if step < warmup_steps:
            within = step % steps_per_epoch if steps_per_epoch else step
            return _ramp(within, warmup_lr, init_lr, warmup_steps)
        return min_lr + (init_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * step / steps))

    return rate


def step_schedule(
    *,
    init_lr: float,
    min_lr: float,
    warmup_lr: float,
    warmup_steps: int,
    decay_rate: float,
    steps_per_epoch: int,
) -> Schedule:
    """Linear warmup within the first epoch, then init_lr * decay_rate^epoch, not below min_lr
    (LinearWarmupStepLRScheduler)."""

    def rate(step: int) -> float:
        epoch = step // steps_per_epoch
        if epoch == 0:
            return _ramp(step, warmup_lr, init_lr, warmup_steps)
        return max(min_lr, init_lr * decay_rate**epoch)

    return rate


def _ramp(step: int, start: float, end: float, steps: int) -> float:
    return min(end, start + (end - start) * step / max(steps, 1))


def make_schedule(
    kind: str,
    *,
    init_lr: float,
    min_lr: float,
    warmup_lr: float,
    warmup_steps: int,
    steps: int,
    steps_per_epoch: int = 0,
    decay_rate: float = 1.0,
) -> Schedule:
    """The schedule named `kind`. UserError lists the known."""
    rates = {
        "init_lr": init_lr, "min_lr": min_lr, "warmup_lr": warmup_lr,
        "warmup_steps": warmup_steps, "steps_per_epoch": steps_per_epoch,
    }  # fmt: skip
    if kind == "cosine":
        return cosine_schedule(**rates, steps=steps)  # type: ignore[arg-type]
    if kind == "step":
        if steps_per_epoch <= 0:
            raise UserError("schedule 'step' needs steps_per_epoch: the rate falls once an epoch")
        return step_schedule(**rates, decay_rate=decay_rate)  # type: ignore[arg-type]
    raise UserError(f"schedule {kind!r}: expected cosine or step")


def adamw(
    decays: Mapping[str, bool],
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.05,
    clip: float = 0.0,
) -> optax.GradientTransformation:
    """AdamW without its learning rate: its updates are to be scaled by -rate (`apply_updates`).

    decays: parameter name -> whether weight decay applies to it. clip: the largest global norm of
    the gradient, 0 for none (as in the original). Parameters and gradients are flat dictionaries.
    """
    parts = [optax.clip_by_global_norm(clip)] if clip > 0 else []
    parts += [
        optax.scale_by_adam(b1=betas[0], b2=betas[1], eps=eps),
        optax.add_decayed_weights(weight_decay, mask=dict(decays)),
    ]
    return optax.chain(*parts)


def apply_updates(params: Any, updates: Any, rate: jax.Array | float) -> Any:
    """params - rate * updates, leaf by leaf in float32."""
    return jax.tree.map(lambda p, u: p - jnp.asarray(rate, p.dtype) * u, params, updates)
