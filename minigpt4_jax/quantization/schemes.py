"""Weights in 8 and 4 bits: which matrices, how they are rounded, and how a directory stores them.

int8: a scale for each output channel, levels -127 to 127 (LLM.int8() paper, without its outliers).
int4: a scale for each group of 64 (or 32) inputs of an output channel, levels -8 to 7, two of them
a byte: byte j of a group holds input j in its low half and input j + group / 2 in its high half,
each as level + 8. XLA on CPU takes a byte for each int4, hence bytes packed here.
The scale of `NAME` is `NAME_scale`, stored in bfloat16; a weight is rounded against the rounded
scale, so nothing more is lost by it. Activations are not rounded.
gguf: the blocks of a GGUF file as they are, see `BlockFormat`.

A directory holds levels as [out, in] or packed [out, in / 2], scales as [out] or [out, groups]. In
memory a linear map that has groups is turned around: levels [groups, group, out] (or packed [groups,
group / 2, out]) and scale [groups, out]. So a product multiplies the halves of all bytes by the
inputs they are for as it reads them, and nothing has to be moved together; a TPU's rows of 128
lanes then run along the outputs. The embedding, which is looked up by rows, lies as it is stored.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import ml_dtypes
import numpy as np

Array = Any  # of NumPy or JAX
Shape = tuple[int, ...]
GROUPS = (64, 32)  # inputs that share a scale in int4: the first that divides their number
PIECE = 1 << 22  # elements that are rounded at a time
GGUF = "gguf"  # the scheme of a model whose language model keeps a GGUF file's blocks


class BlockFormat(NamedTuple):
    """A matrix in blocks of a GGUF file: weight = level * scale, + offset where there is one.

    Each `group` of inputs has a scale [..., out, groups] (`NAME_scale`), and an offset of the same
    shape (`NAME_offset`). Levels of 8 bits are int8, those of 4 are packed as in int4: -8 to 7, or
    with an offset 0 to 15. Scales and offsets are stored as float32, which holds every one exactly.
    """

    bits: int
    group: int
    offset: bool

    def __str__(self) -> str:
        return f"int{self.bits}/{self.group}{'+' if self.offset else ''}"

    @classmethod
    def parse(cls, text: str) -> "BlockFormat | None":
        """The inverse of str(); None for another kind, such as "int8"."""
        m = re.fullmatch(r"int([48])/(\d+)(\+?)", text)
        return m and cls(int(m[1]), int(m[2]), bool(m[3]))

    def shapes(self, shape: Shape) -> dict[str, Shape]:
        """Of the arrays of a weight [..., out, in], by what is put behind its name."""
        groups = (*shape[:-1], shape[-1] // self.group)
        levels = shape if self.bits == 8 else (*shape[:-1], shape[-1] // 2)
        return {"": levels, "_scale": groups} | ({"_offset": groups} if self.offset else {})


def kept_name(name: str) -> str:
    """What all layers share of a parameter's name."""
    return re.sub(r"\.\d+\.", ".", name)


def scheme_of(name: str, scheme: str | None, n_in: int, kept: Iterable[str] = ()) -> str | None:
    """How a model of `scheme` holds parameter `name` ("int8", "int4"), or None: as it is.

    The matrices of the language model and of the vision encoder's blocks are in `scheme`, the
    embedding in int8. A matrix whose inputs do not divide into groups is in int8.
    kept: "NAME KIND" of the language model's matrices, for the scheme "gguf" (ModelConfig.kept), where
    the vision encoder is in int8.
    """
    if scheme is None:
        return None
    if scheme == GGUF and name.startswith("llm."):
        return dict(line.split() for line in kept).get(kept_name(name))
    if name == "llm.embed":
        return "int8"
    if not re.fullmatch(r"((llm|vit)\.blocks\..*|llm\.head)\.weight", name):
        return None
    return "int4" if scheme == "int4" and group_size(n_in) else "int8"


def group_size(n_in: int) -> int:
    """Inputs that share a scale in int4; 0 when there is no such division."""
    return next((g for g in GROUPS if n_in % g == 0), 0)


def quantized_shapes(shape: Shape, kind: str) -> tuple[Shape, Shape]:
    """Shapes of the weight and of its scale, for a weight [..., out, in]."""
    if kind == "int8":
        return shape, shape[:-1]
    n_in = shape[-1]
    return (*shape[:-1], n_in // 2), (*shape[:-1], n_in // group_size(n_in))


def quantize(weight: Array, kind: str, xp: Any = np) -> tuple[Array, Array]:
    """weight [..., out, in] of floats -> (levels, scale bfloat16).

    int8: int8 [..., out, in] and [..., out]; int4: uint8 [..., out, in / 2] and [..., out, groups].
    xp: numpy or jax.numpy, whichever the weight is of.
    """
    weight = weight.astype(np.float32)
    if kind == "int8":
        largest = xp.abs(weight).max(-1)
        scale = _nonzero(largest / 127, xp)
        levels = xp.rint(weight / scale.astype(np.float32)[..., None])
        return xp.clip(levels, -127, 127).astype(np.int8), scale
    size = group_size(weight.shape[-1])
    groups = weight.reshape(*weight.shape[:-1], -1, size)
    # The largest of a group becomes level -8, whatever its sign: all 16 levels are in use. (A smaller
    # scale of less squared error was tried, and SmolLM2's perplexity was the worse for it.)
    low, high = groups.min(-1), groups.max(-1)
    scale = _nonzero(xp.where(-low >= high, low, high) / -8, xp)
    levels = xp.rint(groups / scale.astype(np.float32)[..., None])
    levels = (xp.clip(levels, -8, 7) + 8).astype(np.uint8)
    first, second = levels[..., : size // 2], levels[..., size // 2 :]
    return (first | (second << 4)).reshape(*weight.shape[:-1], -1), scale


def _nonzero(scale: Array, xp: Any) -> Array:
    scale = scale.astype(ml_dtypes.bfloat16)
    return xp.where(scale == 0, xp.ones_like(scale), scale)


def dequantize(
    levels: Array, scale: Array, dtype: Any, xp: Any = jnp, offset: Array | None = None
) -> Array:
    """The inverse of `quantize`, up to its rounding, and what `BlockFormat` arrays stand for:
    [..., out, in] in dtype."""
    factor = scale.astype(np.float32)[..., None]
    if scale.ndim < levels.ndim:  # a scale for each channel
        return (levels.astype(np.float32) * factor).astype(dtype)
    groups = levels.reshape(*scale.shape, -1)
    if levels.dtype == np.uint8:
        groups = xp.concatenate([groups & 15, groups >> 4], axis=-1)
    groups = groups.astype(np.float32)
    if levels.dtype == np.uint8 and offset is None:
        groups = groups - 8
    groups = groups * factor
    if offset is not None:
        groups = groups + offset.astype(np.float32)[..., None]
    return groups.astype(dtype).reshape(*levels.shape[:-1], -1)


# --- how grouped matrices lie in memory ----------------------------------------------------------


def turned(levels: Array, groups: int) -> Array:
    """Levels [..., out, n] as a directory holds them -> [..., groups, n / groups, out]."""
    parts = levels.reshape(*levels.shape[:-1], groups, -1)
    return parts.swapaxes(-3, -2).swapaxes(-2, -1)


def is_turned(name: str, rank: int) -> bool:
    """Whether a parameter (of one layer) with so many dimensions belongs to a grouped linear map."""
    levels = name.endswith(".weight") and rank == 3
    return levels or (name.endswith((".weight_scale", ".weight_offset")) and rank == 2)


def stored_shape(name: str, shape: Shape) -> Shape:
    """In a directory, of a parameter (of one layer) whose shape in memory is given."""
    if not is_turned(name, len(shape)):
        return shape
    return shape[-1], math.prod(shape[:-1])


def as_stored(name: str, array: np.ndarray) -> np.ndarray:
    """A parameter of one layer, as a directory holds it."""
    if not is_turned(name, array.ndim):
        return array
    return np.moveaxis(array, -1, 0).reshape(stored_shape(name, array.shape))


def as_held(name: str, array: np.ndarray, shape: Shape) -> np.ndarray:
    """The inverse, for a parameter whose shape in memory is given."""
    if not is_turned(name, len(shape)):
        return array
    return _transposed(array).reshape(shape)


def _transposed(a: np.ndarray) -> np.ndarray:
    """a.T of a matrix, written by blocks that stay in the cache: four times as fast for large ones."""
    b, block = np.empty(a.shape[::-1], a.dtype), 256
    for i in range(0, a.shape[0], block):
        for j in range(0, a.shape[1], block):
            b[j : j + block, i : i + block] = a[i : i + block, j : j + block].T
    return b


# --- tensors of a directory ----------------------------------------------------------------------


def quantize_large(weight: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """`quantize` of a host array [out, in], some rows at a time, so that little lies beside it."""
    rows = max(1, PIECE // weight.shape[-1])
    pieces = [quantize(weight[i : i + rows], kind) for i in range(0, len(weight), rows)]
    levels, scales = zip(*pieces, strict=True)
    return np.concatenate(levels), np.concatenate(scales)


def quantized(
    tensors: Iterable[tuple[str, np.ndarray]], scheme: str, kept: Iterable[str] = ()
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a float model as those of one in `scheme`, one at a time; arrays of a matrix
    that is `kept` pass."""
    for name, array in tensors:
        kind = scheme_of(name, scheme, array.shape[-1], kept) if array.ndim > 1 else None
        if kind is None or BlockFormat.parse(kind):
            yield name, array
        else:
            levels, scale = quantize_large(array, kind)
            yield name, levels
            yield f"{name}_scale", scale


class _Readable(Protocol):
    def __iter__(self) -> Iterator[str]: ...
    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray: ...
    def shape(self, name: str) -> Shape: ...


class QuantizedView(Mapping[str, np.ndarray]):
    """Lazy view of a directory's tensors in `scheme`: those stored as floats are rounded when read.

    So are those stored in int8 that are to be int4: earlier versions wrote models in int4 whose
    output matrix and vision encoder were in int8.
    """

    def __init__(self, tensors: _Readable, scheme: str):
        self._tensors = tensors
        names = set(tensors)
        self._kinds: dict[str, str] = {}  # of those to be rounded
        self._stored, self._names = names, list(names)
        self._last: tuple[str, range] | None = None  # of which _both is
        self._both: tuple[np.ndarray, np.ndarray] | None = None
        for name in names:
            kind = scheme_of(name, scheme, (tensors.shape(name) or (0,))[-1])
            if kind is None:
                continue
            if f"{name}_scale" not in names:
                self._kinds[name] = kind
                self._names.append(f"{name}_scale")
            elif kind == "int4" and len(tensors.shape(f"{name}_scale")) == 1:
                self._kinds[name] = kind

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.part(name, (slice(None),) * len(self.shape(name)))

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """self[name][index]; of a matrix to be rounded whole rows are read, as a scale is of them."""
        weight = name.removesuffix("_scale")
        if weight not in self._kinds:
            return self._tensors.part(name, index)
        both = self._rounded(weight, index[0])
        return both[name != weight][(slice(None), *index[1:])]

    def _rounded(self, name: str, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Levels and scale of some rows. The last are kept, for the scale is asked for behind the
        levels, and columns may be asked for one part after the other."""
        at = range(self._tensors.shape(name)[0])[rows]
        if (name, at) != self._last:
            self._both = None  # first: two of them are not held
            weight, scale = self._tensors.part(name, (rows, slice(None))), f"{name}_scale"
            if scale in self._stored:
                scales = self._tensors.part(scale, (rows,))
                weight = dequantize(weight, scales, np.float32, np)
            self._both, self._last = quantize_large(weight, self._kinds[name]), (name, at)
        assert self._both is not None
        return self._both

    def shape(self, name: str) -> Shape:
        weight = name.removesuffix("_scale")
        if weight not in self._kinds:
            return self._tensors.shape(name)
        return quantized_shapes(self._tensors.shape(weight), self._kinds[weight])[name != weight]


def quantize_modules(
    modules: Iterable[tuple[tuple, Any]],
    scheme: str,
    make: Callable[[Array], Any],
    kept: Iterable[str] = (),
) -> None:
    """Round the weights of linear maps, given as (path, module); `make` wraps an array."""
    for path, module in modules:
        name = f"{'.'.join(map(str, path))}.weight"
        kind = scheme_of(name, scheme, module.weight.shape[-1], kept)
        if kind is not None:
            quantize_parameter(module, "weight", kind, make)


def quantize_parameter(module: Any, name: str, kind: str, make: Callable[[Array], Any]) -> None:
    """Round parameter `name` of a module; one that is kept has zeros until its file is read. The
    `weight` of a linear map lies as described above, a table [rows, in] as it is stored."""
    weight = getattr(module, name)[...]
    if blocks := BlockFormat.parse(kind):
        arrays = {
            suffix: jnp.zeros(
                shape, np.float32 if suffix else np.int8 if blocks.bits == 8 else np.uint8
            )
            for suffix, shape in blocks.shapes(weight.shape).items()
        }
    else:
        levels, scale = quantize(weight, kind, jnp)
        arrays = {"": levels, "_scale": scale}
    grouped = arrays["_scale"].ndim == weight.ndim
    for suffix, array in arrays.items():
        if grouped and name == "weight":
            groups = arrays["_scale"].shape[-1]
            array = array.swapaxes(-2, -1) if suffix else turned(array, groups)
        setattr(module, name + suffix, make(array))
