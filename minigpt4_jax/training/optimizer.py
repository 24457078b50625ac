"""The original's optimizer: AdamW, and two learning-rate schedules (LAVIS' optims.py)."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from minigpt4_jax.checkpoint.parameters import part_of
from minigpt4_jax.errors import UserError
from minigpt4_jax.training.config import SCHEDULES, TrainConfig

Schedule = Callable[[int], float]  # step, from 0 -> learning rate


def cosine_schedule(
    *,
    init_lr: float,
    min_lr: float,
    warmup_lr: float,
    warmup_steps: int,
    steps: int,
    steps_per_epoch: int = 0,
) -> Schedule:
    """Linear warmup, then a cosine decay (LinearWarmupCosineLRScheduler).

    As in the original, the cosine runs over all `steps`, not only those after the warmup, so the rate
    drops where the warmup ends. If an epoch is shorter than the warmup, the ramp restarts in each
    epoch until the warmup is over. steps_per_epoch: 0: one long epoch.
    """

    def learning_rate(step: int) -> float:
        if step < warmup_steps:
            step_in_epoch = step % steps_per_epoch if steps_per_epoch else step
            return _warmup(step_in_epoch, warmup_lr, init_lr, warmup_steps)
        return min_lr + (init_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * step / steps))

    return learning_rate


def step_schedule(
    *,
    init_lr: float,
    min_lr: float,
    warmup_lr: float,
    warmup_steps: int,
    decay_rate: float,
    steps_per_epoch: int,
) -> Schedule:
    """Linear warmup within the first epoch, then init_lr * decay_rate^epoch, at least min_lr
    (LinearWarmupStepLRScheduler)."""

    def learning_rate(step: int) -> float:
        epoch = step // steps_per_epoch
        if epoch == 0:
            return _warmup(step, warmup_lr, init_lr, warmup_steps)
        return max(min_lr, init_lr * decay_rate**epoch)

    return learning_rate


def _warmup(step: int, start: float, end: float, steps: int) -> float:
    return min(end, start + (end - start) * step / max(steps, 1))


def make_schedule(c: TrainConfig) -> Schedule:
    """The schedule of a training configuration. UserError: an unknown one, or no steps_per_epoch."""
    if c.schedule == "cosine":
        return cosine_schedule(
            init_lr=c.init_lr, min_lr=c.min_lr, warmup_lr=c.warmup_lr,
            warmup_steps=c.warmup_steps, steps=c.steps, steps_per_epoch=c.steps_per_epoch,
        )  # fmt: skip
    if c.schedule == "step":
        if c.steps_per_epoch <= 0:
            raise UserError("schedule 'step' needs steps_per_epoch: the rate falls once per epoch")
        return step_schedule(
            init_lr=c.init_lr, min_lr=c.min_lr, warmup_lr=c.warmup_lr,
            warmup_steps=c.warmup_steps, decay_rate=c.decay_rate,
            steps_per_epoch=c.steps_per_epoch,
        )  # fmt: skip
    raise UserError(f"schedule {c.schedule!r}: expected {' or '.join(SCHEDULES)}")


def make_optimizer(c: TrainConfig, decay_mask: Mapping[str, bool]) -> optax.GradientTransformation:
    """AdamW with the values of a training configuration; decay_mask: as for `adamw`."""
    tx = adamw(
        decay_mask, betas=(c.beta1, c.beta2), eps=c.eps, weight_decay=c.weight_decay, clip=c.clip
    )
    if c.qformer_lr_scale == 1:
        return tx
    in_qformer = {name: part_of(name) == "qformer" for name in decay_mask}
    return optax.chain(tx, optax.masked(optax.scale(c.qformer_lr_scale), in_qformer))


def adamw(
    decay_mask: Mapping[str, bool],
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.05,
    clip: float = 0.0,
) -> optax.GradientTransformation:
    """AdamW without its learning rate: `apply_updates` scales its updates by -learning_rate.

    Parameters and gradients are flat dictionaries.
    decay_mask: parameter name -> whether weight decay applies to it.
    clip: the maximum global norm of the gradient; 0: no clipping, as in the original.
    """
    transforms = [optax.clip_by_global_norm(clip)] if clip > 0 else []
    transforms += [
        optax.scale_by_adam(b1=betas[0], b2=betas[1], eps=eps),
        optax.add_decayed_weights(weight_decay, mask=dict(decay_mask)),
    ]
    return optax.chain(*transforms)


def apply_updates(params: Any, updates: Any, learning_rate: jax.Array | float) -> Any:
    """params - learning_rate * updates, in each parameter's dtype."""
    return jax.tree.map(lambda p, u: p - jnp.asarray(learning_rate, p.dtype) * u, params, updates)
