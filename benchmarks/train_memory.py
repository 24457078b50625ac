"""What a training step of MiniGPT-v2 7B would take on one chip, without having one.

    python benchmarks/train_memory.py [--rows=1] [--text=1024] [--no-remat] [--packed] [--layers=32]
        [--topology=v5p:1x1x1] [--code]

compiles the step at full size from shapes alone (448 px, 256 visual tokens and `--text` others a
row, projection and LoRA trained) with the compiler for TPUs (libtpu, `pip install '.[tpu]'`) and prints what
it plans: arguments (weights, trained masters, optimizer, batch) and temporaries (activations).
--packed: rows with segments, which `python -m minigpt4_jax.compile` does not compile. --code: machine code
too, minutes instead of seconds. --topology=none is for this machine instead: on a CPU temporaries hold
float32 copies of weights and activations, so they bound from above what an accelerator needs.
"""

import argparse
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from minigpt4_jax.aot import programs
from minigpt4_jax.aot.compiler import OutOfMemory, compile_lowered, exit_without_waiting
from minigpt4_jax.aot.presets import PRESETS
from minigpt4_jax.aot.topology import slice_devices
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import Parser, UserError, run
from minigpt4_jax.models.minigpt import Batch
from minigpt4_jax.parallel.sharding import make_mesh, single_device_mesh
from minigpt4_jax.training import optimizer
from minigpt4_jax.training.train_step import make_step, trained_parts
from minigpt4_jax.utils import platform

PARTS = trained_parts(freeze_vit=True, freeze_qformer=True)
DEVICE_GB = 80


def batch_shapes(config: ModelConfig, rows: int, text: int, packed: bool) -> Batch:
    """Rows of one image each, half of the text labelled."""
    t, edge = text + config.visual_tokens, config.vision.image_size

    def ints(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    pixels: Any = jax.ShapeDtypeStruct((rows, 1, edge, edge, 3), jnp.uint8)
    extra = [ints(rows, t)] * 3 if packed else []
    return Batch(pixels, ints(rows, t), ints(rows), ints(rows, text // 2), *extra)


def lowered_step(config: ModelConfig, args: argparse.Namespace, mesh: Mesh) -> Any:
    """The step of a run, from shapes on a mesh."""
    split = programs.split_shapes(config, PARTS, mesh)
    tx = optimizer.adamw(split.decays)
    step: Any = make_step(split, tx, remat=not args.no_remat, dropout_seed=0, dropout_in=["lora"])
    numbers = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    batch = batch_shapes(config, args.rows, args.text, args.packed)
    given = (jax.eval_shape(tx.init, split.trainable), batch, *numbers)
    opt_state, batch, *numbers = programs.replicate_shapes(given, mesh)
    with platform.compiling_for(mesh.devices.flat[0].platform):
        return step.lower(split.trainable, opt_state, split.frozen, batch, *numbers)


def main() -> None:
    p = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--rows", type=int, default=1)
    p.add_argument("--text", type=int, default=1024)
    p.add_argument("--layers", type=int, default=32)
    p.add_argument("--no-remat", action="store_true")
    p.add_argument("--topology", default="v5p:1x1x1", help="of which the first chip is taken")
    p.add_argument("--packed", action="store_true", help="rows with segments")
    p.add_argument("--code", action="store_true", help="machine code too: minutes, and its size")
    args = p.parse_args()
    llm = dataclasses.replace(PRESETS["v2"].llm, layers=args.layers)
    config = dataclasses.replace(PRESETS["v2"], llm=llm).check()
    if args.topology == "none":
        mesh = single_device_mesh()
    else:
        jax.config.update("jax_platforms", "cpu")  # no TPU is looked for
        mesh = make_mesh({}, slice_devices(args.topology)[:1])
    begun = time.perf_counter()
    plan = compile_lowered(lowered_step(config, args, mesh), machine_code=args.code)
    if isinstance(plan, OutOfMemory):
        raise UserError(
            f"it takes {plan.needed / 1e9:.2f} GB of {plan.available / 1e9:.2f} GB: take a larger "
            "chip for --topology, or fewer rows"
        )
    device = mesh.devices.flat[0].device_kind
    print(
        f"{config.variant} {args.layers} layers, {args.rows} x {args.text + config.visual_tokens} "
        f"tokens, remat {not args.no_remat}, {device}, {time.perf_counter() - begun:.0f} s"
    )
    for name, size in dataclasses.asdict(plan.memory).items():
        print(f"{name:14}{size / 1e9:8.2f} GB")
    print(f"{'together':14}{plan.memory.peak / 1e9:8.2f} GB of {DEVICE_GB} GB")


if __name__ == "__main__":
    run(main, exit_without_waiting)
