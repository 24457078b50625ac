"""Starts several processes on this machine, as on several hosts."""

import json
import socket
import subprocess
import sys
from pathlib import Path

from helpers import virtual_devices

HERE = Path(__file__).parent


def free_address() -> str:
    """HOST:PORT where process 0 may listen."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return f"localhost:{s.getsockname()[1]}"


def start_python(command: list[object], devices: int = 1, **variables: str) -> subprocess.Popen:
    """Start Python with this command line, with this many virtual CPU devices."""
    environment = virtual_devices.environment(devices) | variables
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    return subprocess.Popen(
        [sys.executable, *map(str, command)], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run_jobs(folder: Path, count: int, devices: int, jobs: dict) -> list[dict]:
    """Run the jobs (see multihost_worker) in `count` processes of `devices` devices; their results."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [HERE / "multihost_worker.py", folder, free_address(), count]
    processes = [start_python([*command, index], devices) for index in range(count)]
    for index, process in enumerate(processes):
        try:
            out, err = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            for other in processes:
                other.kill()
            raise
        log = (folder / f"{index}-of-{count}.log").read_text()
        assert process.returncode == 0, f"process {index}: {log[-2000:]}{out[-2000:]}{err[-4000:]}"
    return read_results(folder, count)


def read_results(folder: Path, count: int) -> list[dict]:
    """What the last jobs of `count` processes wrote, by process."""
    return [json.loads((folder / f"{index}-of-{count}.json").read_text()) for index in range(count)]
