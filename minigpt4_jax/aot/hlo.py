"""Parse optimized HLO text as far as cost counting needs: computations, instructions, shapes, and how
often each computation runs.

Only the result type before each opcode, the operands and the attributes are read.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property

DTYPE_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "f8e4m3fn": 8, "f8e5m2": 8, "s16": 16, "u16": 16,
    "bf16": 16, "f16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64,
}  # fmt: skip

_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_COMPUTATION_START = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_COMPUTATION_END = re.compile(r"\}(, execution_thread=.*)?$")
_INSTRUCTION_NAME = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(
    r"(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
# Opcodes that run a computation's instructions as they are; None: the entry
_RUNS_BODY = (None, "while", "conditional", "call", "async-start")
_TRIP_COUNT = re.compile(r'"?known_trip_count"?\s*[:=]\s*\{\s*"?n"?\s*[:=]\s*"?(\d+)')


@dataclass(frozen=True)
class Array:
    """One array of a type: element type, dimensions, and whether it is in HBM."""

    dtype: str
    dims: tuple[int, ...]
    hbm: bool

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return math.ceil(self.size * DTYPE_BITS.get(self.dtype, 0) / 8)


def parse_type(text: str) -> list[Array]:
    """The arrays of a type, a tuple flattened. Memory space 0, the default of a layout, is HBM; others,
    such as S(1), are on the chip."""
    arrays = []
    for dtype, dims, layout in _SHAPE.findall(text):
        if dtype in DTYPE_BITS:
            hbm = re.search(r"S\([1-9]", layout) is None
            arrays.append(Array(dtype, tuple(int(d) for d in dims.split(",") if d), hbm))
    return arrays


@dataclass
class HloInstruction:
    """One line of a computation."""

    name: str
    opcode: str
    type: str
    operands: list[str]  # names
    attributes: str
    argument_text: str = ""  # between the parentheses

    @cached_property
    def arrays(self) -> list[Array]:
        """Arrays of the result."""
        return parse_type(self.type)

    @property
    def called(self) -> list[str]:
        """Names of the computations that this instruction runs."""
        names = _CALLED.findall(self.attributes)
        for group in _BRANCHES.findall(self.attributes):
            names += [name.strip().lstrip("%") for name in group.split(",")]
        return names

    def attribute(self, name: str) -> str:
        """Value of an attribute, a word or braces with their content; "" if it is missing."""
        match = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^\s,]+)", self.attributes)
        return match[1] if match else ""


Computation = dict[str, HloInstruction]  # by name, in program order


def operand_arrays(name: str, computation: Computation) -> list[Array]:
    """Arrays of the operand called `name`; empty if it is unknown."""
    return computation[name].arrays if name in computation else []


def skip_copies(name: str, computation: Computation) -> HloInstruction | None:
    """The instruction behind a name, with copies and bitcasts skipped."""
    i = computation.get(name)
    while i is not None and i.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        i = computation.get(i.operands[0])
    return i


def constant_value(name: str, computation: Computation) -> int | None:
    """The integer constant behind a name; None if it is not one."""
    i = skip_copies(name, computation)
    if i is None or i.opcode != "constant" or not re.fullmatch(r"-?\d+", i.argument_text):
        return None
    return int(i.argument_text)


COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip


def is_collective(i: HloInstruction) -> bool:
    """Whether chips communicate; of an asynchronous collective only the start counts."""
    return i.opcode.removesuffix("-start") in COLLECTIVES


@dataclass
class Module:
    """A whole program."""

    computations: dict[str, Computation]
    entry: str
    # Computation -> opcode of the instruction that runs it (fusion, while, async-start ...); filled
    # by `execution_counts`
    caller_opcodes: dict[str, str] = field(default_factory=dict)

    @cached_property
    def execution_counts(self) -> dict[str, int]:
        """Computation -> number of executions. A loop of unknown trip count counts as one iteration;
        every branch of a conditional counts."""
        order: list[str] = []
        self._append_postorder(self.entry, order, set())
        counts: dict[str, int] = defaultdict(int)
        counts[self.entry] = 1
        for name in reversed(order):  # callers first
            computation = self.computations[name]
            for i in computation.values():
                trip_count = self.trip_count(i, computation) if i.opcode == "while" else None
                for called in self._known(i.called):
                    counts[called] += counts[name] * (1 if trip_count is None else trip_count)
                    self.caller_opcodes.setdefault(called, i.opcode)
        return dict(counts)

    def trip_count(self, loop: HloInstruction, computation: Computation) -> int | None:
        """Iterations of a while loop: its known_trip_count, or computed from the condition
        `counter < constant` if the counter starts at a constant and grows by a constant. None if it
        depends on data. computation: the one that contains the loop."""
        if match := _TRIP_COUNT.search(loop.attributes):
            return int(match[1])
        condition = self._called_by(loop, "condition")
        compare = next(reversed(condition.values()), None)
        if (
            compare is None
            or compare.opcode != "compare"
            or "direction=LT" not in compare.attributes
        ):
            return None
        counter, bound = (skip_copies(name, condition) for name in compare.operands)
        index = counter.attribute("index") if counter else ""
        if bound is None or bound.opcode != "constant" or not index:
            return None
        start = _initial_value(loop, int(index), computation)
        increment = self._increment(loop, int(index))
        if start is None or not increment:
            return None
        return max(0, -(-(int(bound.argument_text) - start) // increment))

    @cached_property
    def unknown_loops(self) -> int:
        """Number of loops whose trip count is unknown."""
        return sum(
            i.opcode == "while" and self.trip_count(i, computation) is None
            for name, computation in self.computations.items()
            if name in self.execution_counts
            for i in computation.values()
        )

    def runs_body(self, name: str) -> bool:
        """Whether a computation's instructions run one by one, unlike those of a fusion. Known once
        `execution_counts` has been read."""
        return self.caller_opcodes.get(name) in _RUNS_BODY

    def _known(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.computations]

    def _called_by(self, loop: HloInstruction, attribute: str) -> Computation:
        return self.computations.get(loop.attribute(attribute)[1:], {})

    def _increment(self, loop: HloInstruction, index: int) -> int | None:
        """Constant that an iteration adds to element `index` of the loop state."""
        body = self._called_by(loop, "body")
        state = next(reversed(body.values()), None)
        if state is None or state.opcode != "tuple":
            return None
        updated = skip_copies(state.operands[index], body)
        if updated is None or updated.opcode != "add":
            return None
        constants = (constant_value(name, body) for name in updated.operands)
        return next((n for n in constants if n is not None), None)

    def _append_postorder(self, name: str, order: list[str], visited: set[str]) -> None:
        if name in visited:
            return
        visited.add(name)
        for i in self.computations[name].values():
            for called in self._known(i.called):
                self._append_postorder(called, order, visited)
        order.append(name)


def _initial_value(loop: HloInstruction, index: int, computation: Computation) -> int | None:
    """Constant that element `index` of the loop state starts from."""
    state = computation.get(loop.operands[0])
    if state is None or state.opcode != "tuple":
        return None
    return constant_value(state.operands[index], computation)


def parse(text: str) -> Module:
    """Parse the HLO text of a compiled program. ValueError: it has no entry computation."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if start := _COMPUTATION_START.match(line):
            current = computations.setdefault(start[2], {})
            entry = start[2] if start[1] else entry
        elif _COMPUTATION_END.match(line):  # also ends some multi-line attributes
            current = None
        elif current is not None and (i := _parse_instruction(line)):
            current[i.name] = i
    if not entry:
        raise ValueError("no ENTRY computation in the text of the compiled program")
    return Module(computations, entry)


def _parse_instruction(line: str) -> HloInstruction | None:
    match = _INSTRUCTION_NAME.match(line)
    if not match:
        return None
    rest = line[match.end() :]
    end = _closing_parenthesis(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    result_type, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    close = _closing_parenthesis(rest, len(opcode))
    arguments = rest[len(opcode) + 1 : close]
    operands = re.findall(r"%([\w.\-]+)", arguments)
    return HloInstruction(match[1], opcode, result_type, operands, rest[close + 1 :], arguments)


def _closing_parenthesis(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    return len(text) - 1
