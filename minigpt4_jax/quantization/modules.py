"""Quantizing the parameters of modules in place."""

from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from minigpt4_jax.quantization.layout import group_matrix, transpose_scales
from minigpt4_jax.quantization.schemes import Array, BlockFormat, matrix_scheme, quantize


def quantize_linears(
    linears: Iterable[tuple[tuple[Any, ...], Any]],
    scheme: str,
    make_param: Callable[[Array], Any],
    block_formats: Iterable[str] = (),
) -> None:
    """Quantize the weights [..., out, in] of linear maps, given as (path, module).

    make_param: wraps an array as a parameter. block_formats: as for `matrix_scheme`.
    """
    for path, module in linears:
        name = f"{'.'.join(map(str, path))}.weight"
        weight_scheme = matrix_scheme(name, scheme, module.weight.shape[-1], block_formats)
        if weight_scheme is not None:
            quantize_parameter(module, "weight", weight_scheme, make_param)


def quantize_parameter(
    module: Any, name: str, scheme: str, make_param: Callable[[Array], Any]
) -> None:
    """Quantize parameter `name` [..., out, in] of a module and add `NAME_scale` (and `NAME_offset`).

    scheme: "int8", "int4", or the text of a BlockFormat, whose arrays are zeros until its file is
    read. A parameter named "weight" takes the memory layout of quantization/layout.py; others, which
    are tables looked up by rows, the storage layout.
    """
    weight = getattr(module, name)[...]
    if block_format := BlockFormat.parse(scheme):
        level_dtype = np.int8 if block_format.bits == 8 else np.uint8
        arrays = {
            suffix: jnp.zeros(shape, np.float32 if suffix else level_dtype)
            for suffix, shape in block_format.shapes(weight.shape).items()
        }
    else:
        levels, scale = quantize(weight, scheme, jnp)
        arrays = {"": levels, "_scale": scale}
    has_groups = arrays["_scale"].ndim == weight.ndim
    groups = arrays["_scale"].shape[-1]
    for suffix, array in arrays.items():
        if has_groups and name == "weight":
            array = transpose_scales(array) if suffix else group_matrix(array, groups)
        setattr(module, name + suffix, make_param(array))
