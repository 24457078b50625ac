"""FLOPs of the matrix products in a compiled program."""

import math
import re
from functools import cache

from minigpt4_jax.aot.hlo import Computation, HloInstruction, Module, operand_arrays
from minigpt4_jax.models.attention import SPLASH_BLOCK


def matmul_flops(
    i: HloInstruction, computation: Computation, module: Module
) -> tuple[float, float]:
    """(FLOPs, FLOPs times bfloat16 passes) of an instruction and, for a fusion, of all it contains."""
    if i.opcode in ("dot", "convolution"):
        flops = (_dot_flops if i.opcode == "dot" else _convolution_flops)(i, computation)
        return flops, flops * _bfloat16_passes(i, computation)
    if i.opcode == "custom-call":
        flops = _library_product_flops(i, computation) or _attention_kernel_flops(i, computation)
        return flops, flops * (_bfloat16_passes(i, computation) if i.operands else 1)
    flops = mxu_flops = 0.0
    if i.opcode == "fusion":
        for name in i.called:
            body = module.computations.get(name, {})
            for inner in body.values():
                inner_flops, inner_mxu_flops = matmul_flops(inner, body, module)
                flops, mxu_flops = flops + inner_flops, mxu_flops + inner_mxu_flops
    return flops, mxu_flops


def _library_product_flops(i: HloInstruction, computation: Computation) -> float:
    """FLOPs of a product that XLA leaves to cuBLAS, or of an attention of cuDNN; 0 for other calls."""
    result = i.arrays[0] if i.arrays else None
    if 'custom_call_target="__cublas' in i.attributes:
        contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', i.attributes)
        left = operand_arrays(i.operands[0], computation)
        if result is None or contracted is None or not left:
            return 0.0
        axes = [int(d) for d in re.findall(r"\d+", contracted[1])]
        return 2.0 * result.size * math.prod(left[0].dims[a] for a in axes)
    if match := re.search(r'custom_call_target="__cudnn\$fmha\w*?(Backward)?"', i.attributes):
        # queries and keys [B, tokens, heads, H]; the backward pass recomputes the scores
        query, key = (operand_arrays(name, computation)[0] for name in i.operands[:2])
        return 2.0 * (5 if match[1] else 2) * query.size * key.dims[1]
    return 0.0


# Matrix products per block of scores in each kernel of splash attention (models/attention.py)
_KERNEL_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


def _attention_kernel_flops(i: HloInstruction, computation: Computation) -> float:
    """FLOPs of a causal attention kernel; 0 for other custom calls."""
    match = re.match(r"splash_mha_(fwd|dq|dkv)", i.name)
    operands = [a for name in i.operands for a in operand_arrays(name, computation)]
    operands = [a for a in operands if a.dtype == "bf16"]
    if not match or not operands:
        return 0.0
    *heads, tokens, head_dim = operands[0].dims  # queries [B, N, T, H], without B if it is 1
    blocks = tokens // SPLASH_BLOCK
    scores = math.prod(heads) * blocks * (blocks + 1) // 2 * SPLASH_BLOCK**2
    return 2.0 * _KERNEL_PRODUCTS[match[1]] * scores * head_dim


def _bfloat16_passes(i: HloInstruction, computation: Computation) -> float:
    """bfloat16 passes of the matrix unit: a float32 product takes 6 at highest precision, 3 at high; GPUs
    multiply float8 at twice the rate of bfloat16."""
    if 'custom_call_target="__cublas$lt$matmul$f8"' in i.attributes:
        return 0.5
    dtypes = {a.dtype for name in i.operands[:2] for a in operand_arrays(name, computation)}
    if "f32" not in dtypes:
        return 1
    return 6 if "highest" in i.attributes else 3 if "high" in i.attributes else 1


def _dot_flops(i: HloInstruction, computation: Computation) -> float:
    """2 x elements of the result x size of the contracted dimensions."""
    left = operand_arrays(i.operands[0], computation)
    axes = [int(d) for d in re.findall(r"\d+", i.attribute("lhs_contracting_dims"))]
    return 2.0 * i.arrays[0].size * math.prod(left[0].dims[a] for a in axes) if left else 0.0


def _convolution_flops(i: HloInstruction, computation: Computation) -> float:
    """2 x batch x output features x input features of a group x position pairs that overlap.

    The TPU compiler writes matrix products as convolutions; the batch of an attention product becomes
    dilated positions, most of which meet only padding.
    """
    left, right = (operand_arrays(name, computation) for name in i.operands[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    if not labels or not left or not right:
        return 0.0
    input_labels, kernel_labels, output_labels = labels.groups()
    output, kernel = i.arrays[0].dims, right[0].dims
    total = 2.0 * output[output_labels.index("b")] * output[output_labels.index("f")]
    total *= kernel[kernel_labels.index("i")]
    window = i.attribute("window")
    for axis in range(len(output_labels) - 2):
        label = str(axis)
        total *= _overlapping_pairs(
            left[0].dims[input_labels.index(label)], kernel[kernel_labels.index(label)],
            output[output_labels.index(label)], stride=_window_value(window, "stride", axis, 1),
            input_dilation=_window_value(window, "lhs_dilate", axis, 1),
            kernel_dilation=_window_value(window, "rhs_dilate", axis, 1),
            padding=_window_value(window, "pad", axis, 0),
        )  # fmt: skip
    return total / int(i.attribute("batch_group_count") or 1)


def _window_value(window: str, name: str, axis: int, default: int) -> int:
    """Value of one axis in window={size=1x3 stride=1x2 pad=0_0x2_2}; for pad the low padding."""
    match = re.search(rf"\b{name}=([\dx_\-]+)", window)
    return int(match[1].split("x")[axis].split("_")[0]) if match else default


@cache
def _overlapping_pairs(
    input_size: int, kernel_size: int, output_size: int,
    stride: int, input_dilation: int, kernel_dilation: int, padding: int,
) -> int:  # fmt: skip
    """Pairs (output position, kernel position) that read an input element, not padding."""
    if (kernel_size, padding, stride, input_dilation) == (1, 0, 1, 1):
        return output_size
    pairs = 0
    for k in range(kernel_size):
        offset = k * kernel_dilation - padding
        for o in range(output_size):
            position = offset + o * stride
            in_range = 0 <= position <= (input_size - 1) * input_dilation
            pairs += in_range and position % input_dilation == 0
    return pairs
