"""Reads a pickle as data, with a stack machine that imports and calls nothing that the file names.

A checkpoint's pickle describes dictionaries of tensors. The machine runs its opcodes on plain containers. A
global in the file stays a name; what a call of it returns is looked up in CALLS, and an unknown name is a
UserError. pickle.Unpickler is not used, because it runs what it finds, and because a damaged or malicious
file can make it allocate any amount of memory. (The opcodes: Python's Lib/pickletools.py.)
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any

from minigpt4_jax.errors import UserError


@dataclass(frozen=True)
class Global:
    """A name in a pickle, such as torch.FloatStorage. It is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class StorageRef:
    """A storage of torch: the data of one or several tensors."""

    kind: str  # "FloatStorage", "UntypedStorage", ...
    key: str
    count: int  # elements (bytes for an untyped storage)
    # legacy format: (key, offset, size) of the part of another storage that this one is
    view: tuple[str, int, int] | None = None


@dataclass(frozen=True)
class TensorRef:
    """A tensor whose data has not been read."""

    storage: StorageRef
    offset: int  # elements in the storage
    shape: tuple[int, ...]
    stride: tuple[int, ...]  # elements
    dtype: str | None = None  # None: the storage's


@dataclass
class OpaqueObject:
    """Stands for an object of a harmless class. Its content is kept and not used."""

    name: str
    state: list[Any] = field(default_factory=list)


def _rebuild_tensor(storage: Any, offset: int, size: Any, stride: Any, *rest: Any) -> TensorRef:
    """The arguments of torch._utils._rebuild_tensor and its later versions."""
    if not isinstance(storage, StorageRef):
        raise TypeError("a tensor without a storage")
    dtype = rest[2].name if len(rest) > 2 and isinstance(rest[2], Global) else None
    numbers = [offset, *size, *stride]
    if not all(type(n) is int and n >= 0 for n in numbers) or len(size) != len(stride):
        raise ValueError(f"a tensor of shape {size}, strides {stride}, offset {offset}")
    return TensorRef(storage, offset, tuple(size), tuple(stride), dtype)


def _rebuild_from_type(function: Any, kind: Any, args: Any, state: Any) -> Any:
    return _call(function, args)


# What a call of a global returns
CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda pairs=(): dict(pairs),
    "collections.defaultdict": lambda *_: {},
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.Size": lambda size=(): tuple(size),
    "torch.device": lambda *args: OpaqueObject("torch.device", list(args)),
    "builtins.set": lambda items=(): list(items),
    "__builtin__.set": lambda items=(): list(items),
    "_codecs.encode": lambda text, *_: text,
}
# Classes of objects that are saved beside weights (configurations, loss scalers)
OPAQUE_CLASSES = (
    "argparse.Namespace", "types.SimpleNamespace", "omegaconf.", "typing.Any", "numpy.dtype",
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "builtins.slice",
    "builtins.complex", "__builtin__.complex", "pathlib.PosixPath", "torch.nn.parameter.Parameter",
)  # fmt: skip
_DTYPES = {
    "float16", "float32", "float64", "bfloat16", "int8", "int16", "int32", "int64", "uint8", "bool",
    "half", "float", "double", "float8_e4m3fn", "float8_e5m2",
}  # fmt: skip


def _is_storage(name: str) -> bool:
    return name.endswith("Storage") and name.isidentifier()


def _is_known(g: Global) -> bool:
    name = str(g)
    return (
        name in CALLS
        or any(name == n or (n.endswith(".") and name.startswith(n)) for n in OPAQUE_CLASSES)
        or (g.module in ("torch", "torch.storage") and _is_storage(g.name))
        or (g.module == "torch" and g.name in _DTYPES)
        or name
        in ("builtins.dict", "builtins.list", "builtins.int", "builtins.float", "builtins.str")
    )


def _call(function: Any, args: Any) -> Any:
    if not isinstance(function, Global):
        raise TypeError("a call of something that is not a name")
    if call := CALLS.get(str(function)):
        return call(*args)
    return OpaqueObject(str(function), list(args))


def read_pickle(stream: IO[bytes], where: str) -> Any:
    """The object that the next pickle in `stream` describes: containers, strings, numbers, TensorRefs.

    where: the file in messages. UserError: it contains something else, or is damaged.
    """
    machine = _Machine(where)
    try:
        for op, arg, _ in pickletools.genops(stream):
            if op.name == "STOP":
                return machine.stack.pop()
            machine.step(op.name, arg)
        raise ValueError("no end")
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as e:
        raise UserError(f"{where} is damaged: its index cannot be read ({e})") from e


_MARK = object()
_PUSH = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING",
    "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_SET": list, "MARK": lambda: _MARK,
}  # fmt: skip


class _Machine:
    """The pickle virtual machine on plain data: a stack and a memo. A method for each opcode."""

    def __init__(self, where: str):
        self.where = where
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, op: str, arg: Any) -> None:
        if op in _PUSH:
            self.stack.append(arg)
        elif op in _CONSTANTS:
            self.stack.append(_CONSTANTS[op]())
        elif (method := getattr(self, f"_{op.lower()}", None)) is not None:
            method(arg)
        elif op not in ("PROTO", "FRAME"):
            raise UserError(f"{self.where}: pickle opcode {op} does not belong in a checkpoint")

    def _pop_to_mark(self) -> list[Any]:
        """The items above the last mark; removes them and the mark."""
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("no mark")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    # the memo
    def _put(self, arg: Any) -> None:
        self.memo[int(arg)] = self.stack[-1]

    _binput = _long_binput = _put

    def _memoize(self, arg: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _get(self, arg: Any) -> None:
        self.stack.append(self.memo[int(arg)])

    _binget = _long_binget = _get

    # the stack
    def _pop(self, arg: Any) -> None:
        self.stack.pop()

    def _pop_mark(self, arg: Any) -> None:
        self._pop_to_mark()

    def _dup(self, arg: Any) -> None:
        self.stack.append(self.stack[-1])

    # containers
    def _tuple(self, arg: Any) -> None:
        self.stack.append(tuple(self._pop_to_mark()))

    def _tuple1(self, arg: Any) -> None:
        self.stack[-1:] = [tuple(self.stack[-1:])]

    def _tuple2(self, arg: Any) -> None:
        self.stack[-2:] = [tuple(self.stack[-2:])]

    def _tuple3(self, arg: Any) -> None:
        self.stack[-3:] = [tuple(self.stack[-3:])]

    def _list(self, arg: Any) -> None:
        self.stack.append(self._pop_to_mark())

    _frozenset = _list

    def _dict(self, arg: Any) -> None:
        items = self._pop_to_mark()
        self.stack.append(dict(zip(items[::2], items[1::2], strict=True)))

    def _append(self, arg: Any) -> None:
        item = self.stack.pop()
        self._extend([item])

    def _appends(self, arg: Any) -> None:
        self._extend(self._pop_to_mark())

    _additems = _appends

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        (target.state if isinstance(target, OpaqueObject) else target).extend(items)

    def _setitem(self, arg: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def _setitems(self, arg: Any) -> None:
        self._update(self._pop_to_mark())

    def _update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, OpaqueObject):
            target.state.append(items)
            return
        if type(target) is not dict:
            raise TypeError("items set on something that is not a dictionary")
        target.update(zip(items[::2], items[1::2], strict=True))

    # names, calls and objects: data only
    def _global(self, arg: Any) -> None:
        self._push_global(*arg.split(" ", 1))

    def _stack_global(self, arg: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._push_global(module, name)

    def _push_global(self, module: str, name: str) -> None:
        found = Global(module, name)
        if not _is_known(found):
            raise UserError(
                f"{self.where} asks to run {found}, which does not belong in a checkpoint; "
                "nothing was run. Use a file from a source you trust, or save its state_dict() only"
            )
        self.stack.append(found)

    def _reduce(self, arg: Any) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.stack.append(_call(function, args))

    _newobj = _reduce

    def _newobj_ex(self, arg: Any) -> None:
        self.stack.pop()  # keyword arguments
        self._reduce(arg)

    def _build(self, arg: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, OpaqueObject):
            target.state.append(state)  # attributes of a dict (state_dict's _metadata) are dropped

    def _binpersid(self, arg: Any) -> None:
        pid = self.stack.pop()
        if type(pid) is not tuple or len(pid) < 5 or pid[0] not in ("storage", b"storage"):
            raise ValueError("an unknown persistent id")
        kind, key, _, count = pid[1:5]
        view = pid[5] if len(pid) > 5 and pid[5] is not None else None
        if not isinstance(kind, Global) or type(count) is not int:
            raise ValueError("a storage without type or size")
        self.stack.append(StorageRef(kind.name, str(key), count, tuple(view) if view else None))
