"""Over which devices a run is laid, and what it says about that when it starts."""

import math
from typing import Any

import jax
from jax.sharding import Mesh

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.data.batching import ProcessShard
from minigpt4_jax.errors import UserError
from minigpt4_jax.parallel.sharding import batch_sharding, describe_mesh, make_mesh, parse_mesh
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.memory_estimate import estimate

FILLED = 0.9  # of a device's memory, as far as an estimate may fill it


def choose_mesh(c: TrainConfig, config: ModelConfig) -> tuple[Mesh, str]:
    """The mesh over all devices that `config.mesh` names or leaves to be chosen, and the reason.

    UserError: it is not one of the devices there are, or the rows do not divide among them.
    """
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    sizes, why = choose_sizes(c, config, jax.device_count(), memory)
    return make_mesh(sizes), why


def choose_sizes(
    c: TrainConfig, config: ModelConfig, devices: int, memory: int | None
) -> tuple[dict[str, int], str]:
    """The sizes of `choose_mesh` over so many devices, and the reason. memory: bytes of a device,
    None where it is not known."""
    rows = c.batch_size // c.accumulate
    if c.mesh not in ("", "auto"):
        sizes = parse_mesh(c.mesh, devices)
        split = sizes["data"] * sizes["fsdp"]
        if rows % split:
            at_once = f" in accumulate {c.accumulate} parts: {rows}" if c.accumulate > 1 else ""
            raise UserError(
                f"config.batch_size {c.batch_size}{at_once} rows do not divide among the {split} "
                f"devices of data and fsdp in mesh {c.mesh!r}: expected a multiple of {split}"
            )
        return sizes, "as asked for"
    split = math.gcd(rows, devices)  # rows over as many devices as they divide among
    model = devices // split
    sizes, why = _least_split(c, config, split, model, memory)
    if model > 1:
        why += f"; {rows} rows divide among {split} of {devices} devices, so matrices are split too"
    return sizes, f"chosen because {why}"


def _least_split(
    c: TrainConfig, config: ModelConfig, split: int, model: int, memory: int | None
) -> tuple[dict[str, int], str]:
    """The mesh of `split` times `model` devices on which weights are split over as few as their memory
    allows, as each split one has to be gathered in every step; and the reason."""
    if memory is None:
        return {"fsdp": split, "model": model}, (
            "memory is saved, as it is not known how much a device has"
        )
    told = ""
    for fsdp in (n for n in range(1, split + 1) if split % n == 0):
        sizes = {"data": split // fsdp, "fsdp": fsdp, "model": model}
        need = estimate(c, config, sizes)
        text = (
            f"an estimated {size_text(need.total)} of {size_text(memory)} a device (weights "
            f"{size_text(need.weights)}, trained part {size_text(need.trained)}, kept for the backward "
            f"pass {size_text(need.kept)}, at work {size_text(need.batch + need.working)})"
        )
        over = f"over {fsdp * model}" if fsdp * model > 1 else "whole"
        if need.total <= FILLED * memory:
            how = f"split {over} devices" if fsdp * model > 1 else "whole on each"
            return sizes, f"weights {how} take {text}{told}"
        told = f"; {over} it would be {size_text(need.total)}"
        if need.total <= memory:
            told += f", which may fit and is faster (--config.mesh={_text_of(sizes)})"
    return sizes, (
        f"memory is saved; even so it takes {text}, and may not fit: take fewer rows at once "
        "(config.accumulate), config.remat or more devices"
    )


def _text_of(sizes: dict[str, int]) -> str:
    """As `parse_mesh` reads it."""
    return ",".join(f"{axis}:{n}" for axis, n in sizes.items() if n > 1) or "data:1"


def share_of(mesh: Mesh, rows: int) -> ProcessShard:
    """The rows of a batch of so many that the devices of this process hold."""
    holders, me = _holders(mesh, rows), jax.process_index()
    mine = tuple(row for row in range(rows) if me in holders[row])
    return ProcessShard(mine, frozenset(row for row in mine if min(holders[row]) == me))


def blocks_of(mesh: Mesh) -> int:
    """Into how few blocks of equal size the rows of a batch, which divide among the devices, may be
    cut for every block to be held by the same processes: 1 in a run of one."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    holders = _holders(mesh, devices)
    sizes = (n for n in range(1, devices + 1) if devices % n == 0)
    size = max(n for n in sizes if all(holders[i] == holders[i - i % n] for i in range(devices)))
    return devices // size


def _holders(mesh: Mesh, rows: int) -> list[set[int]]:
    """For each row of a batch of so many, the processes whose devices hold it."""
    holders: list[set[int]] = [set() for _ in range(rows)]
    devices: Any = batch_sharding(mesh, rows).devices_indices_map((rows,))
    for device, index in devices.items():
        for row in range(rows)[index[0]]:
            holders[row].add(device.process_index)
    return holders


def describe_run(mesh: Mesh, why: str, frozen: Any, trainable: Any, opt_state: Any) -> str:
    """What lies where, in one line for the log."""
    arrays = jax.tree.leaves(frozen)
    total, here = sum(a.nbytes for a in arrays), sum(map(_bytes_here, arrays))
    cut = [a for a in arrays if not a.sharding.is_fully_replicated]
    axes = sorted({axis for a in cut for axis in _axes(a)})
    how = "whole on each" if not cut else (
        f"{len(cut)} of {len(arrays)} arrays are split over {' and '.join(axes)}"
    )  # fmt: skip
    return (
        f"mesh {describe_mesh(mesh)} of {mesh.size} devices, {why}. Frozen weights: {size_text(total)}, of "
        f"which a device holds {size_text(here)} ({how}); trained part {size_text(_total(trainable))} and "
        f"optimizer {size_text(_total(opt_state))}, whole on each; rows go over data and fsdp"
    )


def _bytes_here(a: jax.Array) -> int:
    return math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize


def _axes(a: Any) -> list[str]:
    found: list[str] = []
    for axis in a.sharding.spec:
        found += [axis] if isinstance(axis, str) else axis or ()
    return found


def _total(tree: Any) -> int:
    return sum(a.nbytes for a in jax.tree.leaves(tree))


def size_text(count: float) -> str:
    """Bytes for a reader, for instance "13.2 GB"."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
