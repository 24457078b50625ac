"""minigpt4_jax.evaluate --model=DIR --data.root=DATA --benchmark=NAME,...: answer and score benchmarks."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minigpt4_jax.checkpoint.model_directory import fingerprint
from minigpt4_jax.cli import common
from minigpt4_jax.cli.evaluate_score import print_scores
from minigpt4_jax.errors import Parser, UserError
from minigpt4_jax.evaluation.answering import AnswerOptions, answer_task, is_complete
from minigpt4_jax.evaluation.answers import AnswerFile
from minigpt4_jax.evaluation.benchmarks import BENCHMARKS
from minigpt4_jax.evaluation.report import write_report
from minigpt4_jax.evaluation.results import SCORES, find_results, lines_of, score_task, write_scores
from minigpt4_jax.evaluation.task import Task, open_tasks

NAMED = 3  # errors that are printed
# options of the model that answers depend on
RECORDED = ("dtype", "quantize", "kv_cache", "exif")


def parser() -> Parser:
    p = common.make_parser(
        "evaluate", "Answer the questions of benchmarks, and score the answers.",
        exif=False,  # boxes are for the stored pixels
    )  # fmt: skip
    p.add_argument("--data.root", dest="root", required=True, type=Path, metavar="DIR",
                   help="folder of the benchmarks' files (see `evaluate check`)")  # fmt: skip
    p.add_argument("--benchmark", required=True, metavar="NAME,...", help=", ".join(BENCHMARKS))
    p.add_argument("--split", default="", metavar="NAME,...",
                   help="splits of benchmarks that have several; by default all that are usual")  # fmt: skip
    p.add_argument("--limit", type=int, metavar="N", help="the first N rows of each")
    p.add_argument("--batch", type=int, default=32, help="rows decoded together (32)")
    p.add_argument("--resample", action="store_true", help="ask again for referring expressions without "
                   "a box, up to five times, as the original's --resample")  # fmt: skip
    p.add_argument("--out", type=Path, default=Path("evaluation"), metavar="DIR",
                   help="results (evaluation); the same command continues there")  # fmt: skip
    p.add_argument("--retry-errors", action="store_true", help="answer rows with an error again")
    p.add_argument("--shard", default="0/1", metavar="I/N", help="answer every N-th row from I on: one of "
                   "N processes or hosts that share --out; the last to finish writes the scores")  # fmt: skip
    return p


def main(argv: Sequence[str]) -> int:
    args = parser().parse_args(argv)
    for name in ("batch", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)}: expected 1 or more")
    options = AnswerOptions(
        args.batch, args.resample, args.template, args.system, args.extra_bos, _shard(args.shard)
    )
    tasks = open_tasks(_names(args.benchmark), args.root, _names(args.split), args.limit)
    weights = fingerprint(args.model, args.base)
    files = [_open(args, task, options, weights) for task in tasks]
    model = None
    for task, file in zip(tasks, files, strict=True):
        with file:
            if not is_complete(task, file, options):
                model = model or common.load_model(args)
                answer_task(model, task, file, options)
    code = max([_finish(args, task, options) for task in tasks])
    if any(args.out.glob(f"*/{SCORES}")):
        print(f"report: {write_report(list(find_results(args.out).values()), args.out)}")
    return code


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise UserError(f"--shard={text}: expected I/N with I from 0 to N - 1, as in 0/4")
    return int(match[1]), int(match[2])


def _path(args: argparse.Namespace, task: Task, shard: tuple[int, int]) -> Path:
    i, n = shard
    name = "answers.jsonl" if n == 1 else f"answers-{i}-of-{n}.jsonl"
    folder: Path = args.out / task.name
    return folder / name


def _open(args: argparse.Namespace, task: Task, options: AnswerOptions, weights: str) -> AnswerFile:
    settings: dict[str, Any] = {"weights": weights}
    settings |= {name: getattr(args, name) for name in RECORDED} | options.recorded(task)
    path = _path(args, task, options.shard)
    return AnswerFile(path, task.rows, settings, retry_errors=args.retry_errors)


def _finish(args: argparse.Namespace, task: Task, options: AnswerOptions) -> int:
    """Score a task whose rows are all answered, and print it. Exit code 1 if rows have an error."""
    n = options.shard[1]
    shards = [AnswerOptions(shard=(i, n)) for i in range(n)]
    files = [
        AnswerFile(_path(args, task, other.shard), task.rows, {}, retry_errors=False)
        for other in shards
        if _path(args, task, other.shard).exists()
    ]
    lines = lines_of(files, task)
    if lines is None:
        print(f"{task.title}: this process is done; other processes still have rows to answer")
        return 0
    scores = score_task(task, lines, str(args.model), resample=options.resample)
    path = write_scores(args.out / task.name, scores)
    print_scores(scores)
    print(f"  written to {path}")
    errors = scores["errors"]
    for error in errors[:NAMED]:
        print(f"  error in row {error['id']}: {error['error']}")
    if errors:
        hint = "mend the cause and pass --retry-errors"
        print(f"  {len(errors)} rows have an error and count as wrong; {hint}")
    return 1 if errors else 0
