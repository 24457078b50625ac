"""minigpt4_jax.evaluate score: the scores of answers from anywhere, without a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt4_jax.errors import Parser, UserError
from minigpt4_jax.evaluation.benchmarks import BENCHMARKS, find
from minigpt4_jax.evaluation.results import number_text, write_json
from minigpt4_jax.evaluation.scoring import score_file

PRINTED = ("original", "official", "lavis", "metrics", "domains", "files", "versions", "note")


def main(argv: Sequence[str]) -> int:
    p = Parser(
        prog="python -m minigpt4_jax.evaluate score",
        description="Score answers from anywhere: another model, an API, a file of a paper.",
    )
    p.add_argument("--benchmark", required=True, metavar="NAME", help=", ".join(BENCHMARKS))
    p.add_argument("--data", required=True, type=Path, metavar="PATH",
                   help="annotations in their published layout: the folder, or the file")  # fmt: skip
    p.add_argument("--predictions", required=True, type=Path, metavar="FILE",
                   help='a line {"id": ..., "answer": ...} for each row')  # fmt: skip
    p.add_argument(
        "--split", default="", help="of the benchmark; by default its first, of pope all"
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="where to write all figures")
    args = p.parse_args(argv)
    benchmark = find(args.benchmark)
    if args.json and not args.json.parent.is_dir():
        raise UserError(f"--json={args.json}: there is no directory {args.json.parent}")
    scores = score_file(benchmark, args.data, args.predictions, args.split)
    if args.json:
        write_json(args.json, scores)
    print_scores(scores)
    return 0


def print_scores(scores: Mapping[str, Any]) -> None:
    """The figures, a line each; tables of question types and of single questions are left out."""
    low, high = scores["interval"]
    rows, of_rows = scores["rows"], scores.get("of_rows", scores["rows"])
    number = f"{rows} rows" if rows == of_rows else f"the first {rows} of {of_rows} rows"
    print(
        f"{scores['title']}: {scores['metric']} {scores['score']:.2f} "
        f"(95 % interval {low:.2f} to {high:.2f}) over {number}"
    )
    for part in PRINTED:
        for line in _lines(part, scores.get(part)):
            print(f"  {line}")


def _lines(name: str, value: Any) -> list[str]:
    if isinstance(value, Mapping):
        if value and not any(isinstance(v, Mapping) for v in value.values()):
            return [f"{name}: " + ", ".join(f"{key} {number_text(v)}" for key, v in value.items())]
        shown = {key: v for key, v in value.items() if not key.startswith("per_")}
        return [line for key, v in shown.items() for line in _lines(f"{name} {key}", v)]
    return [] if value is None or isinstance(value, list) else [f"{name}: {number_text(value)}"]
