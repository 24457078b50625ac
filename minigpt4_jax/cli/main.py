"""The console script: `minigpt4 COMMAND ...` runs what `python -m ...` runs."""

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from minigpt4_jax import __version__, errors
from minigpt4_jax.errors import UserError
from minigpt4_jax.utils.text import spelling_hint


class Command(NamedTuple):
    """module.run(arguments), imported when the command is used."""

    module: str
    summary: str
    arguments: tuple[str, ...] = ()  # before those of the user


COMMANDS = {
    "train": Command("minigpt4_jax.cli.train", "train a model"),
    "chat": Command("minigpt4_jax.cli.chat", "talk with a model about images"),
    "batch": Command("minigpt4_jax.cli.batch", "answer the questions of a JSONL file"),
    "evaluate": Command("minigpt4_jax.cli.evaluate", "run benchmarks, score answers"),
    "serve": Command("minigpt4_jax.cli.serve", "answer requests of OpenAI's API"),
    "demo": Command("minigpt4_jax.cli.demo", "open a web page to talk with a model"),
    "convert": Command("convert.cli", "convert weights to and from a model directory"),
    "compile": Command(
        "minigpt4_jax.cli.compile", "memory and time of a run on a TPU slice or GPU"
    ),
    "check-data": Command(
        "minigpt4_jax.cli.check_data", "check the datasets of a configuration", ("check",)
    ),
    "curate": Command("minigpt4_jax.cli.curate", "make stage-2 data from images"),
    "quickstart": Command(
        "minigpt4_jax.demos.quickstart", "train a model that describes images, from nothing"
    ),
    "tiny-v2": Command("minigpt4_jax.demos.tiny_v2", "train a small MiniGPT-v2 with its tasks"),
    "compare": Command("minigpt4_jax.demos.compare", "BLIP-2's training beside the two stages"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: minigpt4 COMMAND [OPTION]...", "", "MiniGPT-4, MiniGPT-v2 and BLIP-2 in JAX.", "",
            *lines, "", "minigpt4 COMMAND --help explains a command.",
        ]
    )  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """--help, --version and mistakes; `run` starts the commands. UserError: an unknown command."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"minigpt4_jax {__version__}")
        return 0
    raise UserError(f"{argv[0]!r} is not a command of minigpt4; {spelling_hint(argv[0], COMMANDS)}")


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command and end the process; a UserError is one line on stderr."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = COMMANDS.get(argv[0]) if argv else None
    if command is None:
        errors.run(lambda: main(argv))
    importlib.import_module(command.module).run([*command.arguments, *argv[1:]])
    raise AssertionError(f"{command.module}.run returned")  # it ends the process
