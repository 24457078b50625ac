"""Does what the Dockerfile says without containers: the steps of the build, and the server that it starts.

python deploy/check_image.py MODEL [--python=python3.12] [--venv=DIR]

COPY and RUN are done in a temporary folder, with a virtual environment, a fresh one or DIR, in place of the
base image's Python. Then the entry point serves MODEL, a model directory, until the health check succeeds,
and has to end with exit code 0 on SIGTERM. What needs a system of its own is left out and said: users,
volumes, ports.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOR_CONTAINERS = ("useradd", "groupadd", "chown")  # programs that change the system
SECONDS = 180  # for the health check to succeed


def instructions() -> Iterator[tuple[str, str]]:
    """The Dockerfile's instructions: ("RUN", "pip install ...")."""
    text = re.sub(r"^ *#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, rest = line.partition(" ")
            yield name, rest.strip()


class Image:
    """The folder in place of a container's file system, and what its instructions have set."""

    def __init__(self, folder: Path, python: str, venv: Path | None):
        self._folder, self._workdir = folder, folder
        if venv is None:
            venv = folder / "venv"
            subprocess.run([python, "-m", "venv", venv], check=True)
        path = f"{venv.resolve() / 'bin'}{os.pathsep}{os.environ['PATH']}"
        self._variables = {**os.environ, "PATH": path, "JAX_PLATFORMS": "cpu"}
        self._variables.pop("PYTHONPATH", None)
        self.values: dict[str, str] = {}  # of ENTRYPOINT, CMD and HEALTHCHECK

    def build(self) -> None:
        for name, rest in instructions():
            if name == "WORKDIR":
                self._workdir = self._inside(rest)
                self._workdir.mkdir(parents=True)
            elif name == "COPY":
                self._copy(rest.split())
            elif name == "RUN":
                self._run(rest)
            elif name in ("ARG", "ENV"):
                key, _, value = rest.partition("=")
                self._variables[key] = str(self._inside(value)) if value.startswith("/") else value
            else:
                self.values[name] = rest

    def _inside(self, path: str) -> Path:
        return self._folder / path.lstrip("/")

    def _copy(self, words: list[str]) -> None:
        *sources, target = words
        for source in sources:
            destination = self._workdir / target
            if (ROOT / source).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / source, destination, ignore=ignored)
            else:
                shutil.copy(ROOT / source, destination)

    def _run(self, command: str) -> None:
        if any(program in command for program in FOR_CONTAINERS):
            print(f"left out: RUN {command}", flush=True)
            return
        print(f"RUN {command}", flush=True)
        # downloads are kept here, unlike in an image
        command = command.replace("--no-cache-dir", "--quiet")
        subprocess.run(command, shell=True, check=True, cwd=self._workdir, env=self._variables)

    def serve(self, model: Path) -> None:
        """Start the entry point with this model, wait for the health check, and end it."""
        port = _free_port()
        entry = [word.replace("8000", str(port)) for word in json.loads(self.values["ENTRYPOINT"])]
        entry = [word.replace("0.0.0.0", "127.0.0.1") for word in entry]
        words = [word.replace("/model", str(model)) for word in json.loads(self.values["CMD"])]
        check = json.loads(re.search(r"CMD (\[.*\])", self.values["HEALTHCHECK"])[1])
        check = [word.replace("8000", str(port)) for word in check]
        command = [*entry, *words, "--no-warm-up"]
        print(shlex.join(command), flush=True)
        where = {"cwd": self._folder, "env": self._variables}
        with subprocess.Popen(command, **where) as server:
            try:
                end = time.monotonic() + SECONDS
                while subprocess.run(check, **where, stderr=subprocess.DEVNULL).returncode:
                    if server.poll() is not None or time.monotonic() > end:
                        sys.exit(f"the health check has not succeeded: {shlex.join(check)}")
                    time.sleep(1)
                print("the health check succeeds", flush=True)
                server.send_signal(signal.SIGTERM)
                if server.wait(timeout=60):
                    sys.exit(f"the server ended with {server.returncode}")
            finally:
                server.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a model directory")
    parser.add_argument("--python", default=sys.executable, help="in place of the base image's")
    parser.add_argument("--venv", type=Path, help="an environment to install into, not a fresh one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="minigpt4-image-") as folder:
        begin = time.monotonic()
        image = Image(Path(folder), args.python, args.venv)
        image.build()
        image.serve(args.model.resolve())
        print(f"done in {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
