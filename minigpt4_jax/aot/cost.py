"""What a compiled program does on one chip, counted from its text: operations, bytes, collectives.

XLA's own `cost_analysis` counts the body of a loop once, and a scan over layers is a loop; here a
computation counts as often as it runs (`hlo.Module.runs`).

Operations are those of matrix products, 2 for each multiplication and addition, in the partitioned
program: what a chip computes twice or in vain counts (`products`). Bytes: `traffic`.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass

from minigpt4_jax.aot.hbm_traffic import traffic
from minigpt4_jax.aot.hlo import Instruction, Module, Table, arrays_in, is_collective
from minigpt4_jax.aot.matmul_flops import operations


@dataclass(frozen=True)
class Collective:
    """Exchanges of one kind, size and number of chips in a group."""

    kind: str
    group: int  # chips that take part
    bytes: int  # of the whole array: gathered, reduced or passed on
    count: int  # times a program runs it
    ahead: bool  # started before its result is needed, so that it runs beside other work

    @property
    def sent(self) -> float:
        """Bytes that a chip passes on each time, in a ring."""
        n, kind = self.group, self.kind
        if n <= 1:
            return 0.0
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}
        return self.bytes * share.get(kind, (n - 1) / n)


@dataclass(frozen=True)
class Step:
    """What one instruction does each time it runs."""

    flops: float  # operations of products, as one pass of the unit makes them
    passes: float  # the same with the passes that a float32 product takes
    bytes: float  # to and from HBM
    ahead: bool  # these are moved while other instructions run
    count: int


@dataclass(frozen=True)
class Cost:
    """Of one run of a program on one chip; where a loop's turns are not known, of one turn."""

    steps: tuple[Step, ...]
    collectives: tuple[Collective, ...]
    open_loops: int

    @property
    def flops(self) -> float:
        return sum(s.flops * s.count for s in self.steps)

    @property
    def bytes(self) -> float:
        return sum(s.bytes * s.count for s in self.steps)

    @property
    def sent(self) -> float:
        """Bytes a chip passes on to others."""
        return sum(c.sent * c.count for c in self.collectives)


def cost_of(module: Module) -> Cost:
    """Count a whole program."""
    steps: list[Step] = []
    found: dict[tuple, int] = {}
    for name, times in module.runs.items():
        body = module.computations[name]
        table = {i.name: i for i in body}
        fused = module.caller.get(name) == "fusion"
        for i in filter(is_collective, body):
            # One that runs beside products is in the fusions of these, piece by piece; it may begin
            # before a loop, whose every turn advances it, and end behind it.
            ahead = fused or i.opcode.endswith("-start") or module.caller.get(name) == "async-start"
            channel = i.attribute("channel_id") if fused else i.name
            if not (group := _group(i)):
                raise ValueError(f"the groups of {i.name} in the compiled program: {i.attributes}")
            key = (i.opcode.removesuffix("-start"), group, _size(i, table), ahead, channel)
            found[key] = min(found.get(key, times), times)
        if not fused and module.caller.get(name) in _STEPS:
            steps += [s for i in body if (s := _step(i, table, module, times))]
    alike: dict[tuple, int] = defaultdict(int)
    for (*sort, _), times in found.items():
        alike[tuple(sort)] += times
    collectives = [Collective(k, g, size, n, ahead) for (k, g, size, ahead), n in alike.items()]
    collectives.sort(key=lambda c: -c.sent * c.count)
    return Cost(tuple(steps), tuple(collectives), module.open_loops)


_STEPS = (None, "while", "conditional", "call", "async-start")  # that run computations as they are


def _step(i: Instruction, table: Table, module: Module, times: int) -> Step | None:
    flops, passes = operations(i, table, module)
    moved, ahead = traffic(i, table, module)
    return Step(flops, passes, moved, ahead, times) if flops or moved else None


def _group(i: Instruction) -> int:
    """Chips in a group, of replica_groups={{0,1},{2,3}}, [2,2]<=[4] or mesh['a'=2,'b'=4] {'b'}; of a
    permutation 2; 0: not said in a known way."""
    text = i.attributes
    if m := re.search(r"replica_groups=mesh\[([^\]]*)\].*? \{('[^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", m[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", m[2]))
    if m := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
        return int(m[2])
    if m := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(m[1].split(","))
    return 2 if "source_target_pairs" in text else 0


def _size(i: Instruction, table: Table) -> int:
    """Bytes of the whole array, before it is scattered or after it is gathered."""
    kind = i.opcode.removesuffix("-start")
    if kind == "reduce-scatter":
        return sum(a.bytes for name in i.operands for a in arrays_in(name, table))
    parts = i.arrays
    if i.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
        parts = parts[len(i.operands) : 2 * len(i.operands)]  # (operands, results, ...)
    return sum(a.bytes for a in parts)
