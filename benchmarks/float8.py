"""Effect of float8 products of frozen weights (config.frozen_dtype) on loss, gradient and a short training.

    python benchmarks/float8.py --run=WORKDIR [--model=DIR] [--lora=8] [--steps=60]

WORKDIR is of a finished run, whose configuration and data are used (its paths are relative to where it was
started). --model: start from this model instead, for instance the one that the run has made. --lora: train
adapters of this rank, too. Prints for float32, bfloat16 and float8 (with bfloat16 around it) the loss of the
first batch and its difference from float32's, the cosine of the gradient with float32's, and with --steps=N
the mean loss of the last third of N steps, each on the same batches. What float8 computes does not depend on
the device, but for the order of sums. How fast it is does, and is not measured here.
"""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import Table, argument_parser

from minigpt4_jax.errors import run
from minigpt4_jax.models.minigpt import Batch
from minigpt4_jax.training.config import LoraChoice, TrainConfig
from minigpt4_jax.training.config_values import from_mapping
from minigpt4_jax.training.setup import build_program, open_inputs

PRECISIONS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "float8": {"dtype": "bfloat16", "frozen_dtype": "float8"},
}


class Effect(NamedTuple):
    """What one precision gives."""

    loss: float
    gradient: np.ndarray  # of all trained parameters, one vector
    final_loss: float  # NaN without training


def measure(c: TrainConfig, steps: int) -> Effect:
    """Loss and gradient of the first batch, then a training of this many steps."""
    with contextlib.ExitStack() as exit_stack:
        inputs = open_inputs(c, exit_stack)
        program, trainable, opt_state = build_program(c, inputs)
        split, losses = program.split, []

        def mean_loss(trainable: Any, frozen: Any, batch: Batch) -> jax.Array:
            (total,) = split.join(trainable, frozen).loss_sums(batch).values()
            return total / (batch.label_positions >= 0).sum()

        first = next(inputs.loader)
        loss, gradient = jax.jit(jax.value_and_grad(mean_loss))(trainable, split.frozen, first)
        vector = np.concatenate([np.ravel(gradient[name]) for name in sorted(gradient)])
        for n in range(steps):
            batch = first if n == 0 else next(inputs.loader)
            rate = jnp.float32(program.learning_rate(n))
            trainable, opt_state, metrics = program.step(
                trainable, opt_state, split.frozen, batch, rate, jnp.int32(n)
            )
            losses.append(float(metrics.loss))
    return Effect(float(loss), vector, float(np.mean(losses[-(steps // 3) :])) if steps else np.nan)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    parser.add_argument("--model", default="", help="model directory to start from")
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters")
    parser.add_argument("--steps", type=int, default=0, help="of a training with each precision")
    args = parser.parse_args()
    document = json.loads((args.run / "config.json").read_text())
    c = from_mapping(document["config"])
    c = dataclasses.replace(c, model=args.model or c.model, steps=args.steps or c.steps)
    if args.lora:
        c = dataclasses.replace(c, lora=LoraChoice(rank=args.lora), init_lr=1e-3)
    table = Table({
        "precision": (10, ""), "loss": (10, ".5f"), "loss against float32": (21, "+.3%"),
        "cosine of gradient": (19, ".5f"), "final loss": (11, ".4f"),
    })  # fmt: skip
    reference: Effect | None = None
    for name, values in PRECISIONS.items():
        effect = measure(dataclasses.replace(c, **values), args.steps)
        reference = reference or effect
        a, b = effect.gradient, reference.gradient
        cosine = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        table.row(name, effect.loss, effect.loss / reference.loss - 1, cosine, effect.final_loss)


if __name__ == "__main__":
    run(main)
