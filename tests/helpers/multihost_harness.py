"""Starts several processes on this machine, as on several hosts."""

import json
import socket
import subprocess
import sys
from pathlib import Path

from helpers import preloaded, virtual_devices

HERE = Path(__file__).parent


def free_address() -> str:
    """HOST:PORT where process 0 may listen."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return f"localhost:{s.getsockname()[1]}"


def start_python(command: list[object], devices: int = 1, **variables: str) -> subprocess.Popen:
    """Start Python with this command line, with this many virtual CPU devices."""
    environment = virtual_devices.environment(devices) | variables
    environment[preloaded.MIN_SECONDS] = "0.1"
    return subprocess.Popen(
        [sys.executable, *map(str, command)], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run_jobs(folder: Path, count: int, devices: int, jobs: dict) -> list[dict]:
    """Run the jobs (see multihost_worker) in `count` processes of `devices` devices; their results."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = virtual_devices.environment(devices) | {preloaded.MIN_SECONDS: "0.1"}
    arguments, script = (folder, free_address(), count), HERE / "multihost_worker.py"
    outputs = [folder / f"{index}-of-{count}.out" for index in range(count)]
    codes = preloaded.run_together(
        [
            preloaded.Command(script, (*arguments, index), environment, output)
            for index, output in enumerate(outputs)
        ]
    )
    for index, (code, output) in enumerate(zip(codes, outputs, strict=True)):
        log = (folder / f"{index}-of-{count}.log").read_text()
        assert code == 0, f"process {index}: {log[-2000:]}{output.read_text()[-4000:]}"
    return read_results(folder, count)


def read_results(folder: Path, count: int) -> list[dict]:
    """What the last jobs of `count` processes wrote, by process."""
    return [json.loads((folder / f"{index}-of-{count}.json").read_text()) for index in range(count)]
