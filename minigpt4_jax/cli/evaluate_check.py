"""minigpt4_jax.evaluate check: what benchmarks need on disk, and what is missing."""

from collections.abc import Sequence
from pathlib import Path

from minigpt4_jax.errors import Parser
from minigpt4_jax.evaluation.benchmarks import BENCHMARKS, find
from minigpt4_jax.evaluation.data_check import check


def main(argv: Sequence[str]) -> int:
    """Exit code 1 if something is missing."""
    p = Parser(
        prog="python -m minigpt4_jax.evaluate check",
        description="What benchmarks need on disk, what of it is missing, and where people get it.",
    )
    p.add_argument("--data.root", dest="root", required=True, type=Path, metavar="DIR",
                   help="folder of the benchmarks' files")  # fmt: skip
    p.add_argument(
        "--benchmark", default=",".join(BENCHMARKS), metavar="NAME,...", help="by default all"
    )
    p.add_argument("--split", default="", metavar="NAME,...", help="by default all that are usual")
    args = p.parse_args(argv)
    names = [name.strip() for name in args.benchmark.split(",") if name.strip()]
    splits = [split for split in args.split.split(",") if split]
    complete = True
    for benchmark in map(find, names):
        for finding in check(benchmark, args.root, splits):
            complete &= finding.ok
            print(f"{'ok     ' if finding.ok else 'MISSING'} {finding.benchmark}: {finding.text}")
    return 0 if complete else 1
