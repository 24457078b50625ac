"""Several processes on this machine, as on several hosts."""

import json
import socket
import subprocess
import sys
from pathlib import Path

from helpers import virtual_devices

HERE = Path(__file__).parent


def address() -> str:
    """Where process 0 may listen."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return f"localhost:{s.getsockname()[1]}"


def begin(command: list[object], devices: int = 1, **variables: str) -> subprocess.Popen:
    """Start Python with this command on so many virtual CPU devices."""
    environment = virtual_devices.environment(devices) | variables
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    return subprocess.Popen(
        [sys.executable, *map(str, command)], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def in_processes(folder: Path, count: int, devices: int, jobs: dict) -> None:
    """Run the jobs (see process_runs.py) in so many processes, to their end."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    at = address()
    command = [HERE / "multihost_worker.py", folder, at, count]
    started = [begin([*command, index], devices) for index in range(count)]
    for index, process in enumerate(started):
        out, err = process.communicate(timeout=300)
        (folder / f"{index}-of-{count}.log").write_text(out)
        assert process.returncode == 0, f"process {index}: {out[-2000:]}{err[-4000:]}"
