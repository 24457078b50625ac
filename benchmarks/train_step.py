"""One projection-only training step beside the same model in PyTorch, in turns.

    python benchmarks/train_step.py                          # SmolLM2's size, for a CPU
    python benchmarks/train_step.py --size=vicuna7b          # MiniGPT-4 with Vicuna 7B, for a GPU

Each side runs in a process of its own, with the same random weights and batch. They take turns: a round is
some steps here, then as many in PyTorch. Both run the frozen vision encoder, the language model forward and
backward to the projection, and AdamW. PyTorch is measured twice: with the loss of transformers (and of the
original), which applies the output matrix to every position, and to labelled positions only, as is done here.
Prints the losses before training, and for each side the median and range of the time of a step, its share of
the measured matrix-product peak, peak memory, and the ratio of our time to its time.
"""

import argparse
import dataclasses
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sizes
from common import (
    Table,
    argument_parser,
    median_ratio,
    peak_resident_bytes,
    reset_peak_resident,
    seconds,
)

from minigpt4_jax.errors import run

OURS, PYTORCH, PYTORCH_LABELS_ONLY = "ours", "PyTorch", "PyTorch, labelled positions only"
SIDES = (OURS, PYTORCH, PYTORCH_LABELS_ONLY)


@dataclasses.dataclass
class Side:
    """One implementation of the step."""

    step: Callable[[], Any]  # dispatches a step and returns its loss without waiting
    wait: Callable[[Any], float]  # waits for a loss and returns it as a number
    matmul: Callable[[int], Callable[[], Any]]  # n -> a product of two [n, n] matrices
    device_memory: Callable[[], int]  # peak bytes on an accelerator, 0 on a CPU


def make_ours(config: Any, batch: Any, dtype: str) -> Side:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave memory to PyTorch
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from minigpt4_jax.checkpoint.loader import parameter_dtype
    from minigpt4_jax.checkpoint.parameters import abstract_model, is_stacked
    from minigpt4_jax.training import optimizer
    from minigpt4_jax.training.train_step import make_step, split_model, trained_parts
    from minigpt4_jax.utils.malloc import keep_freed_memory
    from minigpt4_jax.utils.platform import unrolls_layers

    keep_freed_memory()  # as training does
    weight_dtype = jnp.dtype(dtype)

    def fill(path: tuple[Any, ...], shape: tuple[int, ...]) -> jax.Array:
        array = np.empty(shape, parameter_dtype(path, weight_dtype))
        if not is_stacked(path):
            array[...] = sizes.tensor(".".join(map(str, path)), shape)
        else:
            rest = ".".join(map(str, path[2:]))
            for i in range(shape[0]):
                array[i] = sizes.tensor(f"{path[0]}.{path[1]}.{i}.{rest}", shape[1:])
        return jnp.asarray(array)

    graphdef, state = nnx.split(abstract_model(config, stacked=not unrolls_layers()))
    flat = [(p, leaf.replace(fill(p, leaf.shape))) for p, leaf in nnx.to_flat_state(state)]
    model = nnx.merge(graphdef, nnx.from_flat_state(flat))
    split = split_model(model, trained_parts(freeze_vit=True, freeze_qformer=True), weight_dtype)
    tx = optimizer.adamw(split.decay_mask)
    train = make_step(split, tx, mesh=None)
    trainable, opt_state = split.trainable, tx.init(split.trainable)
    batch_on_device = jax.device_put(batch)

    def step() -> Any:
        nonlocal trainable, opt_state
        trainable, opt_state, metrics = train(
            trainable, opt_state, split.frozen, batch_on_device, 3e-5, 0
        )
        return metrics.loss

    def matmul(n: int) -> Callable[[], Any]:
        a = jnp.ones((n, n), weight_dtype)
        precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
        product = jax.jit(lambda a: jnp.matmul(a, a, precision=precision))
        return lambda: product(a)

    def memory() -> int:
        return int((jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0))

    return Side(
        step, lambda x: float(np.asarray(jax.block_until_ready(x)).ravel()[0]), matmul, memory
    )


def make_pytorch(config: Any, batch: Any, dtype: str, labels_only: bool) -> Side:
    import torch
    from torch_peer import TorchPeer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch_dtype = getattr(torch, dtype)
    peer = TorchPeer(config, batch, torch_dtype, device)

    def matmul(n: int) -> Callable[[], Any]:
        a = torch.ones(n, n, dtype=torch_dtype, device=device)
        return lambda: a @ a

    def memory() -> int:
        return torch.cuda.max_memory_allocated() if device == "cuda" else 0

    return Side(lambda: peer.step(labels_only), lambda x: float(x.flatten()[0]), matmul, memory)


def serve(pipe: Any, name: str, config: Any, batch: Any, dtype: str) -> None:
    """Process of one side: executes (command, n) from the pipe until None."""
    if name == OURS:
        side = make_ours(config, batch, dtype)
    else:
        side = make_pytorch(config, batch, dtype, labels_only=name == PYTORCH_LABELS_ONLY)
    reset_peak_resident()  # what building the model took does not count
    while (message := pipe.recv()) is not None:
        command, n = message
        if command == "steps":  # -> (seconds, first loss, last loss)
            start = time.perf_counter()
            losses = [side.step() for _ in range(n)]
            last = side.wait(losses[-1])
            pipe.send((time.perf_counter() - start, side.wait(losses[0]), last))
        elif command == "matmul":
            pipe.send(matmul_flops_per_second(side, n))
        elif command == "memory":
            pipe.send(side.device_memory() or peak_resident_bytes())


def matmul_flops_per_second(side: Side, n: int) -> float:
    """FLOP/s of an [n, n] product, the best of ten."""
    product = side.matmul(n)
    side.wait(product())
    return 2 * n**3 / min(seconds(lambda: side.wait(product())) for _ in range(10))


class Workers:
    """The processes of all sides; they are asked one at a time."""

    def __init__(self, config: Any, batch: Any, dtype: str):
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = {}, []
        for side in SIDES:
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, side, config, batch, dtype))
            process.start()
            theirs.close()
            self.pipes[side] = ours
            self.processes.append(process)
            self.ask(side, "memory")  # wait: the sides are built one after another

    def ask(self, side: str, command: str, n: int = 0) -> Any:
        time.sleep(0.3)  # let the threads of the previous side stop spinning
        self.pipes[side].send((command, n))
        return self.pipes[side].recv()

    def close(self) -> None:
        for pipe in self.pipes.values():
            pipe.send(None)
        for process in self.processes:
            process.join()


def measure(args: argparse.Namespace, dtype: str) -> None:
    config = sizes.model_config(args.size, args.layers)
    rows = args.batch or sizes.BATCH[args.size]
    batch = sizes.make_batch(config, rows, args.answer)
    gpu = Path("/proc/driver/nvidia").exists()
    print(
        f"\n{args.size}, {config.llm.layers} layers, {dtype}: {rows} rows of {batch.tokens.shape[1]} "
        f"tokens, {(batch.label_positions >= 0).sum()} labelled, "
        f"{config.visual_tokens} visual tokens an image",
        flush=True,
    )
    workers = Workers(config, batch, dtype)
    try:
        report(workers, args, sizes.flops(config, batch), gpu)
    finally:
        workers.close()


def report(workers: Workers, args: argparse.Namespace, flops: float, gpu: bool) -> None:
    first = {side: workers.ask(side, "steps", 1) for side in SIDES}
    n = 8192 if gpu else 2048
    peaks = {side: workers.ask(side, "matmul", n) for side in (OURS, PYTORCH)}
    peak = max(peaks.values())
    losses = ", ".join(f"{side} {loss:.6f}" for side, (_, loss, _) in first.items())
    print(f"loss before training: {losses}")
    print(
        f"first step with compilation: {first[OURS][0]:.1f} s, PyTorch {first[PYTORCH][0]:.1f} s\n"
        f"matrix peak [{n}, {n}]: ours {peaks[OURS] / 1e9:.0f}, PyTorch {peaks[PYTORCH] / 1e9:.0f} "
        f"GFLOP/s; a step needs {flops / 1e9:.0f} GFLOP"
    )
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(args.rounds):
        for side in SIDES:
            elapsed, _, _ = workers.ask(side, "steps", args.steps)
            times[side].append(elapsed / args.steps)
    table = Table(
        {
            "": (34, ""),
            "s a step": (10, ".4f"),
            "range": (18, ""),
            "share of peak": (15, ".1%"),
            "peak memory": (13, ""),
            "ours / it": (11, ".3f"),
        }
    )
    for side in SIDES:
        median = statistics.median(times[side])
        memory = workers.ask(side, "memory") / 2**30
        table.row(
            side, median, f"{min(times[side]):.4f}-{max(times[side]):.4f}", flops / median / peak,
            f"{memory:.2f} GiB", median_ratio(times[OURS], times[side]),
        )  # fmt: skip
    if gpu:
        elapsed, _, last = workers.ask(OURS, "steps", 400)
        print(f"400 steps of ours: {elapsed:.1f} s (loss {last:.4f})")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--size", choices=sorted(sizes.SIZES), default="smollm2")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "both"), default="both")
    parser.add_argument("--layers", type=int, help="fewer layers of the language model")
    parser.add_argument("--batch", type=int, help="rows of a batch")
    parser.add_argument("--answer", type=int, default=96, help="tokens of the longest answer")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps of each side in a round")
    args = parser.parse_args()
    for dtype in ("float32", "bfloat16") if args.dtype == "both" else (args.dtype,):
        measure(args, dtype)


if __name__ == "__main__":
    run(main)
