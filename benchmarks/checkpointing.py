"""Cost of checkpoints: time of a training step with and without saving.

    python benchmarks/checkpointing.py                      # 100 MB trained, saved every 10 steps
    python benchmarks/checkpointing.py --megabytes=500 --every=50 --folder=/mnt/disk/tmp

Matrix products stand in for the model and keep the device busy for `--step` seconds. Saving is real: the
trained arrays and AdamW's two moments, three times `--megabytes`, are written by the trainer's own
Checkpoints. Stretches with and without saving alternate. Prints medians and ranges: of a step, of the time
that `save` blocks training (it copies and hashes; files are written during the next steps), and of a
checkpoint written while nothing else runs.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import argument_parser, seconds

from minigpt4_jax.errors import run
from minigpt4_jax.training.checkpoints import Checkpoints

WIDTH = 1024


def make_step(step_seconds: float, tx: Any) -> Callable[..., Any]:
    """A step that updates all arrays and multiplies matrices until it takes `step_seconds`."""

    @jax.jit
    def multiply(a: jax.Array, repeats: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, repeats, lambda _, a: jnp.tanh(a @ a), a)

    @jax.jit
    def update(trainable: Any, state: Any) -> Any:
        gradient = jax.tree.map(lambda a: a * 1e-3, trainable)
        updates, state = tx.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state

    a = jnp.full((WIDTH, WIDTH), 1e-3)
    multiply(a, 1).block_until_ready()
    each = seconds(lambda: multiply(a, 20).block_until_ready()) / 20
    repeats = max(1, round(step_seconds / each))

    def step(trainable: Any, state: Any) -> Any:
        trainable, state = update(trainable, state)
        multiply(a, repeats).block_until_ready()
        return trainable, state

    return step


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--megabytes", type=float, default=100, help="of trained float32 arrays")
    parser.add_argument("--step", type=float, default=0.5, help="seconds of a step")
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to write (default: the system's temporary folder)")
    args = parser.parse_args()

    count = max(1, round(args.megabytes * 1e6 / (4 * WIDTH * WIDTH)))
    rng = np.random.default_rng(0)
    trainable: Any = {
        f"layer{i}": jnp.asarray(rng.normal(size=(WIDTH, WIDTH)), jnp.float32) for i in range(count)
    }
    tx = optax.adamw(1e-3)
    state = tx.init(trainable)
    saved_bytes = sum(a.nbytes for a in jax.tree.leaves((trainable, state)))
    step = make_step(args.step, tx)
    trainable, state = step(trainable, state)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        checkpoints = Checkpoints(Path(folder) / "checkpoints", keep=2)
        step_times: dict[bool, list[float]] = {False: [], True: []}
        blocked, complete, number = [], [], 0
        for _ in range(args.rounds):
            for saving in step_times:
                start = time.perf_counter()
                for i in range(args.every):
                    trainable, state = step(trainable, state)
                    number += 1
                    if saving and i == 0:
                        save = partial(checkpoints.save, number, trainable, state, {})
                        blocked.append(seconds(save))
                step_times[saving].append((time.perf_counter() - start) / args.every)
                checkpoints.wait()  # nothing is written during a stretch without saving
        for _ in range(args.rounds):
            number += 1
            start = time.perf_counter()
            checkpoints.save(number, trainable, state, {})
            checkpoints.wait()
            complete.append(time.perf_counter() - start)
        checkpoints.close()
    without, with_ = (statistics.median(step_times[saving]) for saving in (False, True))
    print(
        f"{saved_bytes / 1e6:.0f} MB a checkpoint, one in {args.every} steps, {args.rounds} rounds\n"
        f"step without saving: {without * 1e3:.1f} ms ({_range(step_times[False])}), with saving: "
        f"{with_ * 1e3:.1f} ms ({_range(step_times[True])}): {with_ / without - 1:+.1%}\n"
        f"a checkpoint blocks training for {statistics.median(blocked) * 1e3:.0f} ms "
        f"({_range(blocked)}); written alone it takes {statistics.median(complete) * 1e3:.0f} ms, "
        f"{saved_bytes / 1e6 / statistics.median(complete):.0f} MB/s"
    )


def _range(times: list[float]) -> str:
    return f"{min(times) * 1e3:.1f} to {max(times) * 1e3:.1f}"


if __name__ == "__main__":
    run(main)
