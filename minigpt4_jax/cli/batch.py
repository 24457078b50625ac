"""python -m minigpt4_jax.batch --model=DIR --input=rows.jsonl --output=out.jsonl: answer many rows.

An input row is an object with "image" (a path relative to the file, a list of paths, or none) and
"prompt" (or "question"; without both, --prompt is used). Its output row is the same object with
"response", "finish_reason" and "tokens", or with "error" if it cannot be answered. Output row n belongs
to input row n. The same command continues an interrupted one; with --retry-errors it also answers the
rows again that have an error. Exit code 1: rows of the output have an error.

--shard=I/N answers one of N parts of the input, for job arrays; `python -m minigpt4_jax.batch merge` puts
their outputs together. --ray=ADDRESS answers the rows with the models of a Ray cluster.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from minigpt4_jax import errors
from minigpt4_jax.cli import common
from minigpt4_jax.cli.batch_answers import Answerer, generation_config
from minigpt4_jax.cli.batch_output import Output
from minigpt4_jax.cli.batch_rows import read_rows
from minigpt4_jax.cli.batch_shards import parse_shard, shard_path, shard_rows
from minigpt4_jax.cli.ray_batch import command as ray_command
from minigpt4_jax.errors import UserError

# options that answers do not depend on
NOT_RECORDED = (
    "input", "output", "batch_size", "retry_errors", "base", "allow_nonfinite", "shard",
    *ray_command.NOT_RECORDED,
)  # fmt: skip


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = common.make_parser(
        "batch", "Answer many questions, or caption many images, from a JSONL file."
    )
    p.add_argument("--input", required=True, type=Path, metavar="FILE", help="one row per line")
    p.add_argument("--output", required=True, type=Path, metavar="FILE", help="one answer per line")
    p.add_argument("--prompt", metavar="TEXT", help="for rows without a prompt")
    p.add_argument("--raw", action="store_true", help="prompts are complete, with <ImageHere> where "
                   "an image goes; by default they are put into the chat template")  # fmt: skip
    p.add_argument("--batch_size", type=int, default=32, help="rows decoded together (32)")
    p.add_argument("--retry-errors", action="store_true",
                   help="answer the rows of an existing output again that have an error")  # fmt: skip
    p.add_argument("--shard", metavar="I/N", help="answer the I-th of N parts of the rows, into a file "
                   "of its own beside the output; `batch merge` puts the parts together")  # fmt: skip
    ray_command.add_options(p)
    common.add_generation_options(p, "greedy by default; row n is sampled with seed + n")
    return p.parse_args(argv)


def answer_all(answerer: Answerer, num_rows: int, output: Output) -> None:
    """Answer the remaining rows of an output. num_rows: of the whole output."""
    interval = 0.5 if sys.stderr.isatty() else 30.0
    initial = num_rows - len(output.remaining)
    with tqdm(total=num_rows, initial=initial, unit="row", mininterval=interval) as bar:
        for row, result in answerer.answer(output.remaining):
            output.put(row, result)
            bar.update()


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options that answers depend on."""
    return {name: value for name, value in vars(args).items() if name not in NOT_RECORDED}


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] == "merge":
        from minigpt4_jax.cli import batch_merge

        return batch_merge.main(argv[1:])
    args = parse(argv)
    if args.batch_size < 1:
        raise UserError(f"--batch_size={args.batch_size}: expected 1 or more")
    if args.input.resolve() == args.output.resolve():
        raise UserError("--input and --output are the same file; choose another --output")
    ray_command.check_options(args)
    for text in common.unused_options(common.given_options(args), generation_config(args)):
        common.note(f"note: {text}")
    if args.ray is not None:
        common.check_kind(args.model)  # before a cluster is started
        return ray_command.run(args, settings_of(args))
    rows, path = read_rows(args.input, args.prompt), args.output
    if args.shard is not None:
        shard = parse_shard(args.shard)
        rows, path = shard_rows(rows, *shard), shard_path(path, *shard)
    output = Output(path, rows, settings_of(args), retry_errors=args.retry_errors)
    if not output.remaining:
        return _finish(f"all {len(rows)} rows are answered already", output, path)
    answerer = Answerer(args)
    with output:
        answer_all(answerer, len(rows), output)
    return _finish(f"{len(output.remaining)} rows", output, path)


def _finish(summary: str, output: Output, path: Path) -> int:
    """Print what was done; exit code 1 if rows of the output have an error."""
    hint = "; mend the cause and pass --retry-errors to answer these again"
    num_errors = output.num_errors
    print(f"{summary}, {num_errors} of them with an error: {path}{hint if num_errors else ''}")
    return 1 if num_errors else 0


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and end the process; a UserError is one line on stderr."""
    errors.run(lambda: main(argv))
