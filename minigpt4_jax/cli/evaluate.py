"""python -m minigpt4_jax.evaluate ACTION: benchmarks, and scores of given answers."""

import sys
from collections.abc import Sequence
from typing import NoReturn

from minigpt4_jax import errors
from minigpt4_jax.cli import evaluate_score
from minigpt4_jax.errors import UserError

ACTIONS = {"score": evaluate_score.main}

USAGE = """usage: python -m minigpt4_jax.evaluate ACTION [OPTION]...

  score   score answers from anywhere, without a model

python -m minigpt4_jax.evaluate ACTION --help explains an action."""


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in ACTIONS:
        return ACTIONS[argv[0]](argv[1:])
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    raise UserError(f"{argv[0]!r}: expected one of the actions {', '.join(ACTIONS)}")


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and end the process; a UserError is one line on stderr."""
    errors.run(lambda: main(argv))
