"""`minigpt4 curate COMMAND ...`: from images to the data of the second training stage."""

import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from minigpt4_jax import errors
from minigpt4_jax.cli.main import Command
from minigpt4_jax.errors import UserError
from minigpt4_jax.utils.text import spelling_hint

COMMANDS = {
    "describe": Command("minigpt4_jax.cli.curation.describe", "describe images with a model"),
    "polish": Command(
        "minigpt4_jax.cli.curation.polish",
        "correct descriptions with a language model, filter them",
    ),
    "check": Command(
        "minigpt4_jax.cli.curation.check", "statistics, near duplicates and a sheet of samples"
    ),
    "review": Command(
        "minigpt4_jax.cli.curation.review", "accept, edit or reject rows in a browser"
    ),
    "export": Command("minigpt4_jax.cli.curation.export", "write rows as a dataset for training"),
    "captions": Command(
        "minigpt4_jax.cli.curation.captions", "stage 1: a caption list as a table for img2dataset"
    ),
    "shards": Command("minigpt4_jax.cli.curation.shards", "stage 1: check downloaded shards"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: minigpt4 curate COMMAND [OPTION]...",
            "",
            "Make the data of the second training stage from images; prepare that of the first.",
            "",
            *lines,
            "",
            "minigpt4 curate COMMAND --help explains a command.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the commands; its exit code. UserError: an unknown command, or the command's."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    command = COMMANDS.get(argv[0])
    if command is None:
        raise UserError(
            f"{argv[0]!r} is not a command of curate; {spelling_hint(argv[0], COMMANDS)}"
        )
    code: int = importlib.import_module(command.module).main([*command.arguments, *argv[1:]])
    return code


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command and end the process; a UserError is one line on stderr."""
    errors.run(lambda: main(argv))
