"""Kernels and copies that a GPU runs in one step of a compiled program.

A step is an iteration of the loop that runs until the rows are done (decoding), or else the whole program.
Every instruction of its computations that is neither bookkeeping nor free is one kernel: a fusion, a call
of a library (cuBLAS, cuDNN), a copy of more than a few bytes. Autotuning on a real device may split or join
a few.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from minigpt4_jax.aot.hlo import HloInstruction, Module

# Instructions that start no kernel: aliases, control flow, and the second half of asynchronous ones.
_NO_KERNEL = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
    "after-all", "partition-id", "replica-id", "opt-barrier", "async-start", "async-update",
    "async-done", "copy-done", "add-dependency",
}  # fmt: skip
_MOVES = ("copy", "copy-start", "slice", "dynamic-slice", "transpose", "concatenate", "pad")
_IN_MOVES = (*_MOVES, "parameter", "bitcast", "constant", "tuple", "get-tuple-element", "reshape")
_SMALL = 1 << 16  # bytes: positions, lengths and other bookkeeping


@dataclass(frozen=True)
class Kernels:
    """What one step runs."""

    count: int  # kernels, copies included
    library_calls: int
    copies: int  # kernels that only move data
    copied_bytes: int
    argument_copies: int  # copies of arguments of the program: weights, a cache, the batch
    argument_copied_bytes: int


def kernels_of(module: Module) -> Kernels:
    """Count the kernels of a step."""
    counts = module.execution_counts
    loop = _open_loop(module)
    inside = set(counts) if loop is None else _reachable(loop, module)
    count = library_calls = copies = copied = argument_copies = argument_copied = 0
    for name in inside:
        if not module.runs_body(name):
            continue
        for i in module.computations[name].values():
            if i.opcode in _NO_KERNEL:
                continue
            n, size = counts[name], sum(a.bytes for a in i.arrays)
            if i.opcode in ("copy", "copy-start") and size < _SMALL:
                continue
            count += n
            library_calls += n * (i.opcode == "custom-call")
            if _only_moves(i, module) and size >= _SMALL:
                from_arguments = _moves_arguments(i, name, module)
                copies, copied = copies + n, copied + n * size
                argument_copies += n * from_arguments
                argument_copied += n * size * from_arguments
    return Kernels(count, library_calls, copies, copied, argument_copies, argument_copied)


def _open_loop(module: Module) -> str | None:
    """The body of the loop whose trip count depends on data; None if there is none."""
    for name, computation in module.computations.items():
        for i in computation.values():
            is_loop = name in module.execution_counts and i.opcode == "while"
            if is_loop and module.trip_count(i, computation) is None:
                return i.attribute("body").lstrip("%")
    return None


def _reachable(start: str, module: Module) -> set[str]:
    """The computations that `start` runs, and itself."""
    found, pending = {start}, [start]
    while pending:
        for i in module.computations[pending.pop()].values():
            new = [name for name in i.called if name in module.computations and name not in found]
            found.update(new)
            pending += new
    return found


def _only_moves(i: HloInstruction, module: Module) -> bool:
    """Whether a kernel copies, slices, transposes or joins arrays, and computes nothing."""
    if i.opcode != "fusion":
        return i.opcode in _MOVES
    opcodes = {j.opcode for j in module.computations[i.called[0]].values()}
    return opcodes <= set(_IN_MOVES) and not opcodes.isdisjoint(_MOVES)


def _moves_arguments(i: HloInstruction, computation: str, module: Module) -> bool:
    """Whether all arrays that a copy reads are arguments of the program."""
    body = module.computations[computation]
    arrays = [name for name in i.operands if name in body and _is_large(body[name])]
    return bool(arrays) and all(_is_argument(name, computation, module) for name in arrays)


def _is_large(i: HloInstruction) -> bool:
    return any(a.bytes >= _SMALL for a in i.arrays)


def _is_argument(name: str, computation: str, module: Module) -> bool:
    """Whether the value of a name is an argument of the program, behind loops and calls."""
    index: list[int] = []  # the element of a tuple that is followed
    while True:
        i = module.computations[computation].get(name)
        if i is None:
            return False
        if i.opcode == "bitcast":
            name = i.operands[0]
        elif i.opcode == "get-tuple-element":
            index.append(int(i.attribute("index")))
            name = i.operands[0]
        elif i.opcode == "tuple" and index:
            name = i.operands[index.pop()]
        elif i.opcode == "parameter":
            if computation == module.entry:
                return True
            caller = next(_callers(computation, module), None)
            if caller is None:
                return False
            computation, call = caller
            name = call.operands[int(i.argument_text) if call.opcode == "call" else 0]
        else:
            return False


def _callers(called: str, module: Module) -> Iterator[tuple[str, HloInstruction]]:
    """(computation, instruction) that run a computation as a loop or a call."""
    for name, computation in module.computations.items():
        for i in computation.values():
            if i.opcode in ("while", "call") and called in i.called:
                yield name, i
