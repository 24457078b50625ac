"""The lines that a run prints when it starts."""

import math
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from minigpt4_jax.parallel.multihost import is_multiprocess
from minigpt4_jax.parallel.sharding import describe_mesh
from minigpt4_jax.quantization.float8 import has_float8_products
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.train_step import Frozen, OptState, Trainable
from minigpt4_jax.utils.text import format_bytes


def summarize_run(
    c: TrainConfig, step: int, trainable: Trainable, frozen: Frozen, workdir: Path
) -> str:
    """What is trained, on what, and where the log is. step: updates done by an earlier start."""
    start = f"continuing at step {step}" if step else "starting"
    num_trained = sum(a.size for a in trainable.values())
    num_parameters = num_trained + sum(a.size for a in frozen)
    processes = f", {jax.process_count()} processes" if is_multiprocess() else ""
    return (
        f"{start}: {c.model}, {num_trained:,} of {num_parameters:,} parameters trained, {_dtypes(c)}; "
        f"batch {c.batch_size}, {c.steps} steps; device {jax.devices()[0].device_kind}{processes}; "
        f"log in {workdir}"
    )


def _dtypes(c: TrainConfig) -> str:
    """What frozen matrices are multiplied in."""
    if not c.frozen_dtype:
        return c.dtype
    if has_float8_products():
        return f"{c.dtype}, frozen matrices in {c.frozen_dtype}"
    return (
        f"{c.dtype}, frozen matrices in {c.frozen_dtype} (this device has no such products: they are "
        f"computed in {c.dtype} from rounded factors, which is slower than without config.frozen_dtype)"
    )


def summarize_sharding(
    mesh: Mesh, reason: str, trainable: Trainable, frozen: Frozen, opt_state: OptState
) -> str:
    """The mesh, why it was chosen, and how arrays are laid out on it."""
    per_device = sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in frozen)
    sharded = [a for a in frozen if not a.sharding.is_fully_replicated]
    layout = "replicated"
    if sharded:
        axes = sorted({axis for a in sharded for axis in _axes(a)})
        layout = f"{len(sharded)} of {len(frozen)} arrays are sharded over {' and '.join(axes)}"
    return (
        f"mesh {describe_mesh(mesh)} of {mesh.size} devices, {reason}. Frozen weights: "
        f"{_total_bytes(frozen)}, {format_bytes(per_device)} per device ({layout}); trained part "
        f"{_total_bytes(trainable)} and optimizer state {_total_bytes(opt_state)}, replicated; rows are "
        "sharded over data and fsdp"
    )


def _axes(a: Any) -> list[str]:
    """The mesh axes that an array with a NamedSharding is sharded over."""
    axes: list[str] = []
    for axis in a.sharding.spec:
        axes += [axis] if isinstance(axis, str) else axis or ()
    return axes


def _total_bytes(tree: Any) -> str:
    return format_bytes(sum(a.nbytes for a in jax.tree.leaves(tree)))
