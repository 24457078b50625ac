"""Runs Python scripts in processes that are forked from one where the imports of a training are done.

The imports take two seconds in each process. The first run starts `preloaded.py`, which imports and then
waits; each command is a fork of it: a process of its own, with its own devices, signals, files and end.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

IMPORTED = (
    "helpers.tiny", "minigpt4_jax.training.trainer", "minigpt4_jax.inference.loading", "orbax.checkpoint",
    "tensorboardX", "matplotlib.pyplot",
)  # fmt: skip
MIN_SECONDS = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
# What JAX reads when it is imported, so that it is the same for all commands.
FIXED = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR")


class Command(NamedTuple):
    """A script with its arguments, its environment, and the file that gets its stdout and stderr."""

    script: Path
    arguments: Sequence[object]
    environment: dict[str, str]
    output: Path


def run_together(commands: Sequence[Command], timeout: float = 300) -> list[int]:
    """Run the commands at the same time: their exit codes, -N after signal N.

    TimeoutError: one took more than `timeout` seconds, and all are killed.
    """
    fixed = tuple(commands[0].environment.get(name) for name in FIXED)
    for c in commands:
        assert tuple(c.environment.get(name) for name in FIXED) == fixed
    server = _server(fixed)
    request = [
        {"argv": [str(c.script), *map(str, c.arguments)], "environment": c.environment,
         "output": str(c.output)} for c in commands
    ]  # fmt: skip
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps({"commands": request, "timeout": timeout}) + "\n")
    server.stdin.flush()
    codes: list[int] | None = json.loads(server.stdout.readline())
    if codes is None:
        raise TimeoutError(f"{request} ran for {timeout} s")
    return codes


@functools.cache
def _server(fixed: tuple[str | None, ...]) -> subprocess.Popen[str]:
    values = {name: value for name, value in zip(FIXED, fixed, strict=True) if value is not None}
    server = subprocess.Popen(
        [sys.executable, __file__], env=os.environ | values, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    atexit.register(_stop, server)
    return server


def _stop(server: subprocess.Popen[str]) -> None:
    assert server.stdin is not None
    server.stdin.close()  # the end of its input ends it
    server.wait()


# --- in the process that waits --------------------------------------------------------------


def _serve() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection would copy every page to the fork
    for line in sys.stdin:
        request = json.loads(line)
        children: dict[int, int] = {}  # pid -> its number
        for number, command in enumerate(request["commands"]):
            pid = os.fork()
            if not pid:
                _become(**command)
                return
            children[pid] = number
        print(json.dumps(_wait(children, request["timeout"])), flush=True)


def _become(argv: list[str], environment: dict[str, str], output: str) -> None:
    """Run a script as `python argv...` would; the interpreter ends when this returns or raises."""
    import jax

    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(log, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(environment)
    seconds = environment.get(MIN_SECONDS, "1")
    jax.config.update(MIN_SECONDS.lower(), float(seconds))
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def _wait(children: dict[int, int], timeout: float) -> list[int] | None:
    codes, end = [0] * len(children), time.monotonic() + timeout
    files = {os.pidfd_open(pid): pid for pid in children}
    while files:
        ready = select.select(list(files), [], [], max(0.0, end - time.monotonic()))[0]
        if not ready:
            for pid in files.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
        for file in ready or list(files):
            pid = files.pop(file)
            codes[children[pid]] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os.close(file)
        if not ready:
            return None
    return codes


if __name__ == "__main__":
    _serve()
