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
from minigpt4_jax.demos.tiny_v2 import evaluate_split, mean_scores
from minigpt4_jax.errors import run
from minigpt4_jax.evaluation.task import Task, open_tasks

add_test_helpers_to_path()
from helpers import shapes_as_refcoco  # noqa: E402


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--shapes", required=True, type=Path, help="the dataset")
    parser.add_argument("--images", type=int, default=50, help="held-out images")
    args = parser.parse_args()
    answers = evaluate_split(
        minigpt4_jax.load(args.model, "float32"), args.shapes / "heldout", args.images
    )
    own = [answer for answer in answers if answer.task_question.task == "refer"]
    print(f"tiny_v2: refer {mean_scores(answers)['refer']:.4%} of {len(own)} expressions")
    scores = through_refcoco(args.model, args.shapes, args.images)
    print(f"refcoco: {scores['score']:.4f} % of {scores['rows']} expressions")
    pairs = list(zip(own, scores["per_row"], strict=True))
    same = [a.answer.strip() == b["answer"].strip() for a, b in pairs]
    hits = [a.score * 100 == b["score"] for a, b in pairs]
    print(f"{sum(same)} answers and {sum(hits)} scores of {len(pairs)} are equal")


def through_refcoco(model: Path, shapes: Path, images: int) -> dict:
    """scores.json of `evaluate` on the expressions about the first images."""
    with tempfile.TemporaryDirectory() as name:
        root, out = Path(name) / "data", Path(name) / "out"
        shapes_as_refcoco.write(first_images(shapes, images), root)
        evaluate.main(
            [f"--model={model}", f"--data.root={root}", "--benchmark=refcoco", "--split=val",
             "--dtype=float32", f"--out={out}"]
        )  # fmt: skip
        return json.loads((out / "refcoco_val" / "scores.json").read_text())


def first_images(shapes: Path, images: int) -> Task:
    """The benchmark `shapes` on the first held-out images."""
    (task,) = open_tasks(["shapes"], shapes.resolve().parent, ["heldout"])
    names = list(dict.fromkeys(task.image(row) for row in task.rows))[:images]
    number = sum(task.image(row) in names for row in task.rows)
    return Task(task.benchmark, task.split, task.root, task.rows, number)


if __name__ == "__main__":
    run(main)
