"""Memory of a training step of MiniGPT-v2 7B on one chip, from shapes; nothing is run.

    python benchmarks/train_memory.py [--rows=1] [--text=1024] [--no-remat] [--packed] [--layers=32]
        [--topology=v5p:1x1x1] [--code]

Compiles the full-size step (448 px, 256 visual tokens and `--text` others per row, projection and LoRA
trained) with the TPU compiler (libtpu, `pip install '.[tpu]'`) and prints its memory: arguments (weights,
trained masters, optimizer state, batch) and temporaries (activations). --packed: packed rows, which
`python -m minigpt4_jax.compile` does not support. --code: generate machine code too, in minutes instead of
seconds. --topology=none: compile for this machine; on a CPU temporaries include float32 copies of weights and
activations, an upper bound for an accelerator.
"""

import argparse
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
from common import argument_parser
from jax.sharding import Mesh

from minigpt4_jax.aot import programs
from minigpt4_jax.aot.compiler import OutOfMemory, compile_lowered, exit_without_waiting
from minigpt4_jax.aot.presets import PRESETS
from minigpt4_jax.aot.topology import slice_devices
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import UserError, run
from minigpt4_jax.models.minigpt import Batch
from minigpt4_jax.parallel.sharding import make_mesh, single_device_mesh
from minigpt4_jax.training import optimizer
from minigpt4_jax.training.train_step import make_step, trained_parts
from minigpt4_jax.utils import platform

TRAINED = trained_parts(freeze_vit=True, freeze_qformer=True)
DEVICE_GB = 80


ShapeDtypeStruct: Any = jax.ShapeDtypeStruct  # JAX does not annotate it


def batch_shapes(config: ModelConfig, rows: int, text: int, packed: bool) -> Batch:
    """Rows with one image each, half of the text labelled."""
    t, edge = text + config.visual_tokens, config.vision.image_size

    def ints(*shape: int) -> Any:
        return ShapeDtypeStruct(shape, jnp.int32)

    pixels: Any = ShapeDtypeStruct((rows, 1, edge, edge, 3), jnp.uint8)
    packing = [ints(rows, t)] * 3 if packed else []
    return Batch(pixels, ints(rows, t), ints(rows), ints(rows, text // 2), *packing)


def lowered_step(config: ModelConfig, args: argparse.Namespace, mesh: Mesh) -> Any:
    """The training step, lowered for a mesh."""
    split = programs.split_shapes(config, TRAINED, mesh)
    tx = optimizer.adamw(split.decay_mask)
    step: Any = make_step(
        split, tx, mesh, remat=not args.no_remat, dropout_seed=0, dropout_in=["lora"]
    )
    inputs = (
        jax.eval_shape(tx.init, split.trainable),
        batch_shapes(config, args.rows, args.text, args.packed),
        ShapeDtypeStruct((), jnp.float32),
        ShapeDtypeStruct((), jnp.int32),
    )
    opt_state, *inputs = programs.replicate_shapes(inputs, mesh)
    with platform.compiling_for(mesh.devices.flat[0].platform):
        return step.lower(split.trainable, opt_state, split.frozen, *inputs)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--text", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--no-remat", action="store_true")
    parser.add_argument("--topology", default="v5p:1x1x1", help="its first chip is used")
    parser.add_argument("--packed", action="store_true", help="packed rows")
    parser.add_argument("--code", action="store_true", help="generate machine code too")
    args = parser.parse_args()
    llm = dataclasses.replace(PRESETS["v2"].llm, layers=args.layers)
    config = dataclasses.replace(PRESETS["v2"], llm=llm).check()
    if args.topology == "none":
        mesh = single_device_mesh()
    else:
        jax.config.update("jax_platforms", "cpu")  # do not look for a TPU
        mesh = make_mesh({}, slice_devices(args.topology)[:1])
    start = time.perf_counter()
    result = compile_lowered(lowered_step(config, args, mesh), machine_code=args.code)
    if isinstance(result, OutOfMemory):
        raise UserError(
            f"it needs {result.needed / 1e9:.2f} GB of {result.available / 1e9:.2f} GB: use a larger "
            "chip for --topology, or fewer rows"
        )
    device = mesh.devices.flat[0].device_kind
    print(
        f"{config.variant} {args.layers} layers, {args.rows} x {args.text + config.visual_tokens} "
        f"tokens, remat {not args.no_remat}, {device}, {time.perf_counter() - start:.0f} s"
    )
    for name, size in dataclasses.asdict(result.memory).items():
        print(f"{name:14}{size / 1e9:8.2f} GB")
    print(f"{'total':14}{result.memory.peak / 1e9:8.2f} GB of {DEVICE_GB} GB")


if __name__ == "__main__":
    run(main, exit_without_waiting)
