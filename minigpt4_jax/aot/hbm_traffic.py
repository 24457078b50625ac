"""Bytes that instructions of a compiled program read from HBM and write to it.

Arrays in other memory spaces and intermediate values of a fusion do not count. If a fusion only
slices an operand, the slices count; if it updates one in place, the update counts.
"""

from collections import defaultdict

from minigpt4_jax.aot.hlo import Computation, HloInstruction, Module, is_collective, operand_arrays

# Instructions without traffic of their own: aliases, control flow, and the second half of
# asynchronous operations, which are counted at their start.
_NO_TRAFFIC = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "opt-barrier", "async-start", "async-update",
    "async-done", "copy-done", "slice-done", "dynamic-slice-done", "iota", "add-dependency",
}  # fmt: skip
_NO_TRAFFIC_CALLS = ("AllocateBuffer", "ConcatBitcast", "AsyncCollective", "AssumeGather")
_ELEMENTWISE = ("bitcast", "convert", "copy", "fusion")  # fusion: nested, with one operand
_ASYNC_COPIES = ("copy-start", "slice-start", "dynamic-slice-start")
_WORKSPACE = ("s8", "u8")  # of calls of cuBLAS and cuDNN: may be left unused
_SLICES = ("dynamic-slice", "slice", "gather")

# Instructions that change a few elements of their first operand in place -> the operand with these
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}

# Name of an instruction -> (instruction that uses it, position among its operands)
_Users = dict[str, list[tuple[HloInstruction, int]]]


def hbm_traffic(i: HloInstruction, computation: Computation, module: Module) -> tuple[float, bool]:
    """(bytes, whether the instruction is asynchronous and overlaps others)"""
    if i.opcode in _NO_TRAFFIC or _is_free_call(i):
        return 0.0, False
    if i.opcode in _ASYNC_COPIES:
        return _async_copy_bytes(i, computation), True
    if is_collective(i):
        operands = [a for name in i.operands for a in operand_arrays(name, computation)]
        return float(sum(a.bytes for a in operands + i.arrays if a.hbm)), True
    return _bytes_written(i, module) + _bytes_read(i, computation, module), False


def _is_free_call(i: HloInstruction) -> bool:
    return i.opcode == "custom-call" and any(
        f'custom_call_target="{name}' in i.attributes for name in _NO_TRAFFIC_CALLS
    )


def _async_copy_bytes(i: HloInstruction, computation: Computation) -> float:
    """Bytes of the result, once for its write and once for the read, each if that side is in HBM."""
    arrays = i.arrays[:2]
    result = arrays[0] if i.opcode == "copy-start" else arrays[-1]
    source = operand_arrays(i.operands[0], computation)
    read = result.bytes if source and source[0].hbm else 0
    return float(read + (result.bytes if result.hbm else 0))


def _fused_computation(i: HloInstruction, module: Module) -> Computation:
    """The body of a fusion; empty for other instructions."""
    if i.opcode != "fusion" or not i.called:
        return {}
    return module.computations.get(i.called[0], {})


def _bytes_written(i: HloInstruction, module: Module) -> float:
    if i.opcode == "dynamic-update-slice":
        return 0.0  # in place: the update is counted as read
    partial = _partial_writes(i, module)
    arrays = list(enumerate(i.arrays))
    if i.opcode == "custom-call" and 'target="__cu' in i.attributes:
        arrays = [(n, a) for n, a in arrays if a.dtype not in _WORKSPACE]
    return float(sum(partial.get(n, a.bytes) for n, a in arrays if a.hbm))


def _partial_writes(i: HloInstruction, module: Module) -> dict[int, int]:
    """Index of a fusion's output -> bytes, for outputs that are not fully written: arrays updated
    in place, and those forwarded by a piece of a collective."""
    body = _fused_computation(i, module)
    if not body:
        return {}
    root = next(reversed(body.values()))
    names = root.operands if root.opcode == "tuple" else [root.name]
    written: dict[int, int] = {}
    for n, name in enumerate(names):
        origin = _elementwise_origin(body.get(name), body)
        if origin is None:
            continue
        update = _UPDATES.get(origin.opcode)
        if update is not None and len(origin.operands) > update:
            written[n] = sum(a.bytes for a in operand_arrays(origin.operands[update], body))
        elif origin.opcode in ("parameter", "custom-call") or is_collective(origin):
            written[n] = 0
    return written


def _elementwise_origin(
    i: HloInstruction | None, computation: Computation
) -> HloInstruction | None:
    """Follow a chain of bitcasts and conversions back to its first instruction."""
    while i is not None and i.opcode in _ELEMENTWISE and i.operands:
        i = computation.get(i.operands[0])
    return i


def _bytes_read(i: HloInstruction, computation: Computation, module: Module) -> float:
    if i.opcode in _SLICES:
        source = operand_arrays(i.operands[0], computation)
        return float(i.arrays[0].bytes) if source and source[0].hbm else 0.0
    operands = i.operands[1:] if i.opcode == "dynamic-update-slice" else i.operands
    partial = _partial_reads(i, module)
    total = 0.0
    for n, name in enumerate(operands):
        size = sum(a.bytes for a in operand_arrays(name, computation) if a.hbm)
        total += min(size, partial.get(n, size))
    return total


def _partial_reads(i: HloInstruction, module: Module) -> dict[int, int]:
    """Index of a fusion's operand -> bytes, for operands of which only slices are read."""
    body = _fused_computation(i, module)
    users: _Users = defaultdict(list)
    for j in body.values():
        for position, name in enumerate(j.operands):
            users[name].append((j, position))
    parameters = (j for j in body.values() if j.opcode == "parameter")
    sizes = {int(j.argument_text): _sliced_bytes(j.name, users, module) for j in parameters}
    return {n: size for n, size in sizes.items() if size is not None}


def _sliced_bytes(name: str, users: _Users, module: Module) -> int | None:
    """Bytes read of an array inside a fusion; None: all of it."""
    if not users[name]:  # the fusion's output
        return None
    total = 0
    for user, position in users[name]:
        if user.opcode in _SLICES and position == 0:
            total += sum(a.bytes for a in user.arrays)
            continue
        nested = _partial_reads(user, module).get(position) if user.opcode == "fusion" else None
        if nested is None and user.opcode in _ELEMENTWISE and len(user.operands) == 1:
            nested = _sliced_bytes(user.name, users, module)
        forwarded = (
            (user.opcode in _UPDATES and position == 0)  # in place
            or user.opcode in ("tuple", "custom-call")  # by a piece of a collective
            or is_collective(user)
        )
        if nested is None and not forwarded:
            return None
        total += nested or 0
    return total
