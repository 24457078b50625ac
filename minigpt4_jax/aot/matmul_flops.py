"""Operations of the matrix products in a compiled program's text."""

import math
import re
from functools import cache

from minigpt4_jax.aot.hlo import Instruction, Module, Table, arrays_in
from minigpt4_jax.models.attention import KERNEL_BLOCK


def operations(i: Instruction, table: Table, module: Module) -> tuple[float, float]:
    """(operations, operations times passes) of an instruction and of all it contains."""
    if i.opcode in ("dot", "convolution"):
        flops = _dot(i, table) if i.opcode == "dot" else _convolution(i, table)
        return flops, flops * _passes(i, table)
    flops = passes = 0.0
    if i.opcode == "custom-call":
        return (_kernel(i, table),) * 2
    if i.opcode == "fusion":
        for name in i.called:
            inner = {j.name: j for j in module.computations.get(name, ())}
            for j in inner.values():
                more, most = operations(j, inner, module)
                flops, passes = flops + more, passes + most
    return flops, passes


# Products of a block of scores in each of the kernels of causal attention (models/kernels.py)
_KERNELS = {"fwd": 2, "dq": 3, "dkv": 4}


def _kernel(i: Instruction, table: Table) -> float:
    """Of a kernel of causal attention; of others nothing is known."""
    found = re.match(r"splash_mha_(fwd|dq|dkv)", i.name)
    operands = [a for name in i.operands for a in arrays_in(name, table) if a.kind == "bf16"]
    if not found or not operands:
        return 0.0
    *heads, tokens, width = operands[0].dims  # queries [B, N, T, H]; without B where it is 1
    blocks = tokens // KERNEL_BLOCK
    scores = math.prod(heads) * blocks * (blocks + 1) // 2 * KERNEL_BLOCK**2
    return 2.0 * _KERNELS[found[1]] * scores * width


def _passes(i: Instruction, table: Table) -> int:
    """Passes of the bfloat16 unit: a float32 product of highest precision is put together of 6,
    of high precision of 3."""
    kinds = {a.kind for name in i.operands[:2] for a in arrays_in(name, table)}
    if "f32" not in kinds:
        return 1
    return 6 if "highest" in i.attributes else 3 if "high" in i.attributes else 1


def _dot(i: Instruction, table: Table) -> float:
    """2 x elements of the result x length of the sums."""
    left = arrays_in(i.operands[0], table)
    axes = [int(d) for d in re.findall(r"\d+", i.attribute("lhs_contracting_dims"))]
    return 2.0 * i.arrays[0].size * math.prod(left[0].dims[a] for a in axes) if left else 0.0


def _convolution(i: Instruction, table: Table) -> float:
    """2 x batch x outputs x inputs of a group x pairs of positions that meet: the compiler writes
    products this way, the batch of an attention as dilated positions of which most meet padding."""
    left, right = (arrays_in(name, table) for name in i.operands[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    if not labels or not left or not right:
        return 0.0
    base, kernel, out = labels[1], labels[2], labels[3]
    dims = i.arrays[0].dims
    total = 2.0 * dims[out.index("b")] * dims[out.index("f")] * right[0].dims[kernel.index("i")]
    window = i.attribute("window")
    for n in range(len(out) - 2):
        at = str(n)
        total *= _meetings(
            left[0].dims[base.index(at)], right[0].dims[kernel.index(at)], dims[out.index(at)],
            _window(window, "stride", n, 1), _window(window, "lhs_dilate", n, 1),
            _window(window, "rhs_dilate", n, 1), _window(window, "pad", n, 0),
        )  # fmt: skip
    return total / int(i.attribute("batch_group_count") or 1)


def _window(text: str, name: str, n: int, default: int) -> int:
    """The n-th value of one entry of window={size=1x3 stride=1x2 pad=0_0x2_2}; of pad the first."""
    found = re.search(rf"\b{name}=([\dx_\-]+)", text)
    return int(found[1].split("x")[n].split("_")[0]) if found else default


@cache
def _meetings(
    base: int, kernel: int, out: int, stride: int, spread: int, dilate: int, pad: int
) -> int:
    """Pairs of an output position and a kernel position that meet an element of the base."""
    if kernel == 1 and pad == 0 and stride == 1 and spread == 1:
        return out
    found = 0
    for k in range(kernel):
        first = k * dilate - pad
        for o in range(out):
            at = first + o * stride
            found += 0 <= at <= (base - 1) * spread and at % spread == 0
    return found
