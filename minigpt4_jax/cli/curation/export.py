"""minigpt4 curate export --input=FILE --out=DIR: a dataset for training, with a data card.

The directory appears complete or not at all. It has README.md and card.json (counts, prompts, models, seeds,
removed rows) and SHA256SUMS.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from minigpt4_jax.curation.card import (
    CARD_FILE,
    HASHES_FILE,
    README_FILE,
    USAGE,
    hashes,
    make_card,
    readme,
)
from minigpt4_jax.curation.decisions import Decisions
from minigpt4_jax.curation.export import FORMATS, Files, read_rows_with_images
from minigpt4_jax.curation.objects import read_vocabulary
from minigpt4_jax.curation.rows import Row, decisions_path, file_hash, read_history, read_rows
from minigpt4_jax.curation.statistics import image_key, statistics
from minigpt4_jax.errors import Parser, UserError
from minigpt4_jax.storage.atomic import atomic_directory, write_error


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = Parser(
        prog="python -m minigpt4_jax.curate export",
        description="Write rows as a dataset for training, with a data card.",
    )
    p.add_argument("--input", required=True, type=Path, metavar="FILE", help="rows with captions")
    p.add_argument("--out", required=True, type=Path, metavar="DIR", help="directory to write")
    p.add_argument("--format", choices=tuple(FORMATS), default="minigpt4", help="minigpt4: filter_cap.json "
                   "and image/ (default); jsonl; webdataset; parquet")  # fmt: skip
    p.add_argument("--decisions", type=Path, metavar="FILE", help="of curate review")
    p.add_argument(
        "--no-decisions", action="store_true", help="export without those beside the input"
    )
    p.add_argument("--only-accepted", action="store_true", help="leave rows without a decision out")
    p.add_argument(
        "--max-per-image", type=int, metavar="N", help="of several samples, the first N (all)"
    )
    p.add_argument("--shard-rows", type=int, default=1000, help="of a tar or Parquet file (1000)")
    p.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    p.add_argument("--no-exif", dest="exif", action="store_false",
                   help="do not turn images upright as their EXIF orientation says")  # fmt: skip
    return p.parse_args(argv)


def _check(args: argparse.Namespace) -> None:
    if args.shard_rows < 1 or (args.max_per_image is not None and args.max_per_image < 1):
        raise UserError("--shard-rows and --max-per-image must be 1 or more")
    if args.decisions and args.no_decisions:
        raise UserError("--decisions and --no-decisions contradict each other; choose one")
    beside = decisions_path(args.input)
    if not args.decisions and not args.no_decisions and beside.exists():
        raise UserError(
            f"{beside} has decisions about these rows: pass --decisions={beside}, or --no-decisions"
        )
    if args.decisions and not args.decisions.is_file():
        raise UserError(f"--decisions={args.decisions}: there is no such file")
    if args.only_accepted and not args.decisions:
        raise UserError("--only-accepted needs --decisions=FILE")
    if args.out.exists():
        if not (args.out / CARD_FILE).is_file():
            raise UserError(f"--out={args.out}: exists, and is no earlier export; choose another")
        if not args.overwrite:
            raise UserError(f"--out={args.out}: exists; choose another, or pass --overwrite")


def select(args: argparse.Namespace, rows: Sequence[Row]) -> tuple[list[Row], Counter[str]]:
    """(rows to export, how many of the others there are by cause)"""
    kept, removed = [row for row in rows if row.get("caption", "").strip()], list[Row]()
    causes = Counter({"not described": len(rows) - len(kept)})
    if args.decisions:
        kept, removed = Decisions(args.decisions).apply(kept, only_accepted=args.only_accepted)
    causes.update(row["cause"] for row in removed)
    if args.max_per_image:
        seen: Counter[str] = Counter()
        chosen = []
        for row in kept:
            seen[image_key(row)] += 1
            if seen[image_key(row)] <= args.max_per_image:
                chosen.append(row)
        causes["more samples of an image"] = len(kept) - len(chosen)
        kept = chosen
    if not kept:
        raise UserError(f"--input={args.input}: no row is left to export ({dict(+causes)})")
    return kept, +causes


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    _check(args)
    rows = read_rows(args.input)
    kept, causes = select(args, rows)
    files = Files()
    try:
        with (
            atomic_directory(args.out, README_FILE) as directory,
            tqdm(desc="exporting", total=len(kept), unit="row", leave=False, disable=None) as bar,
        ):
            exported = read_rows_with_images(
                kept, args.input.parent, exif=args.exif, progress=bar.update
            )
            FORMATS[args.format](exported, directory.path, files, args.shard_rows)
            _write_card(args, directory.path, kept, causes, files)
    except OSError as e:
        raise write_error(args.out, e) from None
    encoded = f", {files.num_encoded} of them encoded as JPEG" if files.num_encoded else ""
    print(f"{len(kept)} rows with {files.num_images} images{encoded}: {args.out}")
    for cause, count in causes.most_common():
        print(f"  {count:6,} left out: {cause}")
    print(USAGE[args.format].replace("DIR", str(args.out)))
    return 0


def _write_card(
    args: argparse.Namespace, folder: Path, rows: Sequence[Row], causes: Counter[str], files: Files
) -> None:
    history = read_history(args.input)
    last: Row = {
        "command": "export", "format": args.format, "only_accepted": args.only_accepted,
        "max_per_image": args.max_per_image, "exif": args.exif,
        "input": {"file": args.input.name, "sha256": file_hash(args.input)},
    }  # fmt: skip
    if args.decisions:
        last["decisions"] = {
            "file": args.decisions.name,
            "sha256": file_hash(args.decisions),
            **Decisions(args.decisions).counts(read_rows(args.input)),
        }
    counts = {
        "rows": len(rows), "images": files.num_images, "images encoded as JPEG": files.num_encoded
    }  # fmt: skip
    numbers = statistics(rows, read_vocabulary(None))
    card = make_card(args.format, counts, causes, numbers, [*history, last])
    files.write(folder, CARD_FILE, (json.dumps(card, indent=1) + "\n").encode())
    files.write(folder, README_FILE, readme(card).encode("utf-8", "replace"))
    (folder / HASHES_FILE).write_text(hashes(files.hashes))
