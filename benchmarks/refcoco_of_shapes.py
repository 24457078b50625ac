"""tiny_v2's figure for referring expressions, and the same expressions through the benchmark `refcoco`.

    python benchmarks/refcoco_of_shapes.py --model=tiny_v2/run/model --shapes=tiny_v2/shapes [--images=50]

The first figure is what `python -m minigpt4_jax.tiny_v2` reports of the first held-out images. For the second
their expressions are written in RefCOCO's layout, asked and scored by `minigpt4 evaluate`, as the original's
eval_ref.py does. Prints both, and the number of equal answers.
"""

import json
import tempfile
from pathlib import Path

from common import add_test_helpers_to_path, argument_parser

import minigpt4_jax
from minigpt4_jax.cli import evaluate
from minigpt4_jax.demos.common import evaluate_on_shapes
from minigpt4_jax.errors import run
from minigpt4_jax.evaluation.task import Task

add_test_helpers_to_path()
from helpers import shapes_as_refcoco  # noqa: E402


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--shapes", required=True, type=Path, help="the dataset")
    parser.add_argument("--images", type=int, default=50, help="held-out images")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = minigpt4_jax.load(args.model, "float32")
        out, split = Path(folder), args.shapes / "heldout"
        task, scores = evaluate_on_shapes(model, "own", "shapes", split, args.images, out)
        through = through_refcoco(args.model, task, out)
    own = [row for row in scores["per_row"] if row["group"] == "refer"]
    print(f"tiny_v2: refer {scores['original']['refer']:.4f} % of {len(own)} expressions")
    print(f"refcoco: {through['score']:.4f} % of {through['rows']} expressions")
    pairs = list(zip(own, through["per_row"], strict=True))
    same = [a["answer"] == b["answer"] for a, b in pairs]
    hits = [a["score"] == b["score"] for a, b in pairs]
    print(f"{sum(same)} answers and {sum(hits)} scores of {len(pairs)} are equal")


def through_refcoco(model: Path, task: Task, folder: Path) -> dict:
    """scores.json of `evaluate` on the expressions of a task of `shapes`."""
    root, out = folder / "data", folder / "out"
    shapes_as_refcoco.write(task, root)
    evaluate.main(
        [f"--model={model}", f"--data.root={root}", "--benchmark=refcoco", "--split=val",
         "--dtype=float32", f"--out={out}"]
    )  # fmt: skip
    return json.loads((out / "refcoco_val" / "scores.json").read_text())


if __name__ == "__main__":
    run(main)
