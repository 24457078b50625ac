"""minigpt4_jax.evaluate report RESULTS...: HTML and Markdown of results, curves over checkpoints."""

from collections.abc import Sequence
from pathlib import Path

from minigpt4_jax.errors import Parser, UserError
from minigpt4_jax.evaluation.report import SHOWN, write_report
from minigpt4_jax.evaluation.report_curves import curves_of_results, curves_of_run
from minigpt4_jax.evaluation.results import find_results


def main(argv: Sequence[str]) -> int:
    p = Parser(
        prog="python -m minigpt4_jax.evaluate report",
        description="Write report.html and report.md of results. Of several folders the last is shown, and "
        "curves over all of them.",
    )
    p.add_argument("results", nargs="+", type=Path, metavar="RESULTS",
                   help="results folders in the order of their checkpoints, or a file of scores")  # fmt: skip
    p.add_argument(
        "--run", type=Path, metavar="WORKDIR", help="curves of a training run's own evaluation"
    )
    p.add_argument("--out", type=Path, metavar="DIR", help="by default the last results folder")
    p.add_argument("--shown", type=int, default=SHOWN,
                   help=f"worst rows, and random rows, of each benchmark ({SHOWN})")  # fmt: skip
    args = p.parse_args(argv)
    found = {path: list(find_results(path).values()) for path in args.results}
    last = args.results[-1]
    out: Path = args.out or (last if last.is_dir() else last.parent)
    if not out.is_dir():
        raise UserError(f"--out={out}: there is no such directory")
    if args.run and not (args.run / "metrics.jsonl").is_file():
        raise UserError(f"--run={args.run}: there is no metrics.jsonl there")
    curves = curves_of_results(found) + (curves_of_run(args.run) if args.run else [])
    print(write_report(found[last], out, curves=curves, shown=args.shown))
    return 0
