"""How the processes of a run find each other: by themselves on TPU pods, under SLURM and Open MPI, or by
an address. The options are named as the arguments of jax.distributed.initialize, which does it."""

import contextlib
import ctypes
import glob
import importlib.util
import os
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from minigpt4_jax.errors import UserError

USAGE = """\
  --coordinator_address=HOST:PORT --num_processes=N --process_id=I
                where process 0 listens, how many processes there are, and which this one is; on TPU
                pods, under SLURM and Open MPI they are found. --num_processes=1: this one alone
  --initialization_timeout=SECONDS   how long to wait for the others at the start (300)"""

GONE = 75  # exit code when another process is gone; in sysexits.h a failure that may pass
_FAREWELL = 5.0  # seconds that a process which fails gives the others to fail likewise


class ProcessOptions(NamedTuple):
    """What the command line says of the other processes; None: not given."""

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    initialization_timeout: int | None = None


def take_options(args: Sequence[str]) -> tuple[ProcessOptions, list[str]]:
    """Split the options about processes from the other arguments. UserError: a value that cannot be,
    or some of the three without the others."""
    found: dict[str, str | int] = {}
    rest, it = [], iter(args)
    for arg in it:
        name, equals, value = arg.partition("=")
        key = name.removeprefix("--")
        if key not in ProcessOptions._fields or key == name:
            rest.append(arg)
            continue
        value = value if equals else next(it, "")
        found[key] = value if key == "coordinator_address" else _number(name, value)
    options = ProcessOptions(**found)  # type: ignore[arg-type]
    _check(options)
    return options, rest


def _number(name: str, value: str) -> int:
    if not re.fullmatch(r"\d{1,6}", value):
        raise UserError(f"{name}={value}: expected a whole number")
    return int(value)


def _check(o: ProcessOptions) -> None:
    address = o.coordinator_address
    if o.num_processes == 1 and address is None:
        return
    three = {f"--{name}": value for name, value in zip(o._fields[:3], o[:3], strict=True)}
    missing = [name for name, value in three.items() if value is None]
    if 0 < len(missing) < 3:
        given = [name for name in three if name not in missing]
        raise UserError(
            f"{given[0]} is given without {' and '.join(missing)}: give all three or none"
        )
    if address is not None and not re.fullmatch(r".+:\d{1,5}", address):
        raise UserError(f"--coordinator_address={address}: expected HOST:PORT, as in 10.0.0.2:1234")
    if o.num_processes is not None and not (o.process_id or 0) < o.num_processes:
        raise UserError(
            f"--process_id={o.process_id}: expected a number from 0 to {o.num_processes - 1}, as "
            f"--num_processes={o.num_processes}"
        )
    if o.initialization_timeout == 0:
        raise UserError("--initialization_timeout=0: expected seconds, 1 or more")


def are_several(o: ProcessOptions) -> bool:
    """Whether this process is one of several, or may be."""
    return o.num_processes > 1 if o.num_processes is not None else _launched()


def join(o: ProcessOptions, heartbeat_timeout: float) -> None:
    """Meet the other processes of the run. To be called before JAX looks for devices. heartbeat_timeout:
    seconds without a sign of another until JAX ends this process. UserError: process 0 does not
    answer; where others do not come in time, JAX ends this process."""
    timeout = o.initialization_timeout or 300
    if o.coordinator_address is not None and o.process_id:
        _wait_for(o.coordinator_address, timeout)
    import jax

    if not jax.config.jax_cpu_collectives_implementation:  # type: ignore[attr-defined]
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            o.coordinator_address, o.num_processes, o.process_id,
            initialization_timeout=timeout, heartbeat_timeout_seconds=round(heartbeat_timeout),
        )  # fmt: skip
    except (RuntimeError, ValueError, OSError) as e:
        if o.num_processes is None and "should be defined" in str(e):
            return  # a TPU that is no part of a pod
        cause = " ".join(str(e).split())[:300]
        raise UserError(
            f"this process cannot join the others ({cause}): name them by --coordinator_address, "
            "--num_processes and --process_id, or run alone by --num_processes=1"
        ) from e


def _wait_for(address: str, timeout: float) -> None:
    """UserError when nobody listens there: JAX would end the process without a word for users."""
    host, _, port = address.rpartition(":")
    until, cause = time.monotonic() + timeout, ""
    while time.monotonic() < until:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=timeout).close()
            return
        except OSError as e:
            cause = e.strerror or str(e)
            time.sleep(0.2)
    raise UserError(
        f"process 0 does not answer at {address} within {timeout:g} s ({cause}): see that it runs with "
        "the same --coordinator_address and --num_processes, and that its port is open to this host"
    )


def _launched() -> bool:
    """Whether something that starts several processes has started this one, or may have."""
    counts = (os.environ.get(name, "") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    return any(count.isdigit() and int(count) > 1 for count in counts) or _has_tpu()


def _has_tpu() -> bool:
    """Whether chips of a TPU are here and to be used: then JAX asks how many hosts the pod has."""
    if os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
        return False
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


# --- the end --------------------------------------------------------------------------------


def watched(o: ProcessOptions, kept: Callable[[], str]) -> Callable[[], None]:
    """Go on in a child of this process, which stays behind to say what happened where JAX aborts it:
    since another process is gone, or does not come. The child is to call what is returned when all
    have come. kept: what is said of the state that the run left.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _die_with_parent()
        return lambda: _tell(writer)
    os.close(writer)
    signal.signal(signal.SIGINT, lambda *_: _interrupted(child, reader))
    signal.signal(signal.SIGTERM, lambda number, _: os.kill(child, number))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == -signal.SIGABRT:
        joined = os.read(reader, 1)
        print(f"error: {_gone(kept()) if joined else _not_joined(o)}", file=sys.stderr, flush=True)
        code = GONE
    sys.exit(code if code >= 0 else 128 - code)


def _interrupted(child: int, reader: int) -> None:
    """The child has heard Ctrl-C too, unless JAX, in which Python hears nothing, waits there for the
    others to come."""
    if not select.select([reader], [], [], 0)[0]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise KeyboardInterrupt


def _tell(writer: int) -> None:
    os.write(writer, b".")
    os.close(writer)


def _gone(kept: str) -> str:
    return (
        f"another process of this run is gone or cannot be reached; {kept}. See what it wrote last, and "
        "start the same command again on every host"
    )


def _not_joined(o: ProcessOptions) -> str:
    where = f" to {o.coordinator_address}" if o.coordinator_address else ""
    return (
        f"not all of the processes came{where} within {o.initialization_timeout or 300} s: start each with "
        "its own --process_id, and see that the port is open to them"
    )


def _die_with_parent() -> None:
    """Where the system can: when the parent is killed, the child is too."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG of Linux


def leave(code: int) -> NoReturn:
    """End this process. Of several, one that fails does not wait long for the others to end."""
    if code == GONE:
        sys.stderr.flush()
        os._exit(code)
    if code and "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        end = threading.Thread(target=sys.modules["jax"].distributed.shutdown, daemon=True)
        end.start()
        end.join(_FAREWELL)
        os._exit(code)
    sys.exit(code)
