"""What lies on which device: a mesh of devices, and one table that says how parameters are split.

The axes of the mesh:
    data   splits the rows of a batch.
    fsdp   splits the rows too, and every large matrix, which is gathered again layer by layer as it
           is used (ZeRO paper, stage 3; PyTorch FSDP).
    model  splits heads, FFN and vocabulary: a product by its outputs, and the next one by its
           inputs (Megatron-LM paper, section 3).
What an axis does not divide is not split over it, so any number of heads or tokens will do.
"""

import math
import re
from collections.abc import Callable
from functools import cache, partial, wraps
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.quantization.layout import is_grouped
from minigpt4_jax.quantization.schemes import int4_group_size

AXES = ("data", "fsdp", "model")
BATCH_AXES = ("data", "fsdp")  # the axes that split the rows of a batch
CHUNK_BYTES = 64 << 20  # of an array of layers that the host holds at a time
Axis = str | tuple[str, ...] | None

COLUMN_PARALLEL, ROW_PARALLEL = P("model", "fsdp"), P("fsdp", "model")  # of a matrix [out, in]

# Parameter, its layer's number left out -> how it is split, without the axis of stacked layers.
PARTITION_RULES = (
    (r".*\.blocks\.(attn|cross|mlp)\.(q|k|v|qkv|gate|up)\.weight", COLUMN_PARALLEL),
    (r".*\.blocks\.(attn|cross|mlp)\.(o|out|down)\.weight", ROW_PARALLEL),
    (r"llm\.(embed|head\.weight)", COLUMN_PARALLEL),
    # what is trained, and what is small, lies whole on every device
    (r"projection\.(weight|bias)", P()),
    (r".*\.lora_[ab]", P()),
    (r"vit\.(cls|pos|patch\.weight)|qformer\.query", P()),
    (r"(.*\.)?(norm\d?|[qk]_norm|ln_vision)\.(scale|bias)", P()),
    (r".*(\.|_)bias", P()),
)


# --- the mesh -------------------------------------------------------------------------------


def parse_mesh(text: str, devices: int) -> dict[str, int]:
    """ "data:2,model:4" -> the size of every axis; -1 for one of them is what is left.

    UserError: not of this form, an unknown axis, or sizes whose product is not `devices`.
    """
    sizes = dict.fromkeys(AXES, 1)
    seen = set()
    for part in text.split(","):
        name, colon, size = (piece.strip() for piece in part.partition(":"))
        if not colon or not re.fullmatch(r"-1|[1-9]\d{0,8}", size):
            raise UserError(f"mesh {text!r}: {part!r} is not AXIS:SIZE, as in data:2,model:4")
        if name not in AXES or name in seen:
            what = "twice the axis" if name in seen else "unknown axis"
            raise UserError(f"mesh {text!r}: {what} {name!r}; expected each of {AXES} once at most")
        seen.add(name)
        sizes[name] = int(size)
    open_axes = [name for name in AXES if sizes[name] == -1]
    if len(open_axes) > 1:
        raise UserError(f"mesh {text!r}: -1 stands for what is left, so one axis alone can have it")
    given = math.prod(size for size in sizes.values() if size > 0)
    if open_axes and devices % given == 0:
        sizes[open_axes[0]] = devices // given
    elif open_axes or given != devices:
        raise UserError(
            f"mesh {text!r} is for {'a multiple of ' if open_axes else ''}{given} devices and there "
            f"are {devices}: expected sizes whose product is {devices}, for instance data:{devices}"
        )
    return sizes


def make_mesh(sizes: dict[str, int], devices: Any = None) -> Mesh:
    """A mesh over `devices`, by default all of them."""
    shape = tuple(sizes.get(name, 1) for name in AXES)
    types = (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # of a TPU slice 4x8x8 a pair of chips is a part of a side
        found = mesh_utils.create_device_mesh(
            shape, devices or jax.devices(), allow_split_physical_axes=True
        )
        return Mesh(found, AXES, axis_types=types)


def inference_mesh(text: str, config: ModelConfig) -> Mesh:
    """The mesh of a text for `parse_mesh`, or of "auto": the heads of the language model over as
    many devices as they divide among, rows over the rest. UserError as of `parse_mesh`."""
    return make_mesh(inference_mesh_sizes(text, config, jax.device_count()))


def inference_mesh_sizes(text: str, config: ModelConfig, devices: int) -> dict[str, int]:
    """The sizes of `inference_mesh` over so many devices."""
    if text != "auto":
        return parse_mesh(text, devices)
    model = math.gcd(devices, config.llm.kv_heads)
    return {"data": devices // model, "model": model}


def single_device_mesh() -> Mesh:
    """The mesh of the first device of this process alone."""
    return make_mesh({}, jax.local_devices()[:1])


def describe_mesh(mesh: Mesh) -> str:
    """For instance "data:2,model:4"; the axes of size 1 are left out."""
    parts = [f"{name}:{size}" for name, size in mesh.shape.items() if size > 1]
    return ",".join(parts) or "one device"


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that the arrays of a tree lie on; None where they were not put on any."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return sharding.mesh
    return None


# --- parameters -----------------------------------------------------------------------------


def parameter_spec(
    name: str, shape: tuple[int, ...], dtype: Any, config: ModelConfig, sizes: Any
) -> P:
    """How a parameter is split on a mesh of these sizes (axis name -> size).

    name: a dotted path; a stacked layer's has no number, its shape a leading axis of layers. KeyError
    names a parameter that is not in PARTITION_RULES.
    """
    return partition_spec(name, shape, dtype, _heads(name, config), sizes)


def partition_spec(name: str, shape: tuple[int, ...], dtype: Any, heads: int, sizes: Any) -> P:
    """As `parameter_spec`; heads: that an attention's matrix is made of, as far as they stay whole."""
    plain = re.sub(r"\.blocks\.\d+\.", ".blocks.", name)
    stacked = plain == name and name.startswith(("vit.blocks.", "llm.blocks."))
    dims = list(shape[stacked:])
    weight = re.sub("_(scale|offset)$", "", plain)  # of a quantized matrix, split as it is
    spec = next((spec for rule, spec in PARTITION_RULES if re.fullmatch(rule, weight)), None)
    if spec is None:
        raise KeyError(
            f"{name}: no rule of minigpt4_jax.parallel.sharding.PARTITION_RULES says how it is split"
        )
    grouped = is_grouped(plain, len(dims))
    if grouped:  # levels [groups, group, out] or scale [groups, out]: a group is not taken apart
        dims = [dims[-1], dims[0]]
    elif dtype == jax.numpy.uint8:  # a packed table: nor is one here
        dims[-1] = 2 * dims[-1] // (int4_group_size(2 * dims[-1]) or 2 * dims[-1])
    axes: list[Axis] = [*spec[: len(dims)], *[None] * (len(dims) - len(spec))]
    if "model" in axes and len(dims) == 2:
        at, model = axes.index("model"), sizes["model"]
        whole_heads = heads if re.search(r"\.(attn|cross)\.", plain) else 0
        if dims[at] % model or whole_heads % model:
            # 32001 tokens divide by nothing, and heads stay whole: then by the other dimension
            axes[at], axes[1 - at] = None, ("fsdp", "model")
    if grouped and axes == ["model", "fsdp"] and dims[1] % sizes["fsdp"]:
        axes = [("model", "fsdp"), None]  # 22 groups of a vision encoder's width
    found = divisible_axes(dims, axes, sizes)
    if grouped:
        found = [found[1], *[None] * (weight == plain), found[0]]
    return P(*[None] * stacked, *found)


def _heads(name: str, config: ModelConfig) -> int:
    """Heads of the attention in the part that a parameter belongs to."""
    part = name.partition(".")[0]
    if part == "qformer" and config.qformer is not None:
        return config.qformer.heads
    return config.vision.heads if part == "vit" else config.llm.kv_heads


def parameter_sharding(
    name: str, shape: tuple[int, ...], dtype: Any, config: ModelConfig, mesh: Mesh
) -> NamedSharding:
    """As `parameter_spec`, on a mesh."""
    return NamedSharding(mesh, parameter_spec(name, shape, dtype, config, mesh.shape))


def divisible_axes(dims: Any, axes: Any, sizes: Any) -> list[Axis]:
    """For each of the dimensions those of its axes that divide it."""
    found: list[Axis] = []
    for dim, axis in zip(dims, axes, strict=True):
        kept: tuple[str, ...] = ()
        for name in (axis,) if isinstance(axis, str) else axis or ():
            if dim % math.prod(sizes[a] for a in (*kept, name)) == 0 and sizes[name] > 1:
                kept += (name,)
        found.append(kept[0] if len(kept) == 1 else kept or None)
    return found


def make_sharded_array(
    shape: tuple[int, ...], sharding: NamedSharding, read: Callable[[tuple[slice, ...]], Any]
) -> jax.Array:
    """An array of which every device of this process gets its part; each part is read once, and the
    host holds one of them at a time. (jax.make_array_from_callback asks once for each device.)"""
    holders: dict[str, tuple[tuple[slice, ...], list[Any]]] = {}
    devices: Any = sharding.addressable_devices_indices_map(shape)
    for device, index in devices.items():
        holders.setdefault(str(index), (index, []))[1].append(device)
    arrays = []
    for index, sharers in holders.values():
        part = read(index)
        arrays += [jax.device_put(part, device) for device in sharers]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def devices_have_own_memory() -> bool:
    """Whether the devices have memory of their own, into which `placed_in_parts` brings arrays; a CPU
    device takes the host's."""
    return jax.default_backend() != "cpu"


def make_sharded_array_in_chunks(
    shape: tuple[int, ...],
    dtype: Any,
    sharding: NamedSharding,
    read: Callable[[tuple[slice, ...]], Any],
) -> jax.Array:
    """As `placed`, for an array whose first axis is not split, as that of layers: PART_BYTES of a
    device's share at a time, or one entry, go into it in its place. Neither the host nor a device
    holds it twice."""
    entry = math.prod(sharding.shard_shape(shape)[1:]) * jax.numpy.dtype(dtype).itemsize
    count = max(1, CHUNK_BYTES // entry)
    if count >= shape[0]:
        return make_sharded_array(shape, sharding, read)
    array, waiting = _zeros(shape, dtype, sharding)(), None
    for begin in range(0, shape[0], count):
        rows = slice(begin, min(begin + count, shape[0]))
        some = (rows.stop - begin, *shape[1:])
        part = make_sharded_array(some, sharding, partial(_rows_of, read, rows))
        array = _put_into(sharding)(array, part, begin)
        jax.block_until_ready(waiting)  # two parts are on the host at most
        waiting = part
    return array


def _rows_of(read: Callable[[Any], Any], rows: slice, index: tuple[slice, ...]) -> Any:
    return read((rows, *index[1:]))


def _zeros(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> Callable[[], jax.Array]:
    return jax.jit(lambda: jax.numpy.zeros(shape, dtype), out_shardings=sharding)


@cache
def _put_into(sharding: NamedSharding) -> Callable[..., jax.Array]:
    """(array, part, first entry) -> the array with the part in it, in the memory of the old one."""
    put = partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
    return jax.jit(put, donate_argnums=0, out_shardings=sharding)


# --- batches and activations -----------------------------------------------------------------


def batch_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """How arrays [B, ...] of so many rows are split."""
    return NamedSharding(mesh, P(*divisible_axes((rows,), (BATCH_AXES,), mesh.shape)))


def shard_batch(batch: Any, mesh: Mesh | None, share: tuple[int, int] = (1, 1)) -> Any:
    """Arrays [B, ...] of the host, split by rows over the devices. share: rows of the whole batch, and
    of this process, where the arrays are of those alone that its devices hold."""
    if mesh is None or mesh.size == 1:
        return batch  # as it is: a compiled program takes it faster than this function
    if jax.process_count() == 1:
        return jax.tree.map(lambda a: jax.device_put(a, batch_sharding(mesh, len(a))), batch)
    whole, here = share

    def put(a: Any) -> jax.Array:
        whole_shape = (len(a) * whole // here, *a.shape[1:])
        where = batch_sharding(mesh, whole_shape[0])
        return jax.make_array_from_process_local_data(where, a, whole_shape)

    return jax.tree.map(put, batch)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Arrays of the host, the same in every process, onto every device."""
    return jax.tree.map(
        lambda a: make_sharded_array(a.shape, replicated(mesh), a.__getitem__), tree
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Of what every device holds all of."""
    return NamedSharding(mesh, P())


def with_mesh(f: Callable, mesh: Mesh | None) -> Callable:
    """f, to be compiled: `constrain` and `shard_map_over` within it are about this mesh."""
    if mesh is None or mesh.size == 1:
        return f

    @wraps(f)
    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return f(*args)

    return traced


def constrain(x: jax.Array, *axes: Axis) -> jax.Array:
    """x, split over these axes of the mesh by its first dimensions, as far as they divide them, and
    over no others. Without a mesh: x."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(
        x, P(*divisible_axes(x.shape[: len(axes)], axes, mesh.shape))
    )


def all_gather_fsdp(x: jax.Array, name: str, heads: int) -> jax.Array:
    """The parameter of this name, as `split_of` splits it but for fsdp, over which it is gathered here,
    once for all that uses the result; of its own XLA may gather a matrix anew for every product.
    Without a mesh: x."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return x
    axes = partition_spec(name, x.shape, x.dtype, heads, mesh.shape)
    if not any("fsdp" in _names(axis) for axis in axes):
        return x
    kept = (tuple(a for a in _names(axis) if a != "fsdp") or None for axis in axes)
    return jax.lax.with_sharding_constraint(x, P(*kept))


def _names(axis: Axis) -> tuple[str, ...]:
    return (axis,) if isinstance(axis, str) else axis or ()


def shard_map_over(
    f: Callable, shape: Any, axes: Any, ins: Any, out: Any, *, kernel: bool = False
) -> Callable:
    """f, run by every device on its own part of the arguments, for what XLA would not split itself.

    shape and axes: of the dimensions that are split; ins and out: for each argument and for the
    result the numbers of these dimensions, None for others. kernel: f is one of Pallas, in which JAX
    cannot follow what varies over an axis. Without a mesh: f.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return f
    names = divisible_axes(shape, axes, mesh.shape)

    def spec(dims: Any) -> P:
        return P(*(None if d is None else names[d] for d in dims))

    ins, out = tuple(map(spec, ins)), spec(out)
    return jax.shard_map(f, in_specs=ins, out_specs=out, check_vma=not kernel)
