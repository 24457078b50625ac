"""python -m minigpt4_jax.data check CONFIG: open each dataset of a configuration and show what is in it.

Counts the rows and what is missing, opens some of the images, and saves samples with their question,
answer and drawn boxes as one picture. Exit code 1 when a dataset cannot be opened or an image not
be read.
"""

import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import numpy as np
from PIL import Image

from minigpt4_jax import errors
from minigpt4_jax.data import readers
from minigpt4_jax.data.dataset import ExampleList, Source
from minigpt4_jax.data.json_records import Example, read_sources
from minigpt4_jax.data.skipped import broken
from minigpt4_jax.errors import Parser, UserError
from minigpt4_jax.processing.images import open_image
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.config_cli import parse as parse_config

if TYPE_CHECKING:
    import argparse

_LONGEST = 300  # characters of a text on the sheet


class _Sample(NamedTuple):
    picture: Image.Image
    text: str


@dataclass
class Report:
    """What was found in a dataset."""

    name: str
    turns: str = ""  # its share of them
    rows: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # faulty ones, by cause
    unused: dict[str, int] = field(
        default_factory=dict
    )  # by the dataset's own rule, such as a split
    opened: int = 0
    broken: Counter[str] = field(default_factory=Counter)  # of those opened, by cause
    error: str = ""  # why it cannot be opened, or the last broken row
    samples: list[_Sample] = field(default_factory=list)


def parse(argv: Sequence[str] | None = None) -> "tuple[argparse.Namespace, list[str]]":
    p = Parser(prog="python -m minigpt4_jax.data", description=__doc__.split("\n")[0])
    p.add_argument("command", choices=("check",))
    p.add_argument("config", metavar="CONFIG", help="NAME[:ARG], or the path of a .py file; "
                   "--config.KEY=VALUE changes a value, as in training")  # fmt: skip
    p.add_argument("--sheet", type=Path, default=Path("data_check.png"), metavar="FILE.png",
                   help="where samples are saved (data_check.png)")  # fmt: skip
    p.add_argument("--samples", type=int, default=4, help="of each dataset, on the sheet (4)")
    p.add_argument("--look", type=int, default=64, help="images of each dataset to open (64)")
    args, overrides = p.parse_known_args(argv)
    if args.samples < 0 or args.look < 0:
        raise UserError("--samples and --look must be 0 or more")
    return args, overrides


def main(argv: Sequence[str] | None = None) -> int:
    args, overrides = parse(argv)
    c, _ = parse_config([f"--config={args.config}", *overrides], data_only=True)
    reports = []
    for name, turns, opening in _datasets(c):
        report = check(name, opening, args.look, args.samples, c.seed)
        report.turns = turns
        reports.append(report)
    print(_table(reports))
    samples = [sample for report in reports for sample in report.samples]
    if samples:
        from minigpt4_jax.visualization.plots import contact_sheet  # matplotlib

        pictures, texts = [s.picture for s in samples], [s.text for s in samples]
        print(f"samples: {contact_sheet(pictures, texts, [None] * len(samples), args.sheet)}")
    return int(any(report.error for report in reports))


def _datasets(c: TrainConfig) -> list[tuple[str, str, Callable[[], Source]]]:
    """(name, share of the turns, what opens it) of each."""
    total = sum(d.ratio for d in c.data.mix.values())
    found: list[tuple[str, str, Callable[[], Source]]] = []
    for name, d in c.data.mix.items():
        if d.ratio > 0:
            opening = partial(readers.open_source, name, d, c.data.root, max_broken=1.0)
            found.append((name, f"{d.ratio / total:.1%}", opening))
    for path in (*c.data.path, *c.data.val_path):
        found.append((path, "", partial(_open_files, path, c.data.clean_captions)))
    return found


def _open_files(path: str, clean_captions: bool) -> Source:
    return ExampleList(path, read_sources(path, clean_captions=clean_captions))


def check(name: str, opening: Callable[[], Source], look: int, samples: int, seed: int) -> Report:
    """Open a dataset, `look` of its examples, and keep some as samples."""
    report = Report(name)
    try:
        source = opening()
    except UserError as e:
        report.error = str(e)
        return report
    report.rows, report.dropped = len(source), dict(source.dropped)
    report.unused = dict(source.left_out)
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(source))[: max(look, samples)]
    for index in chosen:
        try:
            example = source.example(int(index), rng)
            pictures = [open_image(image) for image in example.images]
        except UserError as e:
            report.broken[broken(name, e).cause] += 1
            report.error = str(e)
        else:
            if len(report.samples) < samples:
                report.samples.append(_sample(name, example, pictures))
        report.opened += 1
    return report


def _sample(name: str, example: Example, pictures: Sequence[Image.Image]) -> _Sample:
    """An example as the sheet shows it: its first picture, with the boxes of its texts."""
    from minigpt4_jax.processing.boxes import parse_boxes
    from minigpt4_jax.visualization.boxes import draw_boxes

    picture = pictures[0] if pictures else Image.new("RGB", (64, 64), "white")
    told = " ".join([*example.questions, *example.answers])
    if pictures and parse_boxes(told, *picture.size):
        picture = draw_boxes(picture, told)
    lines = [f"{name}:"]
    if len(pictures) != 1:
        lines = [f"{name} ({len(pictures)} images):"]
    for n, answer in enumerate(example.answers):
        if n < len(example.questions):
            lines.append(f"> {_short(example.questions[n])}")
        lines.append(_short(answer))
    return _Sample(picture, "  ".join(lines))


def _short(text: str) -> str:
    return textwrap.shorten(text, _LONGEST, placeholder=" ...")


def _table(reports: Sequence[Report]) -> str:
    """A line a dataset, and below it what is wrong with it."""
    width = max(len(report.name) for report in reports)
    lines = [
        f"{'dataset':{width}}  {'rows':>11}  {'left out':>9}  {'turns':>6}  {'opened':>6}  broken"
    ]
    for r in reports:
        out, broken_ = sum(r.dropped.values()), r.broken.total()
        lines.append(
            f"{r.name:{width}}  {r.rows:11,}  {out:9,}  {r.turns:>6}  {r.opened:6}  {broken_:6}"
        )
        lines += [f"  {n:,} {cause}" for cause, n in [*r.dropped.items(), *r.broken.items()]]
        lines += [f"  {n:,} {cause}, as is its rule" for cause, n in r.unused.items()]
        lines += [f"  {r.error}"] if r.error else []
    return "\n".join(lines)


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and end the process; a UserError is one line on stderr."""
    errors.run(lambda: main(argv))
