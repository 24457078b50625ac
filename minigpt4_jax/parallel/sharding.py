"""The device mesh, the partition rules of parameters, and shardings of batches and activations.

The axes of the mesh:
    data   splits the rows of a batch.
    fsdp   splits the rows too, and every large matrix, which is all-gathered layer by layer where it
           is used (ZeRO paper, stage 3; PyTorch FSDP).
    model  splits heads, FFN and vocabulary: one product by its outputs, the next one by its inputs
           (tensor parallelism; Megatron-LM paper, section 3).
A dimension that an axis does not divide is not split over it, so any number of heads or tokens works.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial, wraps
from typing import Any, TypeVar

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.quantization.layout import is_grouped, outputs_first
from minigpt4_jax.quantization.schemes import int4_group_size

AXES = ("data", "fsdp", "model")
BATCH_AXES = ("data", "fsdp")  # the axes that split the rows of a batch
CHUNK_BYTES = 64 << 20  # of an array of stacked layers, copied to devices at a time
Axis = str | tuple[str, ...] | None  # the mesh axes that split a dimension
Shape = tuple[int, ...]
R = TypeVar("R")
Index = tuple[slice, ...]  # a part of an array
ReadShard = Callable[[Index], Any]  # index -> host array of that part

COLUMN_PARALLEL, ROW_PARALLEL = P("model", "fsdp"), P("fsdp", "model")  # of a matrix [out, in]

STACKED_LAYERS = ("vit.blocks.", "llm.blocks.", "llm.encoder_blocks.")  # stacked unless numbered

# Parameter name without its layer number -> its sharding, without the axis of stacked layers.
PARTITION_RULES = (
    (r".*blocks\.(attn|cross|mlp|text_mlp)\.(q|k|v|qkv|gate|up)\.weight", COLUMN_PARALLEL),
    (r".*blocks\.(attn|cross|mlp|text_mlp)\.(o|out|down)\.weight", ROW_PARALLEL),
    (r"llm\.(embed|head\.weight)", COLUMN_PARALLEL),
    # trained and small parameters are replicated
    (r"projection\.(weight|bias)", P()),
    (r".*\.lora_[ab]", P()),
    (r"vit\.(cls|pos|patch\.weight)|qformer\.(query|embed|positions|temperature)", P()),
    (r"qformer\.(vision_projection|text_projection|itm_head|lm_head\.dense)\.weight", P()),
    (r"llm\.(positions|relative|encoder_relative)", P()),
    (r"(.*\.)?(norm\d?|(encoder|cross|[qk])_norm|ln_vision)\.(scale|bias)", P()),
    (r".*(\.|_)bias", P()),
)


# --- the mesh -------------------------------------------------------------------------------


def parse_mesh(text: str, devices: int) -> dict[str, int]:
    """ "data:2,model:4" -> the size of every axis; one axis may be -1: the remaining devices.

    UserError: a syntax error, an unknown axis, or sizes whose product is not `devices`.
    """
    sizes = dict.fromkeys(AXES, 1)
    seen = set()
    for part in text.split(","):
        name, colon, size = (piece.strip() for piece in part.partition(":"))
        if not colon or not re.fullmatch(r"-1|[1-9]\d{0,8}", size):
            raise UserError(f"mesh {text!r}: {part!r} is not AXIS:SIZE, as in data:2,model:4")
        if name not in AXES or name in seen:
            problem = "duplicate axis" if name in seen else "unknown axis"
            raise UserError(
                f"mesh {text!r}: {problem} {name!r}; expected each of {AXES} at most once"
            )
        seen.add(name)
        sizes[name] = int(size)
    open_axes = [name for name in AXES if sizes[name] == -1]
    if len(open_axes) > 1:
        raise UserError(f"mesh {text!r}: only one axis can be -1, the remaining devices")
    given = math.prod(size for size in sizes.values() if size > 0)
    if open_axes and devices % given == 0:
        sizes[open_axes[0]] = devices // given
    elif open_axes or given != devices:
        raise UserError(
            f"mesh {text!r} needs {'a multiple of ' if open_axes else ''}{given} devices, but there "
            f"are {devices}: expected sizes whose product is {devices}, for example data:{devices}"
        )
    return sizes


def make_mesh(sizes: dict[str, int], devices: Any = None) -> Mesh:
    """A mesh of these axis sizes (missing axes: 1) over `devices`, by default all of them."""
    shape = tuple(sizes.get(name, 1) for name in AXES)
    types = (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # a TPU slice that needs a physical axis split over two mesh axes
        device_array = mesh_utils.create_device_mesh(
            shape, devices or jax.devices(), allow_split_physical_axes=True
        )
        return Mesh(device_array, AXES, axis_types=types)


def inference_mesh(text: str, config: ModelConfig) -> Mesh:
    """The mesh of a text for `parse_mesh`, or of "auto": the language model's heads over as many
    devices as divide them, rows over the rest. UserError as in `parse_mesh`."""
    return make_mesh(inference_mesh_sizes(text, config, jax.device_count()))


def inference_mesh_sizes(text: str, config: ModelConfig, devices: int) -> dict[str, int]:
    """Axis name -> size of `inference_mesh` over this many devices."""
    if text != "auto":
        return parse_mesh(text, devices)
    model = math.gcd(devices, config.llm.kv_heads)
    return {"data": devices // model, "model": model}


def single_device_mesh() -> Mesh:
    """A mesh of this process's first device."""
    return make_mesh({}, jax.local_devices()[:1])


def describe_mesh(mesh: Mesh) -> str:
    """For example "data:2,model:4"; axes of size 1 are omitted."""
    parts = [f"{name}:{size}" for name, size in mesh.shape.items() if size > 1]
    return ",".join(parts) or "one device"


# --- parameters -----------------------------------------------------------------------------


def parameter_spec(
    name: str, shape: Shape, dtype: Any, config: ModelConfig, sizes: Mapping[str, int]
) -> P:
    """The PartitionSpec of a parameter on a mesh of these sizes (axis name -> size).

    name: a dotted path. Stacked layers have no layer number in it and a leading axis L in their shape.
    KeyError: no rule of PARTITION_RULES matches.
    """
    return partition_spec(name, shape, dtype, _heads(name, config), sizes)


def partition_spec(name: str, shape: Shape, dtype: Any, heads: int, sizes: Mapping[str, int]) -> P:
    """As `parameter_spec`. heads: the number of heads in an attention matrix; a head is not split."""
    plain = re.sub(r"blocks\.\d+\.", "blocks.", name)
    stacked = plain == name and name.startswith(STACKED_LAYERS)
    dims = list(shape[stacked:])
    weight = re.sub("_(scale|offset)$", "", plain)  # scales are split as their matrix
    spec = next((spec for rule, spec in PARTITION_RULES if re.fullmatch(rule, weight)), None)
    if spec is None:
        raise KeyError(
            f"{name}: no rule of minigpt4_jax.parallel.sharding.PARTITION_RULES matches this parameter"
        )
    grouped = is_grouped(plain, len(dims))
    if grouped:  # levels [groups, group, out] or scale [groups, out]: a group is not split
        dims = dims[:2] if outputs_first() else [dims[-1], dims[0]]
    elif dtype == jax.numpy.uint8:  # a packed table: a group is not split here either
        dims[-1] = 2 * dims[-1] // (int4_group_size(2 * dims[-1]) or 2 * dims[-1])
    axes: list[Axis] = [*spec[: len(dims)], *[None] * (len(dims) - len(spec))]
    if "model" in axes and len(dims) == 2:
        dim, model = axes.index("model"), sizes["model"]
        unsplit_heads = heads if re.search(r"\.(attn|cross)\.", plain) else 0
        if dims[dim] % model or unsplit_heads % model:
            # Not divisible (32001 tokens, or too few heads): split the other dimension instead.
            axes[dim], axes[1 - dim] = None, ("fsdp", "model")
    if grouped and axes == ["model", "fsdp"] and dims[1] % sizes["fsdp"]:
        axes = [("model", "fsdp"), None]  # the vision encoder's width has 22 groups
    split = divisible_axes(dims, axes, sizes)
    if grouped and outputs_first():  # [out, groups, group] or [out, groups]
        split += [None] * (weight == plain)
    elif grouped:  # back to [groups, group, out] or [groups, out]
        split = [split[1], *[None] * (weight == plain), split[0]]
    return P(*[None] * stacked, *split)


def _heads(name: str, config: ModelConfig) -> int:
    """The number of key heads in the component that a parameter belongs to."""
    part = name.partition(".")[0]
    if part == "qformer" and config.qformer is not None:
        return config.qformer.heads
    return config.vision.heads if part == "vit" else config.llm.kv_heads


def parameter_sharding(
    name: str, shape: Shape, dtype: Any, config: ModelConfig, mesh: Mesh
) -> NamedSharding:
    """The sharding of a parameter on a mesh; arguments and errors as in `parameter_spec`."""
    return NamedSharding(mesh, parameter_spec(name, shape, dtype, config, mesh.shape))


def divisible_axes(
    dims: Sequence[int], axes: Sequence[Axis], sizes: Mapping[str, int]
) -> list[Axis]:
    """For each dimension, those of its axes (one entry of `axes` each) that divide it."""
    result: list[Axis] = []
    for dim, axis in zip(dims, axes, strict=True):
        used: tuple[str, ...] = ()
        for name in _axis_names(axis):
            if dim % math.prod(sizes[a] for a in (*used, name)) == 0 and sizes[name] > 1:
                used += (name,)
        result.append(used[0] if len(used) == 1 else used or None)
    return result


def make_sharded_array(shape: Shape, sharding: NamedSharding, read: ReadShard) -> jax.Array:
    """An array whose shards are read from the host: `read` is called once per distinct shard of this
    process's devices, and the host holds one shard at a time. (jax.make_array_from_callback calls it
    once per device.)"""
    arrays = []
    for index, devices in _distinct_shards(shape, sharding):
        shard = read(index)
        arrays += [jax.device_put(shard, device) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _distinct_shards(shape: Shape, sharding: NamedSharding) -> list[tuple[Index, list[jax.Device]]]:
    """The shards of this process's devices, and the devices of each."""
    shards: dict[str, tuple[Index, list[jax.Device]]] = {}
    indices: Any = sharding.addressable_devices_indices_map(shape)
    for device, index in indices.items():
        shards.setdefault(str(index), (index, []))[1].append(device)
    return list(shards.values())


def devices_have_own_memory() -> bool:
    """Whether devices have memory of their own; CPU devices share the host's."""
    return jax.default_backend() != "cpu"


def make_sharded_array_in_chunks(
    shape: Shape,
    dtype: Any,
    sharding: NamedSharding,
    read: ReadShard,
) -> jax.Array:
    """As `make_sharded_array`, for an array [L, ...] whose first axis is not split.

    At most CHUNK_BYTES of a device's shard, or one layer, are copied at a time into a donated array, so
    neither the host nor a device holds the array twice.
    """
    chunks = _chunks(shape, dtype, sharding)
    if len(chunks) == 1:
        return make_sharded_array(shape, sharding, read)
    array, previous = _zeros(shape, dtype, sharding)(), None
    for layers in chunks:
        chunk_shape = (layers.stop - layers.start, *shape[1:])
        chunk = make_sharded_array(chunk_shape, sharding, partial(_read_layers, read, layers))
        array = _update_layers(sharding)(array, chunk, layers.start)
        jax.block_until_ready(previous)  # at most two chunks are on the host
        previous = chunk
    return array


def shards_to_read(
    shape: Shape, dtype: Any, sharding: NamedSharding, *, in_chunks: bool
) -> list[Index]:
    """What `make_sharded_array`, or `make_sharded_array_in_chunks`, calls `read` with, in order."""
    chunks = _chunks(shape, dtype, sharding) if in_chunks else []
    if len(chunks) < 2:
        return [index for index, _ in _distinct_shards(shape, sharding)]
    return [
        (layers, *index[1:])
        for layers in chunks
        for index, _ in _distinct_shards((layers.stop - layers.start, *shape[1:]), sharding)
    ]


def _chunks(shape: Shape, dtype: Any, sharding: NamedSharding) -> list[slice]:
    """The layers of an array [L, ...] that are copied to devices at a time."""
    layer_bytes = math.prod(sharding.shard_shape(shape)[1:]) * jax.numpy.dtype(dtype).itemsize
    count = max(1, CHUNK_BYTES // layer_bytes)
    return [slice(i, min(i + count, shape[0])) for i in range(0, shape[0], count)]


def _read_layers(read: ReadShard, layers: slice, index: Index) -> Any:
    return read((layers, *index[1:]))


def _zeros(shape: Shape, dtype: Any, sharding: NamedSharding) -> Callable[[], jax.Array]:
    return jax.jit(lambda: jax.numpy.zeros(shape, dtype), out_shardings=sharding)


@cache
def _update_layers(sharding: NamedSharding) -> Callable[..., jax.Array]:
    """(array [L, ...], chunk, its first layer) -> the updated array, in the memory of the old one."""
    update = partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
    return jax.jit(update, donate_argnums=0, out_shardings=sharding)


# --- batches and activations -----------------------------------------------------------------


def batch_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """The sharding of arrays [B, ...] with this many rows."""
    return NamedSharding(mesh, P(*divisible_axes((rows,), (BATCH_AXES,), mesh.shape)))


def shard_batch(batch: Any, mesh: Mesh | None, share: tuple[int, int] = (1, 1)) -> Any:
    """Host arrays [B, ...] -> arrays split by rows over the devices. share: (rows of the global batch,
    rows of this process), if the arrays hold only the rows of this process's devices."""
    if mesh is None or mesh.size == 1:
        return batch  # a compiled program transfers it faster than this function
    if jax.process_count() == 1:
        return jax.tree.map(lambda a: jax.device_put(a, batch_sharding(mesh, len(a))), batch)
    global_rows, local_rows = share

    def put(a: Any) -> jax.Array:
        global_shape = (len(a) * global_rows // local_rows, *a.shape[1:])
        sharding = batch_sharding(mesh, global_shape[0])
        result: jax.Array = jax.make_array_from_process_local_data(sharding, a, global_shape)
        return result

    return jax.tree.map(put, batch)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Host arrays, the same in every process -> arrays replicated on every device."""
    return jax.tree.map(
        lambda a: make_sharded_array(a.shape, replicated(mesh), a.__getitem__), tree
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Fully replicated sharding."""
    return NamedSharding(mesh, P())


def with_mesh(f: Callable[..., R], mesh: Mesh | None) -> Callable[..., R]:
    """f, to be compiled, with `constrain` and `shard_map_over` inside it using this mesh."""
    if mesh is None or mesh.size == 1:
        return f

    @wraps(f)
    def traced(*args: Any) -> R:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return f(*args)

    return traced


def constrain(x: jax.Array, *axes: Axis) -> jax.Array:
    """Constrain x so that its first dimensions are split over these axes, where they divide, and the
    others are replicated. Without a mesh: x."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = P(*divisible_axes(x.shape[: len(axes)], axes, mesh.shape))
    constrained: jax.Array = jax.lax.with_sharding_constraint(x, spec)
    return constrained


def all_gather_fsdp(x: jax.Array, name: str, heads: int) -> jax.Array:
    """The parameter x, all-gathered over fsdp and otherwise split as in `partition_spec`.

    All uses of the result share one gather; left to itself, XLA may gather a matrix again for every
    product. Without a mesh: x.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return x
    axes = partition_spec(name, x.shape, x.dtype, heads, mesh.shape)
    if not any("fsdp" in _axis_names(axis) for axis in axes):
        return x
    others = (tuple(a for a in _axis_names(axis) if a != "fsdp") or None for axis in axes)
    gathered: jax.Array = jax.lax.with_sharding_constraint(x, P(*others))
    return gathered


def _axis_names(axis: Axis) -> tuple[str, ...]:
    return (axis,) if isinstance(axis, str) else axis or ()


def shard_map_over(
    f: Callable[..., R],
    shape: Sequence[int],
    axes: Sequence[Axis],
    in_dims: Sequence[Sequence[int | None]],
    out_dims: Sequence[int | None],
    *,
    pallas: bool = False,
) -> Callable[..., R]:
    """f, run by every device on its own shard of the arguments, where XLA would not split f by itself.

    shape, axes: the sizes of the dimensions to split, and the mesh axes for each. in_dims, out_dims:
    for each argument, and for the result, which of these dimensions (its index) each of its own is;
    None: not split. pallas: f is a Pallas kernel, in which JAX cannot check replication. Without a
    mesh: f.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return f
    names = divisible_axes(shape, axes, mesh.shape)

    def spec(dims: Sequence[int | None]) -> P:
        return P(*(None if d is None else names[d] for d in dims))

    in_specs = tuple(spec(dims) for dims in in_dims)
    return jax.shard_map(f, in_specs=in_specs, out_specs=spec(out_dims), check_vma=not pallas)
