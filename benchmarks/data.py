"""Images a second of the data pipeline: by stage on one core, and whole beside a PyTorch DataLoader
doing the same work: read a JPEG, decode, resize bicubic to 224, normalize (here on the device, whose time
counts: the same cores), tokenize, make a batch.

    python benchmarks/data.py [--images=512] [--size=224] [--workers=0]
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import torch
from helpers.paths import TOKENIZER
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from minigpt4_jax.config import IMAGE_MEAN, IMAGE_STD, ModelConfig, VisionConfig
from minigpt4_jax.data.batching import pad_sequences, tokenize_example
from minigpt4_jax.data.config import DataConfig
from minigpt4_jax.data.dataset import ExampleList
from minigpt4_jax.data.json_records import read_sources
from minigpt4_jax.data.loader import make_loader
from minigpt4_jax.data.mixture import MixtureComponent
from minigpt4_jax.models.minigpt import Batch, normalize_pixels
from minigpt4_jax.processing import images
from minigpt4_jax.processing.tokenizer import load_tokenizer

BATCH = 32
CAPTION = "a photo of a table with a red cup, two plates and a window behind it number {}"
MEAN, STD = (
    torch.tensor(IMAGE_MEAN)[:, None, None],
    torch.tensor(IMAGE_STD)[:, None, None],
)


def write_photos(folder: Path, count: int) -> list[Path]:
    """JPEG files of about the size and detail of COCO's: 640 x 480, quality 90."""
    rng = np.random.default_rng(0)
    rows = []
    for n in range(count):
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)
        noise = rng.normal(0, 12, (480, 640, 3))
        pixels = np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.jpg", quality=90)
        rows.append({"image": f"{n}.jpg", "caption": CAPTION.format(n)})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [folder / row["image"] for row in rows]


class Peer(Dataset):
    """The same rows as torchvision's Resize, ToTensor and Normalize make them."""

    def __init__(self, examples, tokenizer, config):
        self.examples, self.tokenizer, self.config = examples, tokenizer, config

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        example = self.examples[index]
        size = self.config.vision.image_size
        with Image.open(example.images[0]) as opened:
            small = opened.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous().div(255)
        row = tokenize_example(example, self.tokenizer, self.config)
        return pixels.sub_(MEAN).div_(STD), row

    def collate(self, rows):
        return torch.stack([pixels for pixels, _ in rows]), pad_sequences([r for _, r in rows], 0)


def rate(count: int, run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return count / (time.perf_counter() - begun)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--images", type=int, default=512)
    p.add_argument("--size", type=int, default=224)
    p.add_argument("--workers", type=int, default=0, help="processes, of both")
    p.add_argument("--rounds", type=int, default=3, help="of the whole, ours and the peer in turn")
    a = p.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(TOKENIZER)
    config = ModelConfig(vision=VisionConfig(image_size=a.size))
    with tempfile.TemporaryDirectory() as folder:
        paths = write_photos(Path(folder), a.images)
        examples = read_sources(Path(folder) / "rows.jsonl")
        stages(paths, examples, tokenizer, config, a.size)
        whole(examples, tokenizer, config, a)


_normalized = jax.jit(normalize_pixels)


def to_device(pixels: np.ndarray) -> None:
    """uint8 [..., S, S, 3] -> float32, normalized, as the model begins."""
    _normalized(pixels).block_until_ready()


def stages(paths, examples, tokenizer, config, size) -> None:
    n = len(paths)
    for path in paths:
        path.read_bytes()  # into the page cache
    opened, small, rows = [], [], []

    def batch() -> None:
        for at in range(0, n, BATCH):
            np.stack(small[at : at + BATCH])
            pad_sequences(rows[at : at + BATCH], 0)

    def normalize() -> None:
        for at in range(0, n, BATCH):
            to_device(np.stack(small[at : at + BATCH]))

    work = {
        "read": lambda: [path.read_bytes() for path in paths],
        "read and decode": lambda: opened.extend(images.open_image(path) for path in paths),
        "resize": lambda: small.extend(images.resize(image, size) for image in opened),
        "tokenize": lambda: rows.extend(tokenize_example(e, tokenizer, config) for e in examples),
        "batch": batch,
        "normalize": normalize,
    }
    to_device(np.zeros((BATCH, size, size, 3), np.uint8))  # compiles
    for name, run in work.items():
        print(f"{name:16} {rate(n, run):10,.0f} images/s", flush=True)


def whole(examples, tokenizer, config, a) -> None:
    count = len(examples) // BATCH
    found: dict[str, list[float]] = {"Pillow alone": [], "minigpt4_jax": [], "PyTorch": []}
    paths = [example.images[0] for example in examples]
    for _ in range(a.rounds):
        # what both must do, as it decides the pixels: open, decode, resize, in one process
        alone = rate(len(paths), lambda: [images.load_pixels(path, a.size) for path in paths])
        found["Pillow alone"].append(alone)
        component = MixtureComponent("", ExampleList("", examples))
        data = DataConfig(workers=a.workers, threads=1, timeout=0.0, max_broken=0.0)
        ours = make_loader([component], data, config, tokenizer, batch_size=BATCH)
        found["minigpt4_jax"].append(rate_of(iter(ours), count))
        ours.close()
        peer = Peer(examples, tokenizer, config)
        loader = DataLoader(
            peer, BATCH, sampler=torch.randperm(len(peer)).repeat(2).tolist(),
            num_workers=a.workers, collate_fn=peer.collate,
        )  # fmt: skip
        found["PyTorch"].append(rate_of(iter(loader), count))
    medians = {name: float(np.median(rates)) for name, rates in found.items()}
    for name, median in medians.items():
        rates = ", ".join(f"{r:.0f}" for r in found[name])
        print(f"{name:16} {median:10,.0f} images/s  ({rates})")
    ours, peer, alone = (medians[n] for n in ("minigpt4_jax", "PyTorch", "Pillow alone"))
    print(
        f"{a.workers} worker processes: {ours / peer:.2f} of PyTorch, {ours / alone:.2f} of Pillow"
    )


def rate_of(batches: Iterator, count: int) -> float:
    """Images a second, after the first batch (which starts threads or processes)."""

    def take() -> None:
        batch = next(batches)
        if isinstance(batch, Batch):  # the peer's is normalized
            to_device(batch.pixels)

    take()
    begun = time.perf_counter()
    for _ in range(count - 1):
        take()
    return (count - 1) * BATCH / (time.perf_counter() - begun)


if __name__ == "__main__":
    main()
