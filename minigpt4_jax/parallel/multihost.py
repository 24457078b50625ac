"""Several processes, one a host: how they agree, and notice that one is gone.

Every process runs the same program on its own devices. What one of them alone knows (a signal, a
broken row, a file it cannot read) reaches the others by the functions here; all must call them, in
the same order. In a run of one process they give back what they are given.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from minigpt4_jax.errors import UserError
from minigpt4_jax.parallel.distributed import GONE
from minigpt4_jax.parallel.sharding import AXES, replicated

# what the libraries of collectives say when a connection breaks
_BROKEN = re.compile("gloo|nccl|rccl|mpi_|connection (closed|reset|refused)|socket closed", re.I)


def several() -> bool:
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes what is written once."""
    return jax.process_index() == 0


# --- agreeing -------------------------------------------------------------------------------


def gathered(value: Any) -> list[Any]:
    """The JSON values of all processes, in their order. Waits for them, and for the devices."""
    if not several():
        return [value]
    text = json.dumps(value).encode()
    longest = int(np.max(multihost_utils.process_allgather(np.int32(len(text)))))
    room = max(1024, 1 << (longest - 1).bit_length())  # few sizes: each is a program
    padded = np.full(room, ord(" "), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    return [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded)]


def any_of(here: object) -> bool:
    """Whether it is true in any process."""
    return any(gathered(bool(here)))


@contextmanager
def together() -> Iterator[None]:
    """A UserError of the body in one process is one in all. The body must not wait for others."""
    mine = None
    try:
        yield
    except UserError as e:
        mine = e
    said = gathered(None if mine is None else str(mine))
    if mine is not None:
        raise mine
    for process, message in enumerate(said):
        if message is not None:
            raise UserError(f"process {process}: {message}")


class Sums:
    """Adds a few numbers of every process on the devices, without waiting: a sum is asked for after
    a step is dispatched, and read with that step's results."""

    def __init__(self, mesh: Mesh):
        self._one = NamedSharding(mesh, P(AXES))
        self._add = jax.jit(lambda a: jnp.sum(a, axis=0), out_shardings=replicated(mesh))
        self._devices, self._here = mesh.size, len(mesh.local_devices)

    def __call__(self, *numbers: int) -> Any:
        """-> int32 [numbers], on the devices where there are several processes."""
        if not several():
            return np.array(numbers, np.int32)
        rows = np.zeros((self._here, len(numbers)), np.int32)
        rows[0] = numbers
        shape = (self._devices, len(numbers))
        return self._add(jax.make_array_from_process_local_data(self._one, rows, shape))


# --- noticing that one is gone --------------------------------------------------------------


class Gone(UserError):
    """Another process is gone."""

    code = GONE


def is_broken(e: BaseException) -> bool:
    """Whether an error says that a connection to another process broke."""
    return several() and _BROKEN.search(str(e)) is not None


@contextmanager
def noticing(kept: Callable[[], str], closing: ExitStack) -> Iterator[None]:
    """Say so where a connection to another process breaks in the body.

    kept: what is said then of the state that the run left. closing: what would follow, and is left
    out then: it may wait for the others. Where nothing but silence comes from one, JAX aborts this
    process after the heartbeat timeout; see `joining`.
    """
    try:
        yield
    except (RuntimeError, ValueError) as e:
        if not is_broken(e):
            raise
        closing.pop_all()
        cause = " ".join(str(e).split())[-120:]
        raise Gone(
            f"a connection to another of the {jax.process_count()} processes broke, so that one is gone "
            f"({cause}); {kept()}. See what it wrote last, and start the same command again on every host"
        ) from e
