"""Seconds to the first answer of another checkpoint in a process that has one of the same structure.

    python benchmarks/load_again.py --model=DIR --image=FILE [--rounds=4]

Loads DIR and answers a question about the image, again and again in one process: in turns with compiled
programs of its own, which are traced and read from the cache on disk, and with those of the model before it.
Prints the median seconds of loading, of the first answer (8 tokens), and of the same answer again, which is
the floor.
"""

import statistics
import time
from itertools import pairwise
from pathlib import Path

from common import Table, argument_parser, median_ratio

from minigpt4_jax import load
from minigpt4_jax.errors import run
from minigpt4_jax.inference.shared_programs import clear_programs

PROMPT = "<Img><ImageHere></Img> What is in this image?"


def seconds(folder: Path, image: str) -> tuple[float, float, float]:
    """Of loading, of the first answer, and of the same answer again."""
    times = [time.perf_counter()]
    model = load(folder)
    times.append(time.perf_counter())
    for _ in range(2):
        model.generate([image], [PROMPT], max_new_tokens=8)
        times.append(time.perf_counter())
    loading, first, again = (end - begin for begin, end in pairwise(times))
    return loading, first, again


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--image", required=True)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    seconds(args.model, args.image)  # fills the cache on disk
    own, shared = [], []
    for _ in range(args.rounds):
        clear_programs()
        own.append(seconds(args.model, args.image))
        shared.append(seconds(args.model, args.image))
    columns = dict.fromkeys(("loading, s", "answer, s", "again, s"), (12, ".2f"))
    table = Table({"programs": (10, "")} | columns)
    for name, times in {"own": own, "shared": shared}.items():
        table.row(name, *map(statistics.median, zip(*times, strict=True)))
    answers = [[first for _, first, _ in times] for times in (shared, own)]
    print(f"first answer, shared over own: {median_ratio(*answers):.2f}")


if __name__ == "__main__":
    run(main)
