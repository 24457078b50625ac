"""python -m minigpt4_jax.demo --model=DIR: a web page to talk with a model.

Without --model: the models of `make tiny_v2` and `make quickstart`, as far as they have been made, each on
a port of its own. All options are those of `serve`, which with --ui does the same.
"""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

from minigpt4_jax import errors
from minigpt4_jax.cli import serve
from minigpt4_jax.errors import UserError

DEMONSTRATIONS = (Path("tiny_v2/run/model"), Path("quickstart/stage2/model"))  # with their workdirs
FIRST_PORT = 8000
# Small models need every digit of a box; the original's penalty makes a repeated one less likely.
OPTIONS = ["--repetition_penalty=1"]


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if any(word.split("=")[0] in ("--model", "-h", "--help") for word in argv):
        return serve.main([*argv, "--ui"])
    made = [path for path in DEMONSTRATIONS if (path / "model.json").is_file()]
    if not made:
        raise UserError(
            "no demonstration has been trained here; run `make quickstart` (about 12 minutes) or "
            "`make tiny_v2` (about half an hour), or name a model: --model=DIR"
        )
    if len(made) > 1 and any(word.split("=")[0] == "--port" for word in argv):
        raise UserError(f"--port is for one model; add --model={made[0]} or --model={made[1]}")
    argv = [*OPTIONS, *argv]
    with ExitStack() as others:
        for n, path in enumerate(made[1:], 1):
            others.enter_context(_server_of(path, FIRST_PORT + n, argv))
        return serve.main([*argv, f"--model={made[0]}", f"--served-name={_name(made[0])}", "--ui"])


@contextmanager
def _server_of(model: Path, port: int, argv: Sequence[str]) -> Iterator[None]:
    """Another process, which ends with this one."""
    command = [sys.executable, "-m", "minigpt4_jax.demo", *argv]
    options = [f"--model={model}", f"--served-name={_name(model)}", f"--port={port}"]
    with subprocess.Popen([*command, *options]) as process:
        try:
            yield
        finally:
            process.terminate()


def _name(model: Path) -> str:
    return model.parts[0]


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and end the process; a UserError is one line on stderr."""
    errors.run(lambda: main(argv))
