"""The generated dataset `shapes`, written to disk: `python -m minigpt4_jax.shapes --out=DIR`.

Each split (train, heldout, heldout_pairs) is a folder in the layout of MiniGPT-4's stage-2 data, with more
files:

    image/000000.png     the images
    captions.jsonl       {"image", "caption"}: short captions, for stage 1
    filter_cap.json      {"annotations": [{"image_id", "caption"}]}: descriptions, for stage 2
    questions.jsonl      {"image", "question", "answer"}
    scenes.jsonl         {"image", "objects" (with box and referring phrase), "background", ...}

`dataset.json` beside the splits records the settings.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from minigpt4_jax import errors
from minigpt4_jax.shapes.drawing import render
from minigpt4_jax.shapes.scene import (
    IMAGE_SIZE,
    SPLITS,
    Scene,
    scene_at,
    scene_from_dict,
    scene_to_dict,
)
from minigpt4_jax.shapes.text import description, questions, references, short_caption
from minigpt4_jax.storage.atomic import atomic_directory, write_error

_CHUNK = 50  # images a task


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The content of dataset.json."""

    seed: int
    image_size: int
    train: int
    heldout: int
    heldout_pairs: int
    stage2: int  # training images with a description, the first ones
    format: int = 1


def write_dataset(
    out_dir: str | os.PathLike[str],
    *,
    train: int = 6000,
    heldout: int = 200,
    heldout_pairs: int = 200,
    seed: int = 0,
    size: int = IMAGE_SIZE,
    stage2: int | None = None,
    workers: int = 1,
    progress: bool = True,
) -> Path:
    """Write the dataset to `out_dir`, atomically; returns its path.

    train, heldout, heldout_pairs: numbers of images. size: their side in pixels. stage2: how many of the
    training images have a description; by default all. Held-out images always have one. workers:
    processes; the files do not depend on their number. If `out_dir` is this dataset already, nothing is
    done. UserError: numbers out of range, something else at `out_dir`, or files cannot be written.
    """
    out = Path(out_dir)
    settings = _Settings(
        seed, size, train, heldout, heldout_pairs, train if stage2 is None else stage2
    )
    _check(settings, workers)
    if _exists(out, settings):
        return out
    text = json.dumps(dataclasses.asdict(settings), indent=1) + "\n"
    try:
        with atomic_directory(out, "dataset.json") as directory:
            _write_splits(directory.path, settings, workers, progress)
            (directory.path / "dataset.json").write_text(text)
    except OSError as e:
        raise write_error(out, e, "nothing was written") from e
    return out


def read_scenes(split_dir: str | os.PathLike[str]) -> list[tuple[Path, Scene]]:
    """(image file, scene) of every image of a split, in order. UserError: scenes.jsonl cannot be read."""
    path = Path(split_dir) / "scenes.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [(path.parent / row["image"], scene_from_dict(row)) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise errors.UserError(
            f"cannot read the scenes in {path}: {e}; write the dataset again"
        ) from e


def _check(settings: _Settings, workers: int) -> None:
    for name, value, low in (
        ("train", settings.train, 0),
        ("heldout", settings.heldout, 0),
        ("heldout_pairs", settings.heldout_pairs, 0),
        ("seed", settings.seed, 0),
        ("stage2", settings.stage2, 0),
        ("size", settings.image_size, 56),
        ("workers", workers, 1),
    ):
        if value < low:
            raise errors.UserError(f"{name} is {value}: expected {low} or more")
    if settings.stage2 > settings.train:
        raise errors.UserError(
            f"stage2 is {settings.stage2}: expected at most train, {settings.train}"
        )


def _exists(out: Path, settings: _Settings) -> bool:
    """Whether `out` is this dataset already. UserError: it is something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / "dataset.json").read_text())
    except (OSError, ValueError):
        raise errors.UserError(
            f"{out} exists and is not a dataset: name another directory"
        ) from None
    if found != dataclasses.asdict(settings):
        raise errors.UserError(
            f"{out} holds a dataset made with other settings ({found}): "
            "delete it or name another directory"
        )
    return True


def _write_splits(folder: Path, settings: _Settings, workers: int, progress: bool) -> None:
    tasks = []
    for split in SPLITS:
        (folder / split / "image").mkdir(parents=True)
        total = getattr(settings, split)
        described = settings.stage2 if split == "train" else total
        for start in range(0, total, _CHUNK):
            tasks.append((folder, split, start, min(start + _CHUNK, total), described, settings))
    total = settings.train + settings.heldout + settings.heldout_pairs
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    with tqdm(total=total, desc="shapes", unit="image", disable=not progress) as bar:
        for task, found in zip(tasks, _run(tasks, workers), strict=True):
            rows[task[1]] += found
            bar.update(len(found))
    for split in SPLITS:
        _write_texts(folder / split, rows[split])


def _run(tasks: list[tuple[Any, ...]], workers: int) -> Iterator[list[dict[str, Any]]]:
    if workers == 1:
        yield from map(_write_images, tasks)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        yield from pool.map(_write_images, tasks)


def _write_images(task: tuple[Path, str, int, int, int, _Settings]) -> list[dict[str, Any]]:
    """Draw images start to stop - 1 of a split into its folder; returns the texts of each."""
    folder, split, start, stop, num_described, settings = task
    rows = []
    for index in range(start, stop):
        scene = scene_at(settings.seed, index, split, image_size=settings.image_size)
        rng = np.random.default_rng([settings.seed, SPLITS.index(split), index, 1])
        image_id = f"{index:06d}"
        name = f"image/{image_id}.png"
        Image.fromarray(render(scene)).save(folder / split / name, compress_level=1)
        values = scene_to_dict(scene)
        for thing, (phrase, _) in zip(values["objects"], references(scene), strict=True):
            thing["phrase"] = phrase
        stage2_text = description(scene, rng)
        rows.append(
            {
                "caption": {"image": name, "caption": short_caption(scene)},
                "description": {"image_id": image_id, "caption": stage2_text}
                if index < num_described
                else None,
                "questions": [
                    {"image": name, "question": q, "answer": a} for q, a in questions(scene, rng)
                ],
                "scene": {"image": name, **values},
            }
        )
    return rows


def _write_texts(folder: Path, rows: list[dict[str, Any]]) -> None:
    _write_lines(folder / "captions.jsonl", (row["caption"] for row in rows))
    _write_lines(folder / "questions.jsonl", (pair for row in rows for pair in row["questions"]))
    _write_lines(folder / "scenes.jsonl", (row["scene"] for row in rows))
    annotations = [row["description"] for row in rows if row["description"]]
    (folder / "filter_cap.json").write_text(
        json.dumps({"annotations": annotations}, indent=1) + "\n"
    )


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minigpt4_jax.shapes",
        description="Write the generated dataset `shapes`.",
    )
    parser.add_argument("--out", required=True, help="directory to write; must not exist")
    parser.add_argument("--train", type=int, default=6000, help="training images")
    parser.add_argument("--heldout", type=int, default=200, help="images of scenes not in training")
    parser.add_argument(
        "--heldout_pairs",
        type=int,
        default=200,
        help="images with colour-shape pairs not in training",
    )
    parser.add_argument(
        "--stage2", type=int, help="training images with a detailed description (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=IMAGE_SIZE, help="side of the images in pixels")
    parser.add_argument(
        "--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes"
    )
    args = parser.parse_args()
    out = write_dataset(
        args.out,
        train=args.train,
        heldout=args.heldout,
        heldout_pairs=args.heldout_pairs,
        stage2=args.stage2,
        seed=args.seed,
        size=args.size,
        workers=args.workers,
    )
    print(f"dataset in {out}")
