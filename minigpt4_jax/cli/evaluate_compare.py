"""minigpt4_jax.evaluate compare A B: the difference of two results, and the rows where they part."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt4_jax.errors import Parser, UserError
from minigpt4_jax.evaluation.compare import Comparison, Pair, compare
from minigpt4_jax.evaluation.results import find_results, write_json
from minigpt4_jax.utils.text import shorten


def main(argv: Sequence[str]) -> int:
    p = Parser(
        prog="python -m minigpt4_jax.evaluate compare",
        description="Compare two results on the same rows: of two models, checkpoints or settings.",
    )
    p.add_argument("a", type=Path, metavar="A", help="results folder, or a file of scores")
    p.add_argument("b", type=Path, metavar="B", help="the same of the other")
    p.add_argument("--rows", type=int, default=5, help="rows to print where they part (5)")
    p.add_argument("--json", type=Path, metavar="FILE", help="where to write everything")
    args = p.parse_args(argv)
    a, b = find_results(args.a), find_results(args.b)
    shared = [name for name in a if name in b]
    if not shared:
        raise UserError(
            f"{args.a} has {', '.join(a)}, {args.b} has {', '.join(b)}: nothing to compare"
        )
    comparisons = [compare(a[name], b[name]) for name in shared]
    for comparison in comparisons:
        _print(comparison, args.rows)
    if left_out := sorted(set(a) ^ set(b)):
        print(f"only in one of them: {', '.join(left_out)}")
    if args.json:
        write_json(args.json, {c.title: _as_json(c) for c in comparisons})
    return 0


def _print(c: Comparison, num_rows: int) -> None:
    low, high = c.interval
    print(f"{c.title}: A {c.scores[0]:.2f}, B {c.scores[1]:.2f}")
    print(
        f"  B - A over {c.rows} rows: {c.difference:+.2f} points (95 % interval {low:+.2f} to {high:+.2f}); "
        f"B is better in {c.better} rows, worse in {c.worse}"
    )
    for pair in c.parted[:num_rows]:
        print(f"  {pair.id}  {shorten(str(pair.a.get('question', '')), 90)}")
        print(f"    A ({pair.a['score']:.0f}): {_text(pair.a)}")
        print(f"    B ({pair.b['score']:.0f}): {_text(pair.b)}")


def _text(row: Mapping[str, Any]) -> str:
    answer = row["answer"]
    if not isinstance(answer, (str, list)):  # losses
        answer = row.get("chosen", answer)
    return shorten(" ".join(str(row.get("error", answer)).split()), 100)


def _as_json(c: Comparison) -> dict[str, Any]:
    def row(pair: Pair) -> dict[str, Any]:
        return {"id": pair.id, "a": pair.a, "b": pair.b}

    return {**c._asdict(), "parted": [row(pair) for pair in c.parted]}
