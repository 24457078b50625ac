"""Cost of a compiled program on one chip, counted from its HLO: FLOPs, HBM bytes, collectives.

XLA's own `cost_analysis()` counts a loop body once, and a scan over layers is a loop. Here every
computation counts as often as it runs (`hlo.Module.execution_counts`).

FLOPs are those of matrix products in the partitioned program, 2 per multiply-add, including
recomputation and padding (`matmul_flops`). Bytes: `hbm_traffic`.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass

from minigpt4_jax.aot.hbm_traffic import hbm_traffic
from minigpt4_jax.aot.hlo import Computation, HloInstruction, Module, is_collective, operand_arrays
from minigpt4_jax.aot.matmul_flops import matmul_flops


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind, size and group size."""

    kind: str  # HLO opcode
    group_size: int  # participating chips
    bytes: int  # of the full array: gathered, reduced or permuted
    count: int  # executions per run of the program
    overlapped: bool  # asynchronous: runs while other instructions execute

    @property
    def sent_bytes(self) -> float:
        """Bytes that a chip sends per execution, in a ring algorithm."""
        n = self.group_size
        if n <= 1:
            return 0.0
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}
        return self.bytes * share.get(self.kind, (n - 1) / n)


@dataclass(frozen=True)
class InstructionCost:
    """Cost of one execution of an instruction."""

    flops: float  # of matrix products
    mxu_flops: float  # the same times the bfloat16 passes that a float32 product takes
    hbm_bytes: float  # read and written
    overlapped: bool  # asynchronous copy: runs while other instructions execute
    count: int  # executions per run of the program


@dataclass(frozen=True)
class Cost:
    """Cost of one run on one chip. Loops of unknown trip count are counted with one iteration."""

    instructions: tuple[InstructionCost, ...]
    collectives: tuple[Collective, ...]
    unknown_loops: int  # loops of unknown trip count

    @property
    def flops(self) -> float:
        return sum(i.flops * i.count for i in self.instructions)

    @property
    def hbm_bytes(self) -> float:
        return sum(i.hbm_bytes * i.count for i in self.instructions)

    @property
    def sent_bytes(self) -> float:
        """Bytes a chip sends to other chips."""
        return sum(c.sent_bytes * c.count for c in self.collectives)


def cost_of(module: Module) -> Cost:
    """Count a whole program. ValueError: unknown format of replica groups."""
    instructions: list[InstructionCost] = []
    # (kind, group size, bytes, overlapped, channel) -> executions
    executions: dict[tuple[str, int, int, bool, str], int] = {}
    for name, count in module.execution_counts.items():
        computation = module.computations[name]
        caller = module.caller_opcodes.get(name)
        for i in filter(is_collective, computation.values()):
            # A collective that overlaps products is split into pieces inside their fusions, with one
            # channel. It may start before a loop, advance in each iteration and end after the loop.
            fused = caller == "fusion"
            overlapped = fused or i.opcode.endswith("-start") or caller == "async-start"
            channel = i.attribute("channel_id") if fused else i.name
            kind, size = i.opcode.removesuffix("-start"), _full_size(i, computation)
            key = (kind, _group_size(i), size, overlapped, channel)
            executions[key] = min(executions.get(key, count), count)
        if module.runs_body(name):
            costs = (_instruction_cost(i, computation, module, count) for i in computation.values())
            instructions += [cost for cost in costs if cost.flops or cost.hbm_bytes]
    return Cost(tuple(instructions), _merge(executions), module.unknown_loops)


def _merge(executions: dict[tuple[str, int, int, bool, str], int]) -> tuple[Collective, ...]:
    """Sum collectives that differ only in their channel; those that send most come first."""
    counts: dict[tuple[str, int, int, bool], int] = defaultdict(int)
    for (kind, group_size, size, overlapped, _), count in executions.items():
        counts[kind, group_size, size, overlapped] += count
    collectives = [Collective(k, g, size, n, o) for (k, g, size, o), n in counts.items()]
    return tuple(sorted(collectives, key=lambda c: -c.sent_bytes * c.count))


def _instruction_cost(
    i: HloInstruction, computation: Computation, module: Module, count: int
) -> InstructionCost:
    flops, mxu_flops = matmul_flops(i, computation, module)
    hbm_bytes, overlapped = hbm_traffic(i, computation, module)
    return InstructionCost(flops, mxu_flops, hbm_bytes, overlapped, count)


def _group_size(i: HloInstruction) -> int:
    """Chips per group, from replica_groups={{0,1},{2,3}}, [2,2]<=[4] or mesh['a'=2,'b'=4] {'b'};
    2 for a permutation. ValueError: another format."""
    text = i.attributes
    size = 0
    if m := re.search(r"replica_groups=mesh\[([^\]]*)\].*? \{('[^}]*)\}", text):
        axis_sizes = dict(re.findall(r"'(\w+)'=(\d+)", m[1]))
        size = math.prod(int(axis_sizes[axis]) for axis in re.findall(r"'(\w+)'", m[2]))
    elif m := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
        size = int(m[2])
    elif m := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        size = len(m[1].split(","))
    elif "source_target_pairs" in text:
        size = 2
    if not size:
        raise ValueError(f"unknown replica groups of {i.name} in the compiled program: {text}")
    return size


def _full_size(i: HloInstruction, computation: Computation) -> int:
    """Bytes of the full array, before a scatter or after a gather."""
    kind = i.opcode.removesuffix("-start")
    if kind == "reduce-scatter":
        return sum(a.bytes for name in i.operands for a in operand_arrays(name, computation))
    arrays = i.arrays
    if i.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
        arrays = arrays[len(i.operands) : 2 * len(i.operands)]  # (operands, results, ...)
    return sum(a.bytes for a in arrays)
