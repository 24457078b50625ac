"""Bytes that instructions of a compiled program read from HBM and write to it.

Arrays in other memory spaces do not count, nor does what a fusion does inside. Of an operand of
which a fusion takes slices alone, the slices count; of one that is updated in place, the update.
"""

from collections import defaultdict

from minigpt4_jax.aot.hlo import Instruction, Module, Table, arrays_in, is_collective

# Without traffic of their own: names for what is there, or the second half of something counted.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "opt-barrier", "async-start", "async-update",
    "async-done", "copy-done", "slice-done", "dynamic-slice-done", "iota", "add-dependency",
}  # fmt: skip
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AsyncCollective", "AssumeGather")
_THROUGH = ("bitcast", "convert", "copy", "fusion")  # the last within another, of one operand
_AHEAD = ("copy-start", "slice-start", "dynamic-slice-start")


def traffic(i: Instruction, table: Table, module: Module) -> tuple[float, bool]:
    """(bytes, whether they are moved while other instructions run)"""
    if i.opcode in _FREE or any(name in i.attributes for name in _targets(i)):
        return 0.0, False
    if i.opcode in _AHEAD:
        return _copied(i, table), True
    if is_collective(i):
        own = [a for name in i.operands for a in arrays_in(name, table)] + i.arrays
        return float(sum(a.bytes for a in own if a.hbm)), True
    return _written(i, module) + _read(i, table, module), False


def _targets(i: Instruction) -> list[str]:
    return [f'custom_call_target="{n}' for n in _FREE_CALLS] if i.opcode == "custom-call" else []


def _copied(i: Instruction, table: Table) -> float:
    """Of a copy or slice that runs beside others: (source and) result, as far as they are in HBM."""
    arrays = i.arrays[:2]
    result = arrays[0] if i.opcode == "copy-start" else arrays[-1]
    source = arrays_in(i.operands[0], table)
    read = result.bytes if source and source[0].hbm else 0
    return float(read + (result.bytes if result.hbm else 0))


def _body(i: Instruction, module: Module) -> list[Instruction]:
    """The instructions of a fusion."""
    if i.opcode != "fusion" or not i.called:
        return []
    return module.computations.get(i.called[0], [])


def _written(i: Instruction, module: Module) -> float:
    if i.opcode == "dynamic-update-slice":
        return 0.0  # the update is among what is read
    parts = _partly_written(i, module)
    return float(sum(parts.get(n, a.bytes) for n, a in enumerate(i.arrays) if a.hbm))


def _partly_written(i: Instruction, module: Module) -> dict[int, int]:
    """Number of a fusion's result -> bytes, of those that are not written whole: arrays updated in
    place, and what a piece of an exchange hands on."""
    body = _body(i, module)
    if not body:
        return {}
    inner = {j.name: j for j in body}
    names = body[-1].operands if body[-1].opcode == "tuple" else [body[-1].name]
    found = {}
    for n, name in enumerate(names):
        at = _through(inner.get(name), inner)
        if at is None:
            continue
        if at.opcode == "dynamic-update-slice" and len(at.operands) > 1:
            found[n] = sum(a.bytes for a in arrays_in(at.operands[1], inner))
        elif at.opcode in ("parameter", "custom-call") or is_collective(at):
            found[n] = 0
    return found


def _through(i: Instruction | None, table: Table) -> Instruction | None:
    """What a chain of bitcasts and conversions began with."""
    while i is not None and i.opcode in _THROUGH and i.operands:
        i = table.get(i.operands[0])
    return i


def _read(i: Instruction, table: Table, module: Module) -> float:
    if i.opcode in ("dynamic-slice", "gather", "slice"):
        source = arrays_in(i.operands[0], table)
        return float(i.arrays[0].bytes) if source and source[0].hbm else 0.0
    operands = i.operands[1:] if i.opcode == "dynamic-update-slice" else i.operands
    parts = _partly_read(i, module)
    total = 0.0
    for n, name in enumerate(operands):
        size = sum(a.bytes for a in arrays_in(name, table) if a.hbm)
        total += min(size, parts.get(n, size))
    return total


def _partly_read(i: Instruction, module: Module) -> dict[int, int]:
    """Number of a fusion's operand -> bytes, of those of which slices alone are used."""
    users: dict[str, list[tuple[Instruction, int]]] = defaultdict(list)
    body = _body(i, module)
    for j in body:
        for place, name in enumerate(j.operands):
            users[name].append((j, place))
    sizes = {int(j.text): _used(j.name, users, module) for j in body if j.opcode == "parameter"}
    return {n: size for n, size in sizes.items() if size is not None}


def _used(name: str, users: dict[str, list[tuple[Instruction, int]]], module: Module) -> int | None:
    """Bytes read of an array inside a fusion; None: all of it."""
    if not users[name]:  # the fusion's result
        return None
    total = 0
    for user, place in users[name]:
        if user.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
            total += sum(a.bytes for a in user.arrays)
            continue
        inner = _partly_read(user, module).get(place) if user.opcode == "fusion" else None
        if inner is None and user.opcode in _THROUGH and len(user.operands) == 1:
            inner = _used(user.name, users, module)  # element by element
        handed_on = (
            (user.opcode == "dynamic-update-slice" and place == 0)  # in place
            or user.opcode in ("tuple", "custom-call")  # by a piece of an exchange
            or is_collective(user)
        )
        if inner is None and not handed_on:
            return None
        total += inner or 0
    return total
