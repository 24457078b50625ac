"""Which rows of a batch each process makes: those that its devices hold."""

from typing import Any

import jax
from jax.sharding import Mesh

from minigpt4_jax.data.batching import ProcessShard
from minigpt4_jax.parallel.sharding import batch_sharding


def process_shard(mesh: Mesh, rows: int) -> ProcessShard:
    """The rows, of a batch of this many, that the devices of this process hold."""
    processes, this_process = _processes_by_row(mesh, rows), jax.process_index()
    held = tuple(row for row in range(rows) if this_process in processes[row])
    return ProcessShard(held, frozenset(row for row in held if min(processes[row]) == this_process))


def num_row_blocks(mesh: Mesh) -> int:
    """The smallest number of equal blocks that a batch can be cut into so that all rows of a block are
    held by the same processes; 1 with one process. For batches that divide among the devices."""
    devices: int = mesh.shape["data"] * mesh.shape["fsdp"]
    processes = _processes_by_row(mesh, devices)
    sizes = (n for n in range(1, devices + 1) if devices % n == 0)
    block = max(
        n for n in sizes if all(processes[i] == processes[i - i % n] for i in range(devices))
    )
    num_blocks: int = devices // block
    return num_blocks


def _processes_by_row(mesh: Mesh, rows: int) -> list[set[int]]:
    """For each row of a batch, the processes whose devices hold it."""
    processes: list[set[int]] = [set() for _ in range(rows)]
    indices: Any = batch_sharding(mesh, rows).devices_indices_map((rows,))
    for device, index in indices.items():
        for row in range(rows)[index[0]]:
            processes[row].add(device.process_index)
    return processes
