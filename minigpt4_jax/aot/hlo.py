"""The text of a compiled program (HLO), read as far as its costs need: computations, instructions,
shapes, and how many times each computation runs.

The text is XLA's own dump format; what is read of it are the types before each opcode, the operands,
and the attributes.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property

BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "f8e4m3fn": 8, "f8e5m2": 8, "s16": 16, "u16": 16,
    "bf16": 16, "f16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64,
}  # fmt: skip

_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_END = re.compile(r"\}(, execution_thread=.*)?$")
_NAME = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(
    r"(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"?known_trip_count"?\s*[:=]\s*\{\s*"?n"?\s*[:=]\s*"?(\d+)')


@dataclass(frozen=True)
class Array:
    """One array of a type: element type, dimensions, and whether it lies in HBM."""

    kind: str
    dims: tuple[int, ...]
    hbm: bool

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return math.ceil(self.size * BITS.get(self.kind, 0) / 8)


def arrays_of(text: str) -> list[Array]:
    """The arrays of a type, a tuple's one after another. Memory space 0, the layout's default, is
    HBM; others, as S(1), are on the chip."""
    found = []
    for kind, dims, layout in _SHAPE.findall(text):
        if kind in BITS:
            hbm = re.search(r"S\([1-9]", layout) is None
            found.append(Array(kind, tuple(int(d) for d in dims.split(",") if d), hbm))
    return found


@dataclass
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    type: str
    operands: list[str]  # names
    attributes: str
    text: str = ""  # what is between the parentheses

    @cached_property
    def arrays(self) -> list[Array]:
        """Of the result."""
        return arrays_of(self.type)

    @property
    def called(self) -> list[str]:
        """Names of the computations that this one runs."""
        names = _CALLED.findall(self.attributes)
        for group in _BRANCHES.findall(self.attributes):
            names += [name.strip().lstrip("%") for name in group.split(",")]
        return names

    def attribute(self, name: str) -> str:
        """A value without spaces, or one within braces; "" when it is not there."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^\s,]+)", self.attributes)
        return found[1] if found else ""


Table = dict[str, Instruction]  # of a computation, by name


def arrays_in(name: str, table: Table) -> list[Array]:
    """The arrays that an operand's name stands for."""
    return table[name].arrays if name in table else []


def source(name: str, table: Table) -> Instruction | None:
    """What a name stands for, seen through copies."""
    found = table.get(name)
    while found is not None and found.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        found = table.get(found.operands[0])
    return found


def constant_of(name: str, table: Table) -> int | None:
    """The whole number that a name stands for; None: it is no constant."""
    found = source(name, table)
    if found is None or found.opcode != "constant" or not re.fullmatch(r"-?\d+", found.text):
        return None
    return int(found.text)


COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip


def is_collective(i: Instruction) -> bool:
    """Whether chips exchange something; of one in two halves the first counts."""
    return i.opcode.removesuffix("-start") in COLLECTIVES


@dataclass
class Module:
    """A whole program."""

    computations: dict[str, list[Instruction]]
    entry: str
    # Opcode of the instruction that runs a computation: fusion, while, async-start ...
    caller: dict[str, str] = field(default_factory=dict)

    @cached_property
    def runs(self) -> dict[str, int]:
        """How many times each computation runs. A loop whose count is not known counts as one
        turn; of a conditional, every branch counts."""
        order: list[str] = []
        self._visit(self.entry, order, set())
        runs: dict[str, int] = defaultdict(int)
        runs[self.entry] = 1
        for name in reversed(order):  # callers first
            table = self._table(name)
            for instruction in self.computations[name]:
                loops = instruction.opcode == "while"
                known = self.trips(instruction, table) if loops else None
                times = 1 if known is None else known
                for called in instruction.called:
                    if called in self.computations:
                        runs[called] += runs[name] * times
                        self.caller.setdefault(called, instruction.opcode)
        return dict(runs)

    def trips(self, loop: Instruction, within: "Table") -> int | None:
        """How many times a loop runs: as noted on it, or else by its condition, `n < constant`, where
        n starts from a constant and grows by one. None: it depends on what is computed.
        within: the computation that the loop is in."""
        if found := _TRIPS.search(loop.attributes):
            return int(found[1])
        table = self._table(loop.attribute("condition")[1:])
        test = next(reversed(table.values()), None)
        if test is None or test.opcode != "compare" or "direction=LT" not in test.attributes:
            return None
        counter, bound = (source(name, table) for name in test.operands)
        index = counter.attribute("index") if counter else ""
        if bound is None or bound.opcode != "constant" or not index:
            return None
        first = self._first(loop, int(index), within)
        growth = self._growth(loop, int(index))
        if first is None or not growth:
            return None
        return max(0, -(-(int(bound.text) - first) // growth))

    def _table(self, name: str) -> "Table":
        return {i.name: i for i in self.computations.get(name, ())}

    def _first(self, loop: Instruction, index: int, within: "Table") -> int | None:
        """What the counter, an element of the loop's state, starts from."""
        state = within.get(loop.operands[0])
        if state is None or state.opcode != "tuple":
            return None
        return constant_of(state.operands[index], within)

    def _growth(self, loop: Instruction, index: int) -> int | None:
        """By how much the counter grows each time."""
        body = self._table(loop.attribute("body")[1:])
        state = next(reversed(body.values()), None)
        if state is None or state.opcode != "tuple":
            return None
        after = source(state.operands[index], body)
        if after is None or after.opcode != "add":
            return None
        found = [constant_of(name, body) for name in after.operands]
        return next((n for n in found if n is not None), None)

    def _visit(self, name: str, order: list[str], seen: set[str]) -> None:
        if name in seen:
            return
        seen.add(name)
        for instruction in self.computations[name]:
            for called in instruction.called:
                if called in self.computations:
                    self._visit(called, order, seen)
        order.append(name)

    @cached_property
    def open_loops(self) -> int:
        """Loops whose number of turns the compiler does not know."""
        return sum(
            i.opcode == "while" and self.trips(i, self._table(name)) is None
            for name, body in self.computations.items()
            if name in self.runs
            for i in body
        )


def parse(text: str) -> Module:
    """Read the text of a compiled program."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif _END.match(line):  # an attribute may be of several lines, and end alike
            current = None
        elif current is not None and (instruction := _instruction(line)):
            current.append(instruction)
    if not entry:
        raise ValueError("no ENTRY computation in the compiled program's text")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction | None:
    found = _NAME.match(line)
    if not found:
        return None
    rest = line[found.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    close = _closing(rest, len(opcode))
    inner = rest[len(opcode) + 1 : close]
    operands = re.findall(r"%([\w.\-]+)", inner)
    return Instruction(found[1], opcode, kind, operands, rest[close + 1 :], inner)


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at start."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at
    return len(text) - 1
