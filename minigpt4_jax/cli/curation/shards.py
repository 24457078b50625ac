"""minigpt4 curate shards DIR: check the shards that img2dataset downloaded.

Sums up its statistics, names missing and unfinished shards, and opens the images as `data check` does. Exit
code 1 if something is missing or broken.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from minigpt4_jax.cli import check_data
from minigpt4_jax.curation.downloads import Downloads, read_downloads
from minigpt4_jax.data.webdataset import open_shards
from minigpt4_jax.errors import Parser, UserError

_SHOWN = 10  # missing shards and causes


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = Parser(
        prog="python -m minigpt4_jax.curate shards",
        description="Check the shards that img2dataset downloaded.",
    )
    p.add_argument("folder", type=Path, metavar="DIR", help="img2dataset's output folder")
    p.add_argument("--expected", type=int, metavar="N",
                   help="number of shards (the original: 1,256 and 10,489)")  # fmt: skip
    p.add_argument("--look", type=int, metavar="N", help="random rows to open (all)")
    p.add_argument("--samples", type=int, default=8, help="rows on the sheet (8)")
    p.add_argument("--sheet", type=Path, default=Path("shards.png"), metavar="FILE.png",
                   help="file for the samples (shards.png)")  # fmt: skip
    p.add_argument("--seed", type=int, default=0, help="of the rows that are opened (0)")
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if (
        args.samples < 0
        or (args.look or 0) < 0
        or (args.expected is not None and args.expected < 1)
    ):
        raise UserError("--samples, --look and --expected must be positive")
    if not args.folder.is_dir():
        raise UserError(f"{args.folder}: there is no such directory")
    found = read_downloads(args.folder, args.expected)
    print(_summary(found))
    # a damaged shard is reported, not an error
    if args.samples:
        check_data.check_sheet(args.sheet)
    open_source = partial(open_shards, args.folder.name, args.folder, max_broken=1.0)
    report = check_data.check(args.folder.name, open_source, args.look, args.samples, args.seed)
    print(check_data.format_reports([report]))
    check_data.write_sheet([report], args.sheet)
    damaged = sum(report.dropped.values())
    return int(bool(report.failed or found.missing or found.unfinished or damaged))


def _summary(found: Downloads) -> str:
    lines = [f"{found.shards:,} shards, {len(found.missing):,} missing"]
    if found.rows:
        share = found.successes / found.rows
        lines.append(f"{found.successes:,} of {found.rows:,} images downloaded ({share:.1%})")
        lines += [f"  {count:,} {cause}" for cause, count in found.causes.most_common(_SHOWN)]
    if found.missing:
        lines.append(f"missing: {_first([f'{number:05}.tar' for number in found.missing])}")
    if found.unfinished:
        lines.append(
            f"{len(found.unfinished)} shards without statistics, of a download that runs or was "
            f"interrupted: {_first(found.unfinished)}; img2dataset makes them anew when it is started again"
        )
    return "\n".join(lines)


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
