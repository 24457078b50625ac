"""Build the TFDS datasets of data.tfds_builders.

    python -m minigpt4_jax.data.tfds_build shapes [--data_dir=DIR]
    python -m minigpt4_jax.data.tfds_build cc_sbu_align --manual_dir=SET     # SET/filter_cap.json, SET/image/

The command `tfds build` does the same, but needs TensorFlow, Apache Beam and mlcroissant (4.9.10).
"""

import os
from collections.abc import Sequence
from pathlib import Path

from minigpt4_jax.errors import Parser, UserError, run

DATASETS = ("shapes", "cc_sbu_align")


def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(
        prog="python -m minigpt4_jax.data.tfds_build",
        description="Build TFDS datasets in array_record, for reader=tfds.",
    )
    p.add_argument("datasets", nargs="+", choices=DATASETS, metavar="DATASET",
                   help=" or ".join(DATASETS))  # fmt: skip
    p.add_argument("--data_dir", help="where TFDS keeps datasets (its default)")
    p.add_argument("--manual_dir", type=Path, metavar="SET",
                   help="the files of cc_sbu_align: filter_cap.json and image/")  # fmt: skip
    p.add_argument(
        "--max_examples_per_split", type=int, metavar="N", help="only this many, for a trial"
    )
    args = p.parse_args(argv)
    if "cc_sbu_align" in args.datasets and not args.manual_dir:
        raise UserError("cc_sbu_align: name the folder with filter_cap.json as --manual_dir=SET")
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise UserError("building TFDS datasets needs `pip install 'minigpt4_jax[tfds]'`") from None
    from minigpt4_jax.data import tfds_builders  # noqa: F401  registers them

    options = {"max_examples_per_split": args.max_examples_per_split}
    if args.manual_dir:
        options["manual_dir"] = os.fspath(args.manual_dir)
    for name in args.datasets:
        builder = tfds.builder(name, data_dir=args.data_dir, file_format="array_record")
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(**options))
        counts = ", ".join(
            f"{split} {info.num_examples}" for split, info in builder.info.splits.items()
        )
        print(f"{name}: {counts}; in {builder.data_path}")
    return 0


if __name__ == "__main__":
    run(main)
