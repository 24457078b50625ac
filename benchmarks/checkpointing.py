"""What a checkpoint costs: the time of a training step with and without saving, in one run.

    python benchmarks/checkpointing.py                      # 100 MB trained, saved every 10 steps
    python benchmarks/checkpointing.py --megabytes=500 --every=50 --folder=/mnt/disk/tmp

A stand-in for the model keeps the device busy for `--step` seconds a step; what is saved is real:
the trained arrays and AdamW's two moments, three times `--megabytes`, through the run's own
Checkpoints. Stretches with and without saving take turns; reported are medians. `save` returns
once the arrays are copied and hashed; the files are written beside the next steps.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from minigpt4_jax.training.checkpoints import Checkpoints

WIDTH = 1024


def make_step(seconds: float, tx: Any) -> Callable[..., Any]:
    """A jitted update of every array, and matrix products until a step takes so long."""

    @jax.jit
    def busy(a: jax.Array, rounds: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, rounds, lambda _, a: jnp.tanh(a @ a), a)

    @jax.jit
    def update(trainable: Any, state: Any) -> Any:
        gradient = jax.tree.map(lambda a: a * 1e-3, trainable)
        updates, state = tx.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state

    a = jnp.full((WIDTH, WIDTH), 1e-3)
    busy(a, 1).block_until_ready()
    begun = time.perf_counter()
    busy(a, 20).block_until_ready()
    rounds = max(1, round(20 * seconds / (time.perf_counter() - begun)))

    def step(trainable: Any, state: Any) -> Any:
        trainable, state = update(trainable, state)
        busy(a, rounds).block_until_ready()
        return trainable, state

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=100, help="of trained float32 arrays")
    parser.add_argument("--step", type=float, default=0.5, help="seconds of a step")
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", help="where to write; default: the system's for temporary files"
    )
    args = parser.parse_args()

    count = max(1, round(args.megabytes * 1e6 / (4 * WIDTH * WIDTH)))
    rng = np.random.default_rng(0)
    trainable: Any = {
        f"layer{i}": jnp.asarray(rng.normal(size=(WIDTH, WIDTH)), jnp.float32) for i in range(count)
    }
    tx = optax.adamw(1e-3)
    state = tx.init(trainable)
    saved = sum(a.nbytes for a in jax.tree.leaves((trainable, state)))
    step = make_step(args.step, tx)
    trainable, state = step(trainable, state)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        checkpoints = Checkpoints(Path(folder) / "checkpoints", keep=2)
        times: dict[bool, list[float]] = {False: [], True: []}
        blocked, written, number = [], [], 0
        for _ in range(args.rounds):
            for saving in times:
                begun = time.perf_counter()
                for i in range(args.every):
                    trainable, state = step(trainable, state)
                    number += 1
                    if saving and i == 0:
                        asked = time.perf_counter()
                        checkpoints.save(number, trainable, state, {})
                        blocked.append(time.perf_counter() - asked)
                times[saving].append((time.perf_counter() - begun) / args.every)
                if saving:
                    checkpoints.wait()  # a stretch without saving is without writing, too
        for _ in range(args.rounds):  # how long the writing takes when nothing runs beside it
            number += 1
            asked = time.perf_counter()
            checkpoints.save(number, trainable, state, {})
            checkpoints.wait()
            written.append(time.perf_counter() - asked)
        checkpoints.close()
    without, with_ = (statistics.median(times[saving]) for saving in (False, True))
    print(
        f"{saved / 1e6:.0f} MB a checkpoint, one in {args.every} steps, {args.rounds} rounds\n"
        f"a step without saving {without * 1e3:.1f} ms ({spread(times[False])}), with saving "
        f"{with_ * 1e3:.1f} ms ({spread(times[True])}): {with_ / without - 1:+.1%}\n"
        f"a checkpoint blocks training for {statistics.median(blocked) * 1e3:.0f} ms "
        f"({spread(blocked)}); written alone it takes {statistics.median(written) * 1e3:.0f} ms, "
        f"{saved / 1e6 / statistics.median(written):.0f} MB/s"
    )


def spread(seconds: list[float]) -> str:
    return f"{min(seconds) * 1e3:.1f} to {max(seconds) * 1e3:.1f}"


if __name__ == "__main__":
    main()
