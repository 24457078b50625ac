"""Time and host memory of loading a large model directory.

    python benchmarks/loading.py --workdir=DIR --layers=8 [--stored=int8] [--quantize=int8]
        [--processes=2] [--keep]

Writes MiniGPT-4 with the sizes of Vicuna 7B and `--layers` of its layers, random weights in bfloat16 or as
--stored says. Then loads it as training does, in one or several processes of one device each, with the
weights sharded over them (mesh fsdp). Prints for each process: seconds, bytes on its device, and the host
overhead, which is the peak of its resident memory above the value before loading, minus those bytes (on a CPU
both are the same memory); and for comparison the size of the largest parameter, the stacked matrices of all
layers.
"""

import argparse
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import sizes
from common import argument_parser, local_address, resident_bytes, start_cpu_processes

from minigpt4_jax.checkpoint.parameters import parameter_shapes, part_of
from minigpt4_jax.checkpoint.quantized_tensors import quantize_tensors
from minigpt4_jax.checkpoint.writer import write_model
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import run


def write_random(out: Path, config: ModelConfig, stored: str) -> None:
    """Write a model directory with random weights."""

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, shape in parameter_shapes(config).items():
            large = len(shape) > 1 and part_of(name) in ("vit", "llm")
            dtype = ml_dtypes.bfloat16 if large else np.float32
            yield name, sizes.tensor(name, shape).astype(dtype)

    weights: Iterator[tuple[str, np.ndarray]] = tensors()
    if stored != "bfloat16":
        weights, config = quantize_tensors(weights, stored), replace(config, quantize=stored)
    write_model(out, config, weights)


class PeakMemory:
    """The peak of `resident_bytes` inside a with block, sampled every 10 ms."""

    def __enter__(self) -> "PeakMemory":
        self.bytes, self._done = resident_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(0.01):
            self.bytes = max(self.bytes, resident_bytes())

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()


def load(folder: Path, count: int, index: int, address: str, quantize: str | None) -> None:
    """Load the model in process `index` of `count` and print the figures."""
    from minigpt4_jax.parallel import distributed

    if count > 1:
        distributed.initialize(distributed.ProcessOptions(address, count, index, 300), 300)
    import jax

    from minigpt4_jax.checkpoint.loader import load_model
    from minigpt4_jax.parallel.sharding import make_mesh

    mesh = make_mesh({"fsdp": jax.device_count()})
    jax.device_put(np.zeros(8)).block_until_ready()
    before, start = resident_bytes(), time.perf_counter()
    with PeakMemory() as peak:
        model, _ = load_model(
            folder, "bfloat16", trainable_parts={"projection"}, quantize=quantize, mesh=mesh
        )
        arrays = jax.tree.leaves(model)
        jax.block_until_ready(arrays)
        elapsed = time.perf_counter() - start
    shard_bytes = [s.data.nbytes for a in arrays for s in a.addressable_shards]
    on_device = sum(shard_bytes)
    print(
        f"process {index} of {count}: {elapsed:.1f} s, {on_device / 1e9:.2f} GB on its device, host "
        f"overhead {(peak.bytes - before - on_device) / 1e9:.2f} GB; the largest parameter has "
        f"{max(a.nbytes for a in arrays) / 1e9:.2f} GB, {max(shard_bytes) / 1e9:.2f} on the device",
        flush=True,
    )


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--stored", choices=("bfloat16", "int8", "int4"), default="bfloat16")
    parser.add_argument("--quantize", choices=("int8", "int4"), help="quantize while loading")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="keep the model for another run")
    parser.add_argument("--process", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    model = args.workdir / f"{args.stored}-{args.layers}"
    if args.process:
        index, address = args.process
        load(model, args.processes, int(index), address, args.quantize)
        return 0
    if not model.exists():
        write_random(model, sizes.model_config("vicuna7b", args.layers), args.stored)
    options = [f"--workdir={args.workdir}", f"--layers={args.layers}", f"--stored={args.stored}"]
    options += [f"--quantize={args.quantize}"] if args.quantize else []
    command, address = [__file__, *options, f"--processes={args.processes}"], local_address()
    processes = start_cpu_processes(
        [[*command, "--process", index, address] for index in range(args.processes)]
    )
    codes: list[int] = [process.wait() for process in processes]
    if not args.keep:
        shutil.rmtree(model)
    return max(codes)


if __name__ == "__main__":
    run(main)
