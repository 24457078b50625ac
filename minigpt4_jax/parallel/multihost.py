"""Several processes, usually one per host: how they share decisions and notice a lost one.

Every process runs the same program on its own devices. What only one of them knows (a signal, a damaged
row, a file it cannot read) reaches the others through the functions here, which are collective: all
processes must call them, in the same order. With one process they return what they are given.
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
from minigpt4_jax.parallel.sharding import AXES, replicated
from minigpt4_jax.parallel.supervisor import EXIT_PEER_LOST, peer_lost_message
from minigpt4_jax.utils.rounding import next_power_of_two

# how the collectives' libraries word a broken connection
_CONNECTION_ERROR = re.compile(
    "gloo|nccl|rccl|mpi_|connection (closed|reset|refused)|socket closed", re.I
)


def is_multiprocess() -> bool:
    return bool(jax.process_count() > 1)


def is_main_process() -> bool:
    """Whether this is process 0, which writes everything that is written once."""
    return jax.process_index() == 0


# --- sharing --------------------------------------------------------------------------------


def all_gather_json(value: Any) -> list[Any]:
    """The JSON values of all processes, ordered by process. Blocks until all processes call it and
    their devices are idle."""
    if not is_multiprocess():
        return [value]
    text = json.dumps(value).encode()
    longest = int(np.max(multihost_utils.process_allgather(np.int32(len(text)))))
    length = max(1024, next_power_of_two(longest))  # few lengths: each compiles a program
    padded = np.full(length, ord(" "), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    return [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded)]


def any_process(value: object) -> bool:
    """Whether the value is true in any process."""
    return any(all_gather_json(bool(value)))


@contextmanager
def raise_together() -> Iterator[None]:
    """A UserError of the body in one process is raised in all. The body must not be collective."""
    error = None
    try:
        yield
    except UserError as e:
        error = e
    messages = all_gather_json(None if error is None else str(error))
    if error is not None:
        raise error
    for process, message in enumerate(messages):
        if message is not None:
            raise UserError(f"process {process}: {message}")


class AllReduceSum:
    """Sums a few integers over all processes on the devices, asynchronously: it is dispatched after a
    training step and read with that step's results."""

    def __init__(self, mesh: Mesh):
        self._row_per_device = NamedSharding(mesh, P(AXES))
        self._sum = jax.jit(lambda a: jnp.sum(a, axis=0), out_shardings=replicated(mesh))
        self._num_devices, self._num_local_devices = mesh.size, len(mesh.local_devices)

    def __call__(self, *numbers: int) -> jax.Array | np.ndarray[Any, np.dtype[np.int32]]:
        """-> int32 [len(numbers)], on the devices if there are several processes."""
        if not is_multiprocess():
            return np.array(numbers, np.int32)
        local = np.zeros((self._num_local_devices, len(numbers)), np.int32)
        local[0] = numbers
        shape = (self._num_devices, len(numbers))
        rows = jax.make_array_from_process_local_data(self._row_per_device, local, shape)
        total: jax.Array = self._sum(rows)
        return total


# --- lost processes -------------------------------------------------------------------------


class PeerLostError(UserError):
    """Another process of the run is lost."""

    code = EXIT_PEER_LOST


def is_connection_error(e: BaseException) -> bool:
    """Whether an error says that the connection to another process broke."""
    return is_multiprocess() and _CONNECTION_ERROR.search(str(e)) is not None


@contextmanager
def detect_lost_peer(
    describe_saved_state: Callable[[], str], exit_stack: ExitStack
) -> Iterator[None]:
    """Raise PeerLostError if a connection to another process breaks in the body.

    describe_saved_state: what the run has saved, for the message. exit_stack: cleanup that is dropped
    then, because it could block on the lost process. If a process only falls silent, JAX aborts this
    one after the heartbeat timeout (see parallel.supervisor).
    """
    try:
        yield
    except (RuntimeError, ValueError) as e:
        if not is_connection_error(e):
            raise
        exit_stack.pop_all()
        end = " ".join(str(e).split())[-120:]
        cause = f"a connection to another of the {jax.process_count()} processes broke: it is lost ({end})"
        raise PeerLostError(peer_lost_message(cause, describe_saved_state())) from e
