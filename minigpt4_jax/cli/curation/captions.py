"""minigpt4 curate captions --input=LIST.json --output=LIST.tsv: a caption list as a table for img2dataset.

The input may have gigabytes: it is read in pieces.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from minigpt4_jax.curation.caption_lists import WRITERS, Counts, read_list, usable_rows
from minigpt4_jax.errors import Parser, UserError
from minigpt4_jax.storage.atomic import atomic_file, write_error

# as dataset/README_1_STAGE.md of the original; its two scripts differ in nothing else
DOWNLOAD = (
    "img2dataset --url_list={table} --input_format={kind} --url_col=url --caption_col=caption "
    "--output_format=webdataset --output_folder={folder} --image_size=224 --processes_count=16 "
    "--thread_count=128"
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = Parser(
        prog="python -m minigpt4_jax.curate captions",
        description="Convert a list of {url, caption} to a table for img2dataset.",
    )
    p.add_argument("--input", required=True, type=Path, metavar="FILE",
                   help="such as ccs_synthetic_filtered_large.json: a list or JSONL")  # fmt: skip
    p.add_argument("--output", required=True, type=Path, metavar="FILE", help=".tsv or .parquet")
    p.add_argument("--overwrite", action="store_true", help="replace an existing file")
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    suffix = args.output.suffix.lower()
    if suffix not in WRITERS:
        raise UserError(
            f"--output={args.output}: expected a file name that ends in .tsv or .parquet"
        )
    if not args.input.is_file():
        raise UserError(f"--input={args.input}: there is no such file")
    if not args.output.parent.is_dir():
        raise UserError(f"--output={args.output}: there is no directory {args.output.parent}")
    if args.output.exists() and not args.overwrite:
        raise UserError(f"--output={args.output}: exists; choose another, or pass --overwrite")
    counts = Counts()
    size = args.input.stat().st_size
    with tqdm(total=size, unit="B", unit_scale=True, leave=False, disable=None) as bar:

        def progress(position: int) -> None:
            bar.update(position - bar.n)

        try:
            with atomic_file(args.output) as temporary:
                WRITERS[suffix](usable_rows(read_list(args.input, progress), counts), temporary)
                if not counts.written:
                    raise UserError(f"--input={args.input}: has no row with a URL and a caption")
        except OSError as e:
            raise write_error(args.output, e) from None
    print(f"{counts.written:,} of {counts.rows:,} rows: {args.output}")
    for cause, count in counts.dropped.most_common():
        print(f"  {count:,} {cause}")
    print("download the images with")
    print("  " + DOWNLOAD.format(table=args.output, kind=suffix[1:], folder=args.output.stem))
    return 0
