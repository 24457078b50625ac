"""Throughput of the data pipeline, by stage and beside a PyTorch DataLoader.

    python benchmarks/data.py [--images=512] [--size=224] [--workers=0] [--rounds=3]

Both sides do the same work: read a JPEG, decode, resize (bicubic), normalize, tokenize, batch. Here pixels
are normalized on the device, whose time is counted, as it uses the same cores. Prints images/s of each stage
on one core; then of the whole pipelines and of Pillow alone (open, decode and resize in one process, which
decides the pixels and which both must do), in turns, as medians of the rounds, and the ratios.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from common import TEST_TOKENIZER, argument_parser, seconds
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from minigpt4_jax.config import IMAGE_MEAN, IMAGE_STD, ModelConfig, VisionConfig
from minigpt4_jax.data.batching import pad_sequences, tokenize_example
from minigpt4_jax.data.config import DataConfig
from minigpt4_jax.data.dataset import ExampleList
from minigpt4_jax.data.json_records import read_sources
from minigpt4_jax.data.loader import make_loader
from minigpt4_jax.data.mixture import MixtureComponent
from minigpt4_jax.errors import run
from minigpt4_jax.models.minigpt import Batch, normalize_pixels
from minigpt4_jax.processing import images
from minigpt4_jax.processing.tokenizer import load_tokenizer

BATCH = 32
CAPTION = "a photo of a table with a red cup, two plates and a window behind it number {}"
MEAN = torch.tensor(IMAGE_MEAN)[:, None, None]
STD = torch.tensor(IMAGE_STD)[:, None, None]


def write_photos(folder: Path, count: int) -> list[Path]:
    """JPEG files of about the size and detail of COCO's: 640 x 480, quality 90; and rows.jsonl."""
    rng = np.random.default_rng(0)
    rows = []
    for n in range(count):
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)
        noise = rng.normal(0, 12, (480, 640, 3))
        pixels = np.clip(np.asarray(smooth) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.jpg", quality=90)
        rows.append({"image": f"{n}.jpg", "caption": CAPTION.format(n)})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [folder / row["image"] for row in rows]


class TorchDataset(Dataset[Any]):
    """The same rows, with pixels as torchvision's Resize, ToTensor and Normalize compute them."""

    def __init__(self, examples: Any, tokenizer: Any, config: ModelConfig):
        self.examples, self.tokenizer, self.config = examples, tokenizer, config

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        example = self.examples[index]
        size = self.config.vision.image_size
        with Image.open(example.images[0]) as opened:
            small = opened.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous().div(255)
        row = tokenize_example(example, self.tokenizer, self.config)
        return pixels.sub_(MEAN).div_(STD), row

    def collate(self, rows: list[Any]) -> tuple[torch.Tensor, Any]:
        return torch.stack([pixels for pixels, _ in rows]), pad_sequences([r for _, r in rows], 0)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--workers", type=int, default=0, help="worker processes of both sides")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(TEST_TOKENIZER)
    config = ModelConfig(vision=VisionConfig(image_size=args.size))
    with tempfile.TemporaryDirectory() as folder:
        paths = write_photos(Path(folder), args.images)
        examples = read_sources(Path(folder) / "rows.jsonl")
        measure_stages(paths, examples, tokenizer, config)
        measure_pipelines(examples, tokenizer, config, args)


_normalize = jax.jit(normalize_pixels)


def normalize_on_device(pixels: Any) -> None:
    """uint8 [..., S, S, 3] -> float32, normalized, as the model does first."""
    _normalize(pixels).block_until_ready()


def measure_stages(paths: list[Path], examples: Any, tokenizer: Any, config: ModelConfig) -> None:
    count, size = len(paths), config.vision.image_size
    for path in paths:
        path.read_bytes()  # into the page cache
    decoded: list[Any] = []
    resized: list[Any] = []
    rows: list[Any] = []
    starts = range(0, count, BATCH)

    def batch() -> None:
        for start in starts:
            np.stack(resized[start : start + BATCH])
            pad_sequences(rows[start : start + BATCH], 0)

    def normalize() -> None:
        for start in starts:
            normalize_on_device(np.stack(resized[start : start + BATCH]))

    stages: dict[str, Callable[[], object]] = {
        "read": lambda: [path.read_bytes() for path in paths],
        "read and decode": lambda: decoded.extend(images.open_image(path) for path in paths),
        "resize": lambda: resized.extend(images.resize(image, size) for image in decoded),
        "tokenize": lambda: rows.extend(tokenize_example(e, tokenizer, config) for e in examples),
        "batch": batch,
        "normalize": normalize,
    }
    normalize_on_device(np.zeros((BATCH, size, size, 3), np.uint8))  # compile
    for name, stage in stages.items():
        print(f"{name:16} {count / seconds(stage):10,.0f} images/s", flush=True)


def measure_pipelines(
    examples: Any, tokenizer: Any, config: ModelConfig, args: argparse.Namespace
) -> None:
    num_batches = len(examples) // BATCH
    paths = [example.images[0] for example in examples]

    def pillow() -> float:
        return len(paths) / seconds(lambda: [images.load_pixels(p, args.size) for p in paths])

    def ours() -> float:
        component = MixtureComponent("", ExampleList("", examples))
        data = DataConfig(workers=args.workers, threads=1, timeout=0.0, max_broken=0.0)
        loader = make_loader([component], data, config, tokenizer, batch_size=BATCH)
        rate = images_per_second(iter(loader), num_batches)
        loader.close()
        return rate

    def pytorch() -> float:
        dataset = TorchDataset(examples, tokenizer, config)
        loader = DataLoader(
            dataset, BATCH, sampler=torch.randperm(len(dataset)).repeat(2).tolist(),
            num_workers=args.workers, collate_fn=dataset.collate,
        )  # fmt: skip
        return images_per_second(iter(loader), num_batches)

    sides = {"Pillow alone": pillow, "minigpt4_jax": ours, "PyTorch": pytorch}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, side in sides.items():
            rates[name].append(side())
    medians = {name: float(np.median(values)) for name, values in rates.items()}
    for name, median in medians.items():
        values = ", ".join(f"{rate:.0f}" for rate in rates[name])
        print(f"{name:16} {median:10,.0f} images/s  ({values})")
    median = medians["minigpt4_jax"]
    print(
        f"{args.workers} worker processes: {median / medians['PyTorch']:.2f} of PyTorch, "
        f"{median / medians['Pillow alone']:.2f} of Pillow"
    )


def images_per_second(batches: Iterator[Any], count: int) -> float:
    """Rate after the first batch, which starts threads or processes."""

    def take() -> None:
        batch = next(batches)
        if isinstance(batch, Batch):  # PyTorch's batch is normalized already
            normalize_on_device(batch.pixels)

    take()
    start = time.perf_counter()
    for _ in range(count - 1):
        take()
    return (count - 1) * BATCH / (time.perf_counter() - start)


if __name__ == "__main__":
    run(main)
