"""`python -m minigpt4_jax.batch --ray=ADDRESS`: answers the pieces of the input with Ray Data."""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minigpt4_jax.cli import ray_cluster
from minigpt4_jax.cli.ray_batch.file_format import Format
from minigpt4_jax.cli.ray_batch.plan import Parts, Piece, open_output
from minigpt4_jax.cli.ray_batch.worker import Worker
from minigpt4_jax.errors import Parser, UserError

ROWS_PER_SHARD = 1000
# Options that answers do not depend on. `open_output` records the last two with their defaults filled in.
NOT_RECORDED = (*ray_cluster.OPTIONS, "output_format", "rows_per_shard")


def add_options(parser: Parser) -> None:
    group = parser.add_argument_group("on a Ray cluster (needs pip install 'minigpt4_jax[ray]')")
    ray_cluster.add_options(group)
    group.add_argument("--rows-per-shard", type=int, metavar="N",
                       help=f"of a file of the output ({ROWS_PER_SHARD:,}); a lost worker's are answered "
                       "again")  # fmt: skip
    group.add_argument("--output-format", choices=("jsonl", "parquet", "webdataset"),
                       help="by default the input's; of any input also jsonl")  # fmt: skip


def check_options(args: argparse.Namespace) -> None:
    """UserError: options of Ray without --ray, or out of range."""
    ray_cluster.check_options(args)
    if args.ray is None and (args.rows_per_shard or args.output_format):
        raise UserError("--rows-per-shard and --output-format are of --ray; add it, or omit them")
    if args.rows_per_shard is not None and args.rows_per_shard < 1:
        raise UserError(f"--rows-per-shard={args.rows_per_shard}: expected 1 or more")
    if args.ray is not None and args.shard is not None:
        raise UserError("--shard and --ray both divide the rows; choose one of them")


def run(args: argparse.Namespace, settings: dict[str, Any]) -> int:
    """Answer the rows; exit code 1 if some have an error. UserError: wrong input, output or cluster."""
    args.rows_per_shard = args.rows_per_shard or ROWS_PER_SHARD
    ray_cluster.require("data")
    pieces, parts, source = open_output(args, settings)
    remaining = []
    done = errors = 0
    for piece in pieces:
        stats = parts.stats(piece.number)
        if stats is None or (args.retry_errors and stats.errors):
            remaining.append(piece)
        else:
            done, errors = done + stats.rows, errors + stats.errors
    total = sum(piece.rows for piece in pieces)
    if not remaining:
        return _finish(f"all {total} rows are answered already", errors, args.output)
    with ray_cluster.connected(args.ray):
        interval = 0.5 if sys.stderr.isatty() else 30.0
        with tqdm(total=total, initial=done, unit="row", mininterval=interval) as bar:
            for rows, new_errors in _answer(args, source, parts, remaining):
                errors += new_errors
                bar.update(rows)
                bar.set_postfix(errors=errors, refresh=False)
    parts.remove_fragments()
    return _finish(f"{total - done} rows", errors, args.output)


def _answer(
    args: argparse.Namespace, source: Format, parts: Parts, remaining: Sequence[Piece]
) -> Iterator[tuple[int, int]]:
    """Have the remaining pieces answered; yields (rows, those with an error) of each when it is written.

    UserError: a worker cannot answer or write, or the output is not on a file system of all machines.
    """
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    needs = ray_cluster.model_needs(args)
    smallest, largest = ray_cluster.num_models(args, needs)
    largest = min(largest, len(remaining))
    # The pool shrinks when nothing waits, so that the pieces of a lost worker find a place.
    pool = ray.data.ActorPoolStrategy(
        min_size=1, max_size=largest, initial_size=max(1, min(smallest, largest)),
        max_tasks_in_flight_per_actor=2,
    )  # fmt: skip
    items = [piece._asdict() for piece in remaining]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        Worker, fn_constructor_args=(args, source, parts), batch_size=1, compute=pool,
        runtime_env=ray_cluster.runtime_env(), **needs.options(),
    )  # fmt: skip
    for row in dataset.iter_rows():
        if row["failure"]:
            raise UserError(row["failure"])
        if parts.stats(row["number"]) is None:
            raise UserError(
                f"--output={args.output}: what the workers write is not seen here; expected a folder of a "
                "file system that all machines share, by the same path"
            )
        yield row["rows"], row["errors"]


def _finish(summary: str, errors: int, output: Path) -> int:
    hint = "; mend the cause and pass --retry-errors to answer these again" if errors else ""
    print(f"{summary}, {errors} of them with an error: {output}{hint}")
    return 1 if errors else 0
