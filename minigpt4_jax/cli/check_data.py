"""Check the datasets of a configuration and show samples of them.

`python -m minigpt4_jax.data check CONFIG` or `minigpt4 check-data CONFIG` counts the rows of each dataset
and the invalid ones, opens every example with its images, and saves samples with question, answer and
boxes as one image. Exit code 1 if a dataset cannot be opened or an example cannot be read. With --look,
fewer are opened, but the image files of all rows of own data are looked for.
"""

import itertools
import os
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import numpy as np
from PIL import Image
from tqdm import tqdm

from minigpt4_jax import errors
from minigpt4_jax.data import readers
from minigpt4_jax.data.dataset import ExampleList, Source
from minigpt4_jax.data.json_records import Example, read_sources
from minigpt4_jax.data.skipped import skipped_row
from minigpt4_jax.data.webdataset import BROKEN, MISSING
from minigpt4_jax.errors import Parser, UserError
from minigpt4_jax.processing.images import open_image
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.config_cli import parse as parse_config

if TYPE_CHECKING:
    import argparse

_CHUNK = 1024  # examples that the threads get at once
_MAX_TEXT = 300  # characters of a question or answer on the contact sheet
_SHEET_SIDE = 320  # pixels of an image in the contact sheet: labels of boxes can be read


class _Sample(NamedTuple):
    """An example on the contact sheet."""

    image: Image.Image
    text: str


@dataclass
class DataReport:
    """What was found in a dataset. `failed`: something cannot be read.

    dropped, left_out: see data.dataset.Source. turns: its share of the mixture. opened: examples
    opened; broken: those that cannot be read, by cause, and those not opened whose image is missing.
    error: why the dataset cannot be opened. messages: of the first broken example of each cause.
    """

    name: str
    turns: str = ""
    rows: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    opened: int = 0
    broken: Counter[str] = field(default_factory=Counter)
    error: str = ""
    messages: dict[str, str] = field(default_factory=dict)
    samples: list[_Sample] = field(default_factory=list)

    def add_broken(self, error: UserError) -> None:
        cause = skipped_row(self.name, error).cause
        self.broken[cause] += 1
        self.messages.setdefault(cause, str(error))

    @property
    def failed(self) -> bool:
        damaged_shards = any(self.dropped.get(cause) for cause in (BROKEN, MISSING))
        return bool(self.error or self.broken or damaged_shards)


def parse(argv: Sequence[str] | None = None) -> "tuple[argparse.Namespace, list[str]]":
    p = Parser(
        prog="python -m minigpt4_jax.data", description="Check the datasets of a configuration."
    )
    p.add_argument("command", choices=("check",))
    p.add_argument("config", metavar="CONFIG", help="NAME[:ARG], the path of a .py file, or own data: a file "
                   "or a folder; --config.KEY=VALUE changes a value, as in training")  # fmt: skip
    p.add_argument("--sheet", type=Path, default=Path("data_check.png"), metavar="FILE.png",
                   help="file for the samples (data_check.png)")  # fmt: skip
    p.add_argument("--samples", type=int, default=4, help="samples of each dataset (4)")
    p.add_argument(
        "--look", type=int, metavar="N", help="random examples of each dataset to open (all)"
    )
    args, overrides = p.parse_known_args(argv)
    if args.samples < 0 or (args.look or 0) < 0:
        raise UserError("--samples and --look must be 0 or more")
    path = os.path.expanduser(args.config)
    if os.path.isdir(path) or (os.path.isfile(path) and not path.endswith(".py")):
        args.config, overrides = "finetune", [f"--config.data.path={path}", *overrides]
    return args, overrides


def main(argv: Sequence[str] | None = None) -> int:
    args, overrides = parse(argv)
    if args.samples:
        check_sheet(args.sheet)
    c, _ = parse_config([f"--config={args.config}", *overrides], data_only=True)
    reports = []
    for name, turns, open_source, exif in _datasets(c):
        report = check(name, open_source, args.look, args.samples, c.seed, exif=exif)
        report.turns = turns
        reports.append(report)
    print(format_reports(reports))
    write_sheet(reports, args.sheet)
    return int(any(report.failed for report in reports))


def check_sheet(path: Path) -> None:
    """UserError, before rows are opened for hours: the samples cannot be written there."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir():
        raise UserError(f"--sheet={path}: is a directory; expected the name of a picture")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"--sheet={path}: {folder} is no directory that can be written")


def write_sheet(reports: Sequence[DataReport], path: Path) -> None:
    """Save the samples as one image, if there are any, and print its path."""
    samples = [sample for report in reports for sample in report.samples]
    if samples:
        from minigpt4_jax.visualization.plots import contact_sheet  # matplotlib

        images, texts = [s.image for s in samples], [s.text for s in samples]
        verdicts = [None] * len(samples)
        sheet = contact_sheet(images, texts, verdicts, path, side=_SHEET_SIDE)
        print(f"samples: {sheet}")


def _datasets(c: TrainConfig) -> list[tuple[str, str, Callable[[], Source], bool]]:
    """-> (name, share of the mixture, function that opens it, whether its images are rotated as EXIF
    says) of each dataset."""
    total = sum(d.ratio for d in c.data.mix.values())
    datasets: list[tuple[str, str, Callable[[], Source], bool]] = []
    for name, d in c.data.mix.items():
        if d.ratio > 0:
            open_source = partial(readers.open_source, name, d, c.data.root, max_broken=1.0)
            datasets.append(
                (
                    name,
                    f"{d.ratio / total:.1%}",
                    open_source,
                    c.data.exif and readers.is_own(name, d),
                )
            )
    for path in (*c.data.path, *c.data.val_path):
        datasets.append((path, "", partial(_open_files, path, c.data.clean_captions), c.data.exif))
    return datasets


def _open_files(path: str, clean_captions: bool) -> Source:
    return ExampleList(path, read_sources(path, clean_captions=clean_captions, max_broken=1.0))


def check(
    name: str,
    open_source: Callable[[], Source],
    look: int | None,
    samples: int,
    seed: int,
    *,
    exif: bool = False,
) -> DataReport:
    """Open a dataset and `look` random examples of it (None: all); keep some as samples."""
    report = DataReport(name)
    try:
        source = open_source()
    except UserError as e:
        report.error = str(e)
        return report
    report.rows = len(source)
    report.dropped, report.left_out = dict(source.dropped), dict(source.left_out)
    order = np.random.default_rng(seed).permutation(len(source))
    order = order[: len(source) if look is None else max(look, samples)]
    progress = tqdm(
        total=len(order), desc=f"{name}: opening", unit="row", leave=False, disable=None
    )
    with progress:
        for opened in _open_examples(source, order, seed, exif):
            if isinstance(opened, UserError):
                report.add_broken(opened)
            elif len(report.samples) < samples:
                images = [open_image(image, exif=exif) for image in opened.images]
                report.samples.append(_sample(name, opened, images))
            report.opened += 1
            progress.update()
    for error in _missing_images(source, order, exif):
        report.add_broken(error)
    return report


def _missing_images(source: Source, opened: np.ndarray, exif: bool) -> Iterator[UserError]:
    """Why rows that were not opened cannot be read: their image files are looked for. Other datasets than
    own files leave out such rows when they are opened, or have the images inside."""
    if not isinstance(source, ExampleList):
        return
    for index in np.setdiff1d(np.arange(len(source)), opened):
        for image in source.examples[index].images:
            if isinstance(image, (str, os.PathLike)) and not os.path.isfile(image):
                try:
                    open_image(image, exif=exif)
                except UserError as e:
                    yield e
                    break  # one error a row


def _open_examples(
    source: Source, order: np.ndarray, seed: int, exif: bool
) -> Iterator[Example | UserError]:
    """The examples in this order, or why they cannot be read. Their images are decoded in threads."""

    def open_one(index: int) -> Example | UserError:
        try:
            example = source.example(index, np.random.default_rng([seed, index]))
            for image in example.images:
                open_image(image, exif=exif)
        except UserError as e:
            return e
        return example

    indices = iter(order)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        while chunk := [int(index) for index in itertools.islice(indices, _CHUNK)]:
            yield from threads.map(open_one, chunk)


def _sample(name: str, example: Example, images: Sequence[Image.Image]) -> _Sample:
    """The first image of an example, with the boxes in its texts drawn."""
    from minigpt4_jax.processing.boxes import parse_boxes
    from minigpt4_jax.visualization.boxes import draw_boxes

    image = images[0] if images else Image.new("RGB", (64, 64), "white")
    text = " ".join([*example.questions, *example.answers])
    if images and parse_boxes(text, *image.size):
        image = draw_boxes(image, text)
    lines = [f"{name}:" if len(images) == 1 else f"{name} ({len(images)} images):"]
    if example.system:
        lines.append(f"system: {_shorten(example.system)}")
    for n, answer in enumerate(example.answers):
        if n < len(example.questions):
            lines.append(f"> {_shorten(example.questions[n])}")
        lines.append(_shorten(answer))
    return _Sample(image, "  ".join(lines))


def _shorten(text: str) -> str:
    return textwrap.shorten(text, _MAX_TEXT, placeholder=" ...")


def format_reports(reports: Sequence[DataReport]) -> str:
    """One line per dataset, followed by what is wrong with it."""
    width = max(len(report.name) for report in reports)
    head = (
        f"{'dataset':{width}}  {'rows':>11}  {'left out':>9}  {'turns':>6}  {'opened':>11}  broken"
    )
    lines = [head]
    for r in reports:
        dropped, broken = sum(r.dropped.values()), r.broken.total()
        lines.append(
            f"{r.name:{width}}  {r.rows:11,}  {dropped:9,}  {r.turns:>6}  {r.opened:11,}  {broken:6,}"
        )
        if r.opened < r.rows:
            lines.append(
                f"  opened {r.opened:,} of {r.rows:,} rows; without --look, all are opened"
            )
        lines += [f"  {n:,} {cause}" for cause, n in [*r.dropped.items(), *r.broken.items()]]
        lines += [f"  {n:,} {cause}, by definition" for cause, n in r.left_out.items()]
        lines += [f"  {message}" for message in (r.error, *r.messages.values()) if message]
    return "\n".join(lines)


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and end the process; a UserError is one line on stderr."""
    errors.run(lambda: main(argv))
