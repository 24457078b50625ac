"""Time and host memory of loading a large model directory.

    python benchmarks/loading.py --workdir=DIR --layers=8 [--stored=int8] [--quantize=int8]
        [--dtype=float32] [--lists] [--cold] [--processes=2] [--keep]

Writes MiniGPT-4 with the sizes of Vicuna 7B and `--layers` of its layers, random weights in bfloat16 or as
--stored says. Then loads it as training does (--lists: as chat does, one array for each layer), in one or
several processes of one device each, with the weights sharded over them (mesh fsdp). Prints for each process:
seconds, bytes of the files in a second, bytes on its device, and the host overhead, which is the peak of its
resident memory above the value before loading, minus those bytes (on a CPU both are the same memory); and for
comparison the size of the largest parameter, the stacked matrices of all layers. Before it, how long it takes
to read the files into new memory and do nothing with them, which is the floor. --cold: files are dropped from
the page cache before each of the two, so that they come from the disk.
"""

import argparse
import os
import shutil
import sys
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


def drop_from_page_cache(folder: Path) -> None:
    """Let the next read of the model's files come from the disk."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def print_floor(folder: Path) -> None:
    """Print how fast the files can be read into new memory, by one thread."""
    arrays, start = [], time.perf_counter()
    for path in folder.glob("*.safetensors"):
        arrays.append(np.fromfile(path, np.uint8))
    elapsed, total = time.perf_counter() - start, sum(array.nbytes for array in arrays)
    print(f"reading the files alone: {elapsed:.1f} s, {total / elapsed / 1e9:.2f} GB/s", flush=True)


def load(args: argparse.Namespace, folder: Path, index: int, address: str) -> None:
    """Load the model in process `index` and print the figures."""
    count: int = args.processes
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
            folder, args.dtype, stacked=not args.lists, trainable_parts={"projection"},
            quantize=args.quantize, mesh=mesh,
        )  # fmt: skip
        arrays = jax.tree.leaves(model)
        jax.block_until_ready(arrays)
        elapsed = time.perf_counter() - start
    shard_bytes = [s.data.nbytes for a in arrays for s in a.addressable_shards]
    on_device = sum(shard_bytes)
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    print(
        f"process {index} of {count}: {elapsed:.1f} s, {stored / elapsed / 1e9:.2f} GB/s of the files, "
        f"{on_device / 1e9:.2f} GB on its device, host overhead "
        f" {(peak.bytes - before - on_device) / 1e9:.2f} GB; the largest parameter has "
        f"{max(a.nbytes for a in arrays) / 1e9:.2f} GB, {max(shard_bytes) / 1e9:.2f} on the device",
        flush=True,
    )


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--stored", choices=("bfloat16", "int8", "int4"), default="bfloat16")
    parser.add_argument("--quantize", choices=("int8", "int4"), help="quantize while loading")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--lists", action="store_true", help="an array for each layer, as in chat")
    parser.add_argument("--cold", action="store_true", help="files come from the disk")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="keep the model for another run")
    parser.add_argument("--process", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    model = args.workdir / f"{args.stored}-{args.layers}"
    if args.process:
        index, address = args.process
        load(args, model, int(index), address)
        return 0
    if not model.exists():
        write_random(model, sizes.model_config("vicuna7b", args.layers), args.stored)
    if args.cold:
        drop_from_page_cache(model)
    print_floor(model)
    if args.cold:
        drop_from_page_cache(model)
    command, address = [__file__, *sys.argv[1:]], local_address()
    processes = start_cpu_processes(
        [[*command, "--process", index, address] for index in range(args.processes)]
    )
    codes: list[int] = [process.wait() for process in processes]
    if not args.keep:
        shutil.rmtree(model)
    return max(codes)


if __name__ == "__main__":
    run(main)
