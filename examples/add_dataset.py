"""Add a dataset in one function, look at it, and train on it.

python examples/add_dataset.py birds --steps 100

birds/ holds labels.csv, with the columns "file" and "label", and the images it names.
"""

import argparse
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import minigpt4_jax
from configs.finetune import get_config
from minigpt4_jax.data.datasets import DATASETS
from minigpt4_jax.data.datasets.base import DatasetRow, Layout, Unused
from minigpt4_jax.data.datasets.captions import make_described


def read_labels(files: Sequence[Path]) -> Iterator[DatasetRow | Unused]:
    """One row for each line of labels.csv; a row that cannot be used says why and is counted."""
    for file in files:
        with file.open(newline="") as lines:
            for line in csv.DictReader(lines):
                label = line["label"].strip()
                yield DatasetRow(line["file"], (label,)) if label else Unused("without a label")


# Its files below the dataset's folder, the reader, what becomes of a row, and where the images are.
DATASETS["birds"] = Layout(("labels.csv",), read_labels, make_described, images="")

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("folder")
parser.add_argument("--model", default="quickstart/stage2/model")
parser.add_argument("--workdir", default="runs/birds")
parser.add_argument("--steps", type=int, default=100)
args = parser.parse_args()

config = get_config()
config.model = args.model
config.data.mix = {"birds": {"path": args.folder}}
config.data.prompts = ("<Img><ImageHere></Img> What bird is this?",)
config.steps = args.steps

print(minigpt4_jax.train(config, args.workdir).model)
