"""Starting a run of several processes: command-line options and `jax.distributed.initialize`.

Processes find each other automatically on TPU pods, under SLURM and under Open MPI, and elsewhere by an
address. The options have the names of the arguments of jax.distributed.initialize.
"""

import glob
import importlib.util
import os
import re
import socket
import time
from collections.abc import Sequence
from typing import NamedTuple

from minigpt4_jax.errors import UserError
from minigpt4_jax.utils.text import one_line

USAGE = """\
  --coordinator_address=HOST:PORT --num_processes=N --process_id=I
                where process 0 listens, how many processes there are, and which one this is; found
                automatically on TPU pods, under SLURM and Open MPI. --num_processes=1: run alone
  --initialization_timeout=SECONDS   how long to wait for the other processes at the start (300)"""

DEFAULT_TIMEOUT = 300  # seconds


class ProcessOptions(NamedTuple):
    """The command-line options about processes; None if not given."""

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    initialization_timeout: int | None = None

    @property
    def timeout(self) -> int:
        """Seconds to wait for the other processes at the start."""
        return self.initialization_timeout or DEFAULT_TIMEOUT


def parse_process_options(args: Sequence[str]) -> tuple[ProcessOptions, list[str]]:
    """-> (options about processes, the other arguments). UserError: an invalid value, or only some of
    the three options that belong together."""
    values: dict[str, str | int] = {}
    rest, remaining = [], iter(args)
    for arg in remaining:
        flag, equals, value = arg.partition("=")
        name = flag.removeprefix("--")
        if name not in ProcessOptions._fields or name == flag:
            rest.append(arg)
            continue
        value = value if equals else next(remaining, "")
        values[name] = value if name == "coordinator_address" else _parse_number(flag, value)
    options = ProcessOptions(**values)  # type: ignore[arg-type]
    _check(options)
    return options, rest


def _parse_number(flag: str, value: str) -> int:
    if not re.fullmatch(r"\d{1,6}", value):
        raise UserError(f"{flag}={value}: expected a whole number")
    return int(value)


def _check(options: ProcessOptions) -> None:
    address = options.coordinator_address
    if options.num_processes == 1 and address is None:
        return
    required = {
        f"--{name}": value for name, value in zip(options._fields[:3], options[:3], strict=True)
    }
    missing = [flag for flag, value in required.items() if value is None]
    if 0 < len(missing) < 3:
        given = next(flag for flag in required if flag not in missing)
        raise UserError(f"{given} is given without {' and '.join(missing)}: give all three or none")
    if address is not None and not re.fullmatch(r".+:\d{1,5}", address):
        raise UserError(f"--coordinator_address={address}: expected HOST:PORT, as in 10.0.0.2:1234")
    count = options.num_processes
    if count is not None and not (options.process_id or 0) < count:
        raise UserError(
            f"--process_id={options.process_id}: expected a number from 0 to {count - 1}, because "
            f"--num_processes={count}"
        )
    if options.initialization_timeout == 0:
        raise UserError("--initialization_timeout=0: expected seconds, 1 or more")


def is_distributed(options: ProcessOptions) -> bool:
    """Whether this process is, or may be, one of several."""
    if options.num_processes is not None:
        return options.num_processes > 1
    return _has_launcher() or _has_tpu()


def initialize(options: ProcessOptions, heartbeat_timeout: float) -> None:
    """Connect to the other processes of the run. Call it before JAX looks for devices.

    heartbeat_timeout: seconds without a heartbeat of another process until JAX aborts this one.
    UserError: process 0 does not answer. If others do not connect in time, JAX aborts this process.
    """
    if options.coordinator_address is not None and options.process_id:
        _wait_for_coordinator(options.coordinator_address, options.timeout)
    import jax

    if not jax.config.jax_cpu_collectives_implementation:  # type: ignore[attr-defined]
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            options.coordinator_address, options.num_processes, options.process_id,
            initialization_timeout=options.timeout,
            heartbeat_timeout_seconds=round(heartbeat_timeout),
        )  # fmt: skip
    except (RuntimeError, ValueError, OSError) as e:
        if options.num_processes is None and "should be defined" in str(e):
            return  # a TPU that is not part of a pod
        raise UserError(
            f"this process cannot connect to the others ({one_line(e, 300)}): name them with "
            "--coordinator_address, --num_processes and --process_id, or run alone with "
            "--num_processes=1"
        ) from e


def _wait_for_coordinator(address: str, timeout: float) -> None:
    """UserError if nothing listens there in time; JAX would abort without a readable message."""
    host, _, port = address.rpartition(":")
    deadline, cause = time.monotonic() + timeout, ""
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=timeout).close()
            return
        except OSError as e:
            cause = e.strerror or str(e)
            time.sleep(0.2)
    raise UserError(
        f"process 0 does not answer at {address} within {timeout:g} s ({cause}): check that it runs "
        "with the same --coordinator_address and --num_processes, and that this host can reach its port"
    )


def _has_launcher() -> bool:
    """Whether SLURM or Open MPI started this process as one of several."""
    counts = (os.environ.get(name, "") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    return any(count.isdigit() and int(count) > 1 for count in counts)


def _has_tpu() -> bool:
    """Whether this host has TPU chips that JAX will use; JAX then asks how many hosts the pod has."""
    if os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
        return False
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None
