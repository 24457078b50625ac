"""python -m minigpt4_jax.evaluate: benchmarks of a model, and what is done with their results."""

import sys
from collections.abc import Sequence
from typing import NoReturn

from minigpt4_jax import errors
from minigpt4_jax.cli import (
    evaluate_check,
    evaluate_compare,
    evaluate_report,
    evaluate_run,
    evaluate_score,
)
from minigpt4_jax.utils.text import spelling_hint

ACTIONS = {
    "check": evaluate_check.main,
    "score": evaluate_score.main,
    "compare": evaluate_compare.main,
    "report": evaluate_report.main,
}

USAGE = """usage: python -m minigpt4_jax.evaluate [ACTION] [OPTION]...

Without an action: answer the questions of benchmarks with a model, and score the answers (options below).

  check     what benchmarks need on disk, and what is missing
  score     score answers from anywhere, without a model
  compare   the difference of two results, and the rows where they part
  report    HTML and Markdown of results, with pictures, and curves over checkpoints

python -m minigpt4_jax.evaluate ACTION --help explains an action.
"""


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv in ([], ["-h"], ["--help"]):
        print(USAGE + "\n" + evaluate_run.parser().format_help() if argv else USAGE)
        return 0 if argv else 2
    if argv[0] in ACTIONS:
        return ACTIONS[argv[0]](argv[1:])
    if not argv[0].startswith("-"):
        raise errors.UserError(f"{argv[0]!r} is no action; {spelling_hint(argv[0], ACTIONS)}")
    return evaluate_run.main(argv)


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and end the process; a UserError is one line on stderr."""
    errors.run(lambda: main(argv))
