"""minigpt4 curate check --input=FILE --output=FILE: statistics, near duplicates, a sheet of samples.

Near-duplicate images and texts go to OUTPUT.removed.jsonl with their cause; OUTPUT.report.json has the
numbers before and after; OUTPUT.png shows samples.
"""

import argparse
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from minigpt4_jax.curation import duplicates
from minigpt4_jax.curation.objects import Vocabulary, read_vocabulary
from minigpt4_jax.curation.references import add_references
from minigpt4_jax.curation.rows import (
    Row,
    check_output,
    image_of,
    moved,
    read_rows,
    removed_path,
    report_path,
    write_rows,
    write_settings,
)
from minigpt4_jax.curation.statistics import confirmable, image_key, row_objects, statistics, table
from minigpt4_jax.errors import Parser, UserError
from minigpt4_jax.processing.images import open_image
from minigpt4_jax.storage.atomic import write_error, write_text_atomically

NOT_DESCRIBED = "not described"
UNREADABLE = "image that cannot be read"
NEAR_IMAGE, NEAR_TEXT = "near-duplicate image", "near-duplicate text"
UNCONFIRMED = "unconfirmed objects"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = Parser(
        prog="python -m minigpt4_jax.curate check",
        description="Count what a set of descriptions is like, remove near duplicates, show samples.",
    )
    p.add_argument("--input", required=True, type=Path, metavar="FILE", help="rows with captions")
    p.add_argument("--output", required=True, type=Path, metavar="FILE", help="rows that are kept")
    p.add_argument("--before", type=Path, metavar="FILE", help="rows to compare the numbers with, for "
                   "instance the output of describe (--input)")  # fmt: skip
    p.add_argument("--references", type=Path, metavar="FILE", help='JSONL of {"id", "references": '
                   'captions, "objects": names that a detector found}')  # fmt: skip
    p.add_argument("--objects", type=Path, metavar="FILE",
                   help="objects to look for, one a line with synonyms (COCO's classes)")  # fmt: skip
    p.add_argument("--max-unconfirmed", type=int, metavar="N",
                   help="remove texts with more unconfirmed objects (none)")  # fmt: skip
    p.add_argument("--image-distance", type=int, default=duplicates.IMAGE_DISTANCE, metavar="BITS",
                   help="of 64 that near duplicates may differ in "
                   f"({duplicates.IMAGE_DISTANCE}); -1: off")  # fmt: skip
    p.add_argument("--text-similarity", type=float, default=duplicates.TEXT_SIMILARITY, metavar="SHARE",
                   help="of word triples that near duplicates have in common "
                   f"({duplicates.TEXT_SIMILARITY}); 2: off")  # fmt: skip
    p.add_argument("--samples", type=int, default=24, help="rows on the sheet (24)")
    p.add_argument("--seed", type=int, default=0, help="of the samples (0)")
    p.add_argument(
        "--no-exif", dest="exif", action="store_false", help="use images as they are stored"
    )
    return p.parse_args(argv)


def _check(args: argparse.Namespace) -> None:
    if not -1 <= args.image_distance <= 32:
        raise UserError(f"--image-distance={args.image_distance}: expected 0 to 32, or -1 for off")
    if not 0 < args.text_similarity <= 2:
        raise UserError(
            f"--text-similarity={args.text_similarity:g}: expected 0 to 1, or 2 for off"
        )
    if args.samples < 0 or (args.max_unconfirmed or 0) < 0:
        raise UserError("--samples and --max-unconfirmed must be 0 or more")
    if args.input.resolve() == args.output.resolve():
        raise UserError("--input and --output are the same file; choose another --output")


class _Selection:
    """Rows that are kept, and those removed with their cause."""

    def __init__(self, rows: Sequence[Row]):
        self.kept = list(rows)
        self.removed: list[Row] = []

    def remove(self, causes: dict[int, dict[str, Any]]) -> None:
        """causes: index of a kept row -> what is written about its removal."""
        self.removed += [{**self.kept[i], **cause} for i, cause in sorted(causes.items())]
        self.kept = [row for i, row in enumerate(self.kept) if i not in causes]


def _remove_images(selection: _Selection, folder: Path, distance: int, exif: bool) -> None:
    """Rows whose image cannot be read, or nearly equals an earlier one."""
    first_rows: dict[str, int] = {}
    for i, row in enumerate(selection.kept):
        first_rows.setdefault(image_key(row), i)
    keys = list(first_rows)
    sources = [image_of(selection.kept[i], folder, f"row {i + 1}") for i in first_rows.values()]
    prints: list[duplicates.Fingerprint | None] = []
    faults: dict[str, dict[str, Any]] = {}
    progress = tqdm(
        duplicates.fingerprints(sources, exif=exif), "images", len(sources), unit="image", leave=False,
        disable=None,
    )  # fmt: skip
    for key, value in zip(keys, progress, strict=True):
        if isinstance(value, UserError):
            faults[key] = {"cause": UNREADABLE, "error": str(value)}
            prints.append(None)
        else:
            prints.append(value)
    for i, other in duplicates.image_duplicates(prints, distance).items():
        original = selection.kept[first_rows[keys[other]]]
        faults[keys[i]] = {"cause": NEAR_IMAGE, "duplicate_of": original["id"]}
    selection.remove(
        {
            i: faults[key]
            for i, row in enumerate(selection.kept)
            if (key := image_key(row)) in faults
        }
    )


def _remove_texts(selection: _Selection, similarity: float) -> None:
    texts = [row["caption"] for row in selection.kept]
    with tqdm(desc="texts", total=len(texts), unit="text", leave=False, disable=None) as bar:
        found = duplicates.text_duplicates(texts, similarity, bar.update)
    selection.remove(
        {
            i: {"cause": NEAR_TEXT, "duplicate_of": selection.kept[other]["id"]}
            for i, other in found.items()
        }
    )


def _mark_objects(selection: _Selection, vocabulary: Vocabulary, limit: int | None) -> None:
    """Name the unconfirmed objects of each row that can be judged; remove rows with more than `limit`."""
    causes: dict[int, dict[str, Any]] = {}
    for i, row in enumerate(selection.kept):
        if confirmable(row):
            _, missing = row_objects(row, vocabulary)
            selection.kept[i] = {**row, "unconfirmed": missing}
            if limit is not None and len(missing) > limit:
                causes[i] = {"cause": UNCONFIRMED}
    selection.remove(causes)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    _check(args)
    check_output(args.output, "check", args.input)
    vocabulary = read_vocabulary(args.objects)
    rows = read_rows(args.input)
    before = read_rows(args.before) if args.before else rows
    if args.references:
        rows, before = (
            add_references(args.references, rows),
            add_references(args.references, before),
        )
    selection = _Selection(rows)
    selection.remove(
        {
            i: {"cause": NOT_DESCRIBED}
            for i, row in enumerate(rows)
            if not row.get("caption", "").strip()
        }
    )
    if args.image_distance >= 0:
        _remove_images(selection, args.input.parent, args.image_distance, args.exif)
    if args.text_similarity <= 1:
        _remove_texts(selection, args.text_similarity)
    _mark_objects(selection, vocabulary, args.max_unconfirmed)
    causes = Counter(row["cause"] for row in selection.removed)
    report = {
        "before": statistics(before, vocabulary),
        "after": statistics(selection.kept, vocabulary),
        "removed": dict(causes.most_common()),
    }
    _write(args, selection, report)
    print(table(report["before"], report["after"]))
    print(f"{len(selection.kept)} of {len(rows)} rows kept: {args.output}")
    for cause, count in causes.most_common():
        print(f"  {count:6,} removed: {cause}")
    if samples := _sheet(args, selection.kept):
        print(f"samples: {samples}")
    return 0


def _write(args: argparse.Namespace, selection: _Selection, report: dict[str, Any]) -> None:
    source, target = args.input.parent, args.output.parent
    write_rows(removed_path(args.output), (moved(row, source, target) for row in selection.removed))
    try:
        write_text_atomically(report_path(args.output), json.dumps(report, indent=1) + "\n")
    except OSError as e:
        raise write_error(report_path(args.output), e) from None
    settings = {
        "image_distance": args.image_distance, "text_similarity": args.text_similarity,
        "max_unconfirmed": args.max_unconfirmed, "kept": len(selection.kept), "removed": report["removed"],
        "statistics": report["after"],
    }  # fmt: skip
    write_settings(args.output, "check", settings, args.input)
    write_rows(args.output, (moved(row, source, target) for row in selection.kept))


def _sheet(args: argparse.Namespace, rows: Sequence[Row]) -> Path | None:
    """Write the sheet of samples; None if there is nothing to show."""
    from minigpt4_jax.visualization.plots import contact_sheet  # matplotlib

    images: list[Image.Image] = []
    texts: list[str] = []
    for i in random.Random(args.seed).sample(range(len(rows)), len(rows)):
        if len(images) == args.samples:
            break
        try:
            source = image_of(rows[i], args.input.parent, f"row {i + 1}")
            images.append(open_image(source, exif=args.exif))
        except UserError as e:
            print(f"not on the sheet: {e}")
            continue
        texts.append(f"{rows[i]['id']}: {rows[i]['caption']}")
    if not images:
        return None
    return contact_sheet(images, texts, [None] * len(images), args.output.with_suffix(".png"))
