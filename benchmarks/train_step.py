"""One projection-only training step, ours beside the same model in PyTorch, in one run.

    python benchmarks/train_step.py                          # SmolLM2's size, for a CPU
    python benchmarks/train_step.py --size=vicuna7b          # MiniGPT-4 with Vicuna 7B, for a GPU

Each side lives in a process of its own, with the same random weights and batch, and they take turns:
a round is some steps of ours, then as many of PyTorch's. Reported are medians over the rounds. Both
sides run the frozen vision encoder, the language model forward and backward to the projection, and
AdamW. PyTorch is measured twice: with the loss of transformers (and the original), which
meets the output matrix at every position, and with our trick of labelled positions alone.
"""

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sizes

SIDES = ("ours", "PyTorch", "PyTorch, answers only")


@dataclasses.dataclass
class Side:
    """One side in its process: `step` runs once and returns the loss without waiting for it."""

    step: Callable[[], Any]
    wait: Callable[[Any], float]  # the loss as a number, once everything is done
    matmul: Callable[[int], Callable[[], Any]]  # n -> a product of two [n, n] matrices
    device_memory: Callable[[], int]  # peak bytes on an accelerator, 0 on a CPU


def make_ours(config: Any, batch: Any, dtype: str) -> Side:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch wants memory too
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from minigpt4_jax.checkpoint.loader import parameter_dtype
    from minigpt4_jax.checkpoint.parameters import STACKED, abstract_model
    from minigpt4_jax.training import optimizer
    from minigpt4_jax.training.train_step import make_step, split_model, trained_parts
    from minigpt4_jax.utils.malloc import keep_freed_memory

    keep_freed_memory()  # as training does
    kind = jnp.dtype(dtype)

    def fill(path: tuple, shape: tuple[int, ...]) -> jax.Array:
        array = np.empty(shape, parameter_dtype(path, kind))
        if path[:2] not in STACKED:
            array[...] = sizes.tensor(".".join(map(str, path)), shape)
        else:
            rest = ".".join(map(str, path[2:]))
            for i in range(shape[0]):
                array[i] = sizes.tensor(f"{path[0]}.{path[1]}.{i}.{rest}", shape[1:])
        return jnp.asarray(array)

    graphdef, state = nnx.split(abstract_model(config))
    flat = [(p, leaf.replace(fill(p, leaf.shape))) for p, leaf in nnx.to_flat_state(state)]
    model = nnx.merge(graphdef, nnx.from_flat_state(flat))
    split = split_model(model, trained_parts(freeze_vit=True, freeze_qformer=True), kind)
    tx = optimizer.adamw(split.decays)
    run = make_step(split, tx)
    hot = [split.trainable, tx.init(split.trainable)]
    on_device = jax.device_put(batch)

    def step() -> Any:
        hot[0], hot[1], metrics = run(hot[0], hot[1], split.frozen, on_device, 3e-5, 0)
        return metrics.loss

    def matmul(n: int) -> Callable[[], Any]:
        a = jnp.ones((n, n), kind)
        exact = jax.lax.Precision.HIGHEST if dtype == "float32" else None
        product = jax.jit(lambda a: jnp.matmul(a, a, precision=exact))
        return lambda: product(a)

    def memory() -> int:
        return int((jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0))

    return Side(
        step, lambda x: float(np.asarray(jax.block_until_ready(x)).ravel()[0]), matmul, memory
    )


def make_peer(config: Any, batch: Any, dtype: str, answers_only: bool) -> Side:
    import torch
    from torch_peer import Peer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = getattr(torch, dtype)
    peer = Peer(config, batch, kind, device)

    def matmul(n: int) -> Callable[[], Any]:
        a = torch.ones(n, n, dtype=kind, device=device)
        return lambda: a @ a

    def memory() -> int:
        return torch.cuda.max_memory_allocated() if device == "cuda" else 0

    return Side(lambda: peer.step(answers_only), lambda x: float(x.flatten()[0]), matmul, memory)


def serve(pipe: Any, side: str, config: Any, batch: Any, dtype: str) -> None:
    """A process that holds one side and does what it is told: (steps) -> (seconds, first loss)."""
    if side == "ours":
        made = make_ours(config, batch, dtype)
    else:
        made = make_peer(config, batch, dtype, answers_only=side != SIDES[1])
    clear_peak()
    while (order := pipe.recv()) is not None:
        kind, n = order
        if kind == "steps":
            start = time.perf_counter()
            results = [made.step() for _ in range(n)]
            last = made.wait(results[-1])
            pipe.send((time.perf_counter() - start, made.wait(results[0]), last))
        elif kind == "matmul":
            pipe.send(matmul_rate(made, n))
        elif kind == "memory":
            pipe.send((made.device_memory(), peak_host()))


def matmul_rate(side: Side, n: int) -> float:
    """The best of ten: floating-point operations a second of an [n, n] product."""
    product = side.matmul(n)
    side.wait(product())
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        side.wait(product())
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def clear_peak() -> None:
    """Forget the host memory that building the model took (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_host() -> int:
    """Peak resident bytes of this process since clear_peak."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(x.split()[1] for x in lines if x.startswith("VmHWM")))
    except (OSError, StopIteration):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Workers:
    """The processes of all sides, each asked in turn."""

    def __init__(self, sides: tuple[str, ...], config: Any, batch: Any, dtype: str):
        context = multiprocessing.get_context("spawn")
        self.pipes = {}
        self.processes = []
        for side in sides:
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, side, config, batch, dtype))
            process.start()
            theirs.close()
            self.pipes[side] = ours
            self.processes.append(process)
            self.ask(side, ("memory", 0))  # build one after the other

    def ask(self, side: str, order: tuple[str, int]) -> Any:
        time.sleep(0.3)  # threads of the side before stop spinning
        self.pipes[side].send(order)
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
    workers = Workers(SIDES, config, batch, dtype)
    try:
        report(workers, args, sizes.flops(config, batch), gpu)
    finally:
        workers.close()


def report(workers: Workers, args: argparse.Namespace, flops: float, gpu: bool) -> None:
    first = {side: workers.ask(side, ("steps", 1)) for side in SIDES}
    losses = {side: loss for side, (_, loss, _) in first.items()}
    n = 8192 if gpu else 2048
    peaks = {side: workers.ask(side, ("matmul", n)) for side in SIDES[:2]}
    peak = max(peaks.values())
    print(f"  loss before training: {', '.join(f'{s} {x:.6f}' for s, x in losses.items())}")
    print(
        f"  first step with compilation: {first['ours'][0]:.1f} s, PyTorch {first['PyTorch'][0]:.1f} s"
    )
    print(
        f"  matrix peak [{n}, {n}]: ours {peaks['ours'] / 1e9:.0f}, PyTorch {peaks['PyTorch'] / 1e9:.0f} "
        f"GFLOP/s; a step needs {flops / 1e9:.0f} GFLOP"
    )
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(args.rounds):
        for side in SIDES:
            seconds, _, _ = workers.ask(side, ("steps", args.steps))
            times[side].append(seconds / args.steps)
    print(
        f"  {'':24}{'s a step':>10}{'range':>18}{'share of peak':>15}{'peak memory':>13}{'ours / it':>11}"
    )
    for side in SIDES:
        mid = statistics.median(times[side])
        ratio = statistics.median(a / b for a, b in zip(times["ours"], times[side], strict=True))
        device, host = workers.ask(side, ("memory", 0))
        print(
            f"  {side:24}{mid:10.4f}{min(times[side]):10.4f}-{max(times[side]):.4f}"
            f"{flops / mid / peak:14.1%}{(device or host) / 2**30:9.2f} GiB{ratio:11.3f}",
            flush=True,
        )
    if gpu:
        seconds, _, last = workers.ask("ours", ("steps", 400))
        print(f"  400 steps of ours: {seconds:.1f} s (loss {last:.4f})")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=sorted(sizes.SIZES), default="smollm2")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "both"), default="both")
    parser.add_argument("--layers", type=int, help="fewer layers of the language model")
    parser.add_argument("--batch", type=int, help="rows in a batch")
    parser.add_argument("--answer", type=int, default=96, help="tokens of the longest answer")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps of each side in a round")
    args = parser.parse_args()
    for dtype in ("float32", "bfloat16") if args.dtype == "both" else (args.dtype,):
        measure(args, dtype)


if __name__ == "__main__":
    main()
