"""Chooses the device mesh of a run."""

import math

import jax
from jax.sharding import Mesh

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.parallel.sharding import make_mesh, parse_mesh
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.memory_estimate import MemoryEstimate, estimate_memory
from minigpt4_jax.utils.text import format_bytes

MAX_FILL = 0.9  # share of a device's memory that an estimate may fill


def choose_mesh(c: TrainConfig, config: ModelConfig) -> tuple[Mesh, str]:
    """-> (mesh over all devices, the reason for it): the one in `config.mesh`, or a chosen one.

    UserError: it does not match the devices, or the rows cannot be divided among them.
    """
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    sizes, reason = choose_mesh_sizes(c, config, jax.device_count(), memory)
    return make_mesh(sizes), reason


def choose_mesh_sizes(
    c: TrainConfig, config: ModelConfig, devices: int, memory: int | None
) -> tuple[dict[str, int], str]:
    """The axis sizes of `choose_mesh` for a number of devices, and the reason.

    memory: bytes per device, None if unknown.
    """
    rows = c.micro_batch_size
    if c.mesh not in ("", "auto"):
        return _parse_sizes(c, rows, devices), "as configured"
    row_shards = math.gcd(rows, devices)
    model = devices // row_shards
    if memory is None:
        sizes = {"fsdp": row_shards, "model": model}
        reason = "to save memory, because the memory of a device is unknown"
    else:
        sizes, reason = _shard_as_needed(c, config, row_shards, model, memory)
    if model > 1:
        reason += (
            f"; {rows} rows can be divided among {row_shards} of {devices} devices, so matrices are "
            "sharded too"
        )
    return sizes, f"chosen {reason}"


def _parse_sizes(c: TrainConfig, rows: int, devices: int) -> dict[str, int]:
    sizes = parse_mesh(c.mesh, devices)
    row_shards = sizes["data"] * sizes["fsdp"]
    if rows % row_shards:
        micro = f" in {c.accumulate} micro-batches of {rows}" if c.accumulate > 1 else ""
        raise UserError(
            f"config.batch_size {c.batch_size}{micro} rows cannot be divided among the {row_shards} "
            f"devices of data and fsdp in mesh {c.mesh!r}: expected a multiple of {row_shards}"
        )
    return sizes


def _shard_as_needed(
    c: TrainConfig, config: ModelConfig, row_shards: int, model: int, memory: int
) -> tuple[dict[str, int], str]:
    """The mesh of row_shards * model devices that shards weights over as few devices as their memory
    allows, since sharded ones are gathered in every step; and the reason."""
    rejected = ""
    for fsdp in (n for n in range(1, row_shards + 1) if row_shards % n == 0):
        sizes = {"data": row_shards // fsdp, "fsdp": fsdp, "model": model}
        estimate = estimate_memory(c, config, sizes)
        shards = fsdp * model
        weights = f"weights sharded over {shards} devices" if shards > 1 else "replicated weights"
        if estimate.total <= MAX_FILL * memory:
            return sizes, f"because {weights} take {_describe(estimate, memory)}{rejected}"
        rejected = f"; {weights} would take {format_bytes(estimate.total)}"
        if estimate.total <= memory:
            rejected += f", which may fit and is faster (--config.mesh={_format_sizes(sizes)})"
    return sizes, (
        f"to save memory; even so it takes {_describe(estimate, memory)} and may not fit: use fewer "
        "rows at a time (config.accumulate), config.remat or more devices"
    )


def _describe(estimate: MemoryEstimate, memory: int) -> str:
    return (
        f"an estimated {format_bytes(estimate.total)} of {format_bytes(memory)} per device "
        f"(weights {format_bytes(estimate.weights)}, trained part {format_bytes(estimate.trained)}, "
        f"activations {format_bytes(estimate.activations)}, "
        f"working memory {format_bytes(estimate.batch + estimate.working)})"
    )


def _format_sizes(sizes: dict[str, int]) -> str:
    """The inverse of `parse_mesh`."""
    return ",".join(f"{axis}:{n}" for axis, n in sizes.items() if n > 1) or "data:1"
