"""Time and host memory of loading a large model directory, shard by shard.

    python benchmarks/loading.py --workdir=DIR --layers=8 [--stored=int8] [--quantize=int8]
        [--processes=2] [--keep]

writes MiniGPT-4 with Vicuna 7B's sizes and so many of its layers, with random weights in bfloat16 or as
--stored says, and loads it as training does in so many processes of one device each, the weights split
over them (mesh fsdp). Prints for each process the seconds, the bytes that its devices hold, and the peak
of its resident memory above what it had before loading, less those bytes: what the host needed beside.
On CPU devices both are the same memory. Compared is it with the largest parameter, a group: one matrix
of all layers.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import sizes

from minigpt4_jax.checkpoint.parameters import parameter_shapes, part_of
from minigpt4_jax.checkpoint.quantized_tensors import quantize_tensors
from minigpt4_jax.checkpoint.writer import write_model
from minigpt4_jax.config import ModelConfig


def write(out: Path, config: ModelConfig, stored: str) -> None:
    """A model directory of such sizes."""

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, shape in parameter_shapes(config).items():
            large = len(shape) > 1 and part_of(name) in ("vit", "llm")
            dtype = ml_dtypes.bfloat16 if large else np.float32
            yield name, sizes.tensor(name, shape).astype(dtype)

    given: Iterator[tuple[str, np.ndarray]] = tensors()
    if stored != "bfloat16":
        given, config = quantize_tensors(given, stored), replace(config, quantize=stored)
    write_model(out, config, given)


def resident() -> int:
    """Bytes of this process's memory that are in RAM and not pages of files."""
    fields = Path("/proc/self/status").read_text().split()
    return int(fields[fields.index("RssAnon:") + 1]) * 1024


class Peak:
    """The largest `resident` while the body runs, looked at every 10 ms."""

    def __enter__(self) -> "Peak":
        self.bytes, self._over = resident(), threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.01):
            self.bytes = max(self.bytes, resident())

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()


def load(folder: Path, count: int, index: int, address: str, quantize: str | None) -> None:
    from minigpt4_jax.parallel import distributed

    if count > 1:
        distributed.initialize(distributed.ProcessOptions(address, count, index, 300), 300)
    import jax

    from minigpt4_jax.checkpoint.loader import load_model
    from minigpt4_jax.parallel.sharding import make_mesh

    mesh = make_mesh({"fsdp": jax.device_count()})
    jax.device_put(np.zeros(8)).block_until_ready()
    before, begun = resident(), time.perf_counter()
    with Peak() as peak:
        model, _ = load_model(
            folder, "bfloat16", trainable_parts={"projection"}, quantize=quantize, mesh=mesh
        )
        arrays = jax.tree.leaves(model)
        jax.block_until_ready(arrays)
        seconds = time.perf_counter() - begun
    held = sum(s.data.nbytes for a in arrays for s in a.addressable_shards)
    group = max(s.data.nbytes for a in arrays for s in a.addressable_shards)
    whole = max(a.nbytes for a in arrays)
    print(
        f"process {index} of {count}: {seconds:.1f} s, {held / 1e9:.2f} GB on its device, host peak beside "
        f"it {(peak.bytes - before - held) / 1e9:.2f} GB; the largest group is {whole / 1e9:.2f} GB, of "
        f"which the device holds {group / 1e9:.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--stored", choices=("bfloat16", "int8", "int4"), default="bfloat16")
    parser.add_argument("--quantize", choices=("int8", "int4"))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="the model, for another call")
    parser.add_argument("--as", nargs=2, dest="one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    model = args.workdir / f"{args.stored}-{args.layers}"
    if args.one:
        load(model, args.processes, int(args.one[0]), args.one[1], args.quantize)
        return
    if not model.exists():
        write(model, sizes.model_config("vicuna7b", args.layers), args.stored)
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    command = [sys.executable, __file__, *sys.argv[1:], "--as"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen([*command, str(n), address], env=environment)
        for n in range(args.processes)
    ]
    codes = [process.wait() for process in started]
    if not args.keep:
        shutil.rmtree(model)
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
