"""python -m minigpt4_jax.tiny_v2: train a small MiniGPT-v2, with boxes and all its tasks.

Converts SmolLM2-135M-Instruct with LoRA and the patch encoder in this package, draws the dataset
`shapes` with questions for every task, trains by configs/tiny_v2.py, evaluates answers about held-out
images before and after, and writes report.json, loss.png and contact_sheet.png to the workdir.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from minigpt4_jax import errors
from minigpt4_jax.demos import common
from minigpt4_jax.errors import UserError
from minigpt4_jax.evaluation.benchmarks.shapes import EVALUATED_TASKS, PRESENCE
from minigpt4_jax.evaluation.task import Task

if TYPE_CHECKING:
    from PIL import Image

    from minigpt4_jax.shapes.tasks import TaskQuestion

VISION = Path(__file__).parents[1] / "assets" / "shapes_vision_v2.safetensors"
SETTINGS = (  # differences from the released MiniGPT-v2
    "merge_patches=2",  # of 64 patches; four in a row often show two objects
    "lora.targets=q,k,v,o,gate,up,down",  # learns boxes sooner than q and v alone
    "lora.rank=16",
    "lora.dropout=0",  # each row is used once
    "chat_template=chatml",  # without the system message of SmolLM2's own template
)
# Phases of training: (task -> number of questions, numbers of objects in the scenes)
PHASES: tuple[tuple[dict[str, int], tuple[int, ...]], ...] = (
    ({"caption": 160, "grounding": 80, "identify": 40, "refer": 40, "vqa": 64}, (1,)),
    (
        {"caption": 240, "grounding": 120, "identify": 160, "refer": 320, "vqa": 240, "detection": 40},
        (1, 2, 2),
    ),
    (
        {"caption": 700, "vqa": 2800, "refer": 3600, "identify": 2200, "grounding": 560,
         "detection": 160},
        (1, 2, 3),
    ),
)  # fmt: skip
TURNS = 3  # short questions about an image in one row
SHOWN = 12  # answers on the contact sheet
TASKS = (*EVALUATED_TASKS, PRESENCE)  # in the table
EVALUATION = "evaluation"  # folder of results in the workdir


class ScoredAnswer(NamedTuple):
    """A question about an image, the model's answer, and its score from 0 to 1."""

    image: Path
    task_question: "TaskQuestion"
    answer: str
    score: float


class TinyV2:
    """Runs the steps in order; each prints what it does and when it began."""

    def __init__(self, workdir: Path, images: int, judged: int, seed: int):
        self.workdir, self.images, self.judged, self.seed = workdir, images, judged, seed
        self.base, self.shapes = workdir / "base", workdir / "shapes"
        self.rows = workdir / "rows.jsonl"
        self.log = common.ProgressLog()
        self.results: dict[str, dict[str, dict[str, float]]] = {}

    def prepare(self) -> None:
        """Make the base model, the images, and the training rows."""
        self.log("converting SmolLM2-135M-Instruct and the demonstration's patch encoder")
        # The patches' values are large (patch_encoder.GAIN), word embeddings are small.
        common.build_base_model(
            self.base,
            self.seed,
            "--variant=minigpt-v2",
            f"--vision={VISION}",
            "--projection-scale=0.01",
            *(f"--set={setting}" for setting in SETTINGS),
        )
        self.log(f"drawing {self.images} training images of coloured shapes")
        common.draw_dataset(self.shapes, self.images, self.seed)
        write_rows(self.shapes / "train", self.rows, self.seed)

    def run(self) -> None:
        from minigpt4_jax.training.config_cli import read_config_file

        self.prepare()
        self.evaluate("before", self.base, {"heldout": max(1, self.judged // 5)})
        steps = read_config_file("tiny_v2")["steps"]
        self.log(f"training projection and LoRA, {steps} steps")
        model = common.train_with_config(
            "tiny_v2", self.base, self.rows, self.seed, self.workdir / "run"
        )
        splits = {"heldout": self.judged, "heldout_pairs": (self.judged + 1) // 2}
        answers = self.evaluate("after", model, splits)
        self.finish(model, answers)

    def evaluate(self, title: str, model_dir: Path, splits: dict[str, int]) -> list[ScoredAnswer]:
        """Ask about the first images of each split (name -> how many); returns those of `heldout`."""
        from minigpt4_jax import load
        from minigpt4_jax.evaluation.report import write_report

        model, answers, found = load(model_dir, "float32"), {}, {}
        out = self.workdir / EVALUATION / title
        for split, count in splits.items():
            task, found[split] = common.evaluate_on_shapes(
                model, f"{model_dir} ({title})", "shapes", self.shapes / split, count, out
            )
            answers[split] = scored_answers(task, found[split])
        self.results[title] = {split: task_scores(scores) for split, scores in found.items()}
        scores = ", ".join(f"{k} {v:.0%}" for k, v in self.results[title]["heldout"].items())
        self.log(f"{title}, held-out images: {scores}")
        write_report(list(found.values()), out)
        return answers["heldout"]

    def finish(self, model: Path, answers: list[ScoredAnswer]) -> None:
        from minigpt4_jax.visualization.plots import loss_plot

        sheet = self.workdir / "contact_sheet.png"
        write_sheet(answers, sheet)
        loss_plot(self.workdir / "run" / "metrics.jsonl", self.workdir / "loss.png")
        report = {
            "seed": self.seed,
            "images": self.judged,
            "results": self.results,
            "training_images": self.images,
            "seconds": round(self.log.seconds, 1),
        }
        common.write_report(self.workdir, report)
        print_report(report)
        example = next(a for a in answers if a.task_question.task == "refer")
        phrase = example.task_question.question.rsplit(" of ", 1)[1]
        report_page = self.workdir / EVALUATION / "after" / "report.html"
        print(f"\nLook at {sheet} and {report_page}. To ask a question yourself:")
        print(
            f"  python -m minigpt4_jax.chat --model={model} --image={example.image} --temperature=0 \\"
        )
        print(f'    --task=refer --prompt="{phrase}" --save-image=boxes.png')


def write_rows(train_dir: Path, out: Path, seed: int) -> int:
    """Write the training rows {"image", "conversations"}, in training order; returns their number."""
    from minigpt4_jax.shapes.dataset import read_scenes
    from minigpt4_jax.shapes.tasks import Phase, training_rows
    from minigpt4_jax.training.config_cli import read_config_file

    scenes = read_scenes(train_dir)
    phases = [Phase(questions, counts) for questions, counts in PHASES]
    batch = read_config_file("tiny_v2")["batch_size"]
    rows = training_rows([scene for _, scene in scenes], phases, batch, TURNS, seed)
    with out.open("w") as file:
        for i, turns in rows:
            conversation = [
                {"from": speaker, "value": value}
                for turn in turns
                for speaker, value in (("human", turn.question), ("gpt", turn.answer))
            ]
            image = str(scenes[i][0].relative_to(out.parent))
            file.write(json.dumps({"image": image, "conversations": conversation}) + "\n")
    return len(rows)


# --- evaluation -----------------------------------------------------------------------------------


def scored_answers(task: Task, scores: Mapping[str, Any]) -> list[ScoredAnswer]:
    """The rows of the benchmark `shapes` with the answers in its scores."""
    return [
        ScoredAnswer(
            task.image(row) or Path(), row.truth.question, entry["answer"], entry["score"] / 100
        )
        for row, entry in zip(task.used_rows, scores["per_row"], strict=True)
    ]


def task_scores(scores: Mapping[str, Any]) -> dict[str, float]:
    """Task -> mean score from 0 to 1, from the scores of the benchmark `shapes`."""
    return {name: scores["original"][name] / 100 for name in TASKS if name in scores["original"]}


def write_sheet(answers: list[ScoredAnswer], out: Path) -> None:
    """A contact sheet: one answer for each image, the tasks in turn, with boxes drawn."""
    from minigpt4_jax.visualization.plots import contact_sheet

    images = list(dict.fromkeys(a.image for a in answers))[:SHOWN]
    tasks = [EVALUATED_TASKS[i % len(EVALUATED_TASKS)] for i in range(len(images))]
    shown = [
        next(a for a in answers if a.image == image and a.task_question.task == task)
        for image, task in zip(images, tasks, strict=True)
    ]
    contact_sheet(
        [image_with_boxes(a) for a in shown],
        [f"{a.task_question.question}: {a.answer}" for a in shown],
        [a.score == 1 for a in shown],
        out, truths=[a.task_question.answer for a in shown], title="Images never seen in training", side=240,
    )  # fmt: skip


def image_with_boxes(answer: ScoredAnswer) -> "Path | Image.Image":
    """The image with the boxes of the answer, or else of the question; its path if neither has any."""
    from minigpt4_jax.visualization.boxes import draw_boxes

    for text in (answer.answer, answer.task_question.question):
        try:
            return draw_boxes(answer.image, text)
        except UserError:
            continue
    return answer.image


def print_report(report: dict[str, Any]) -> None:
    """Print the scores of each task before and after training."""
    columns = [
        (f"{title}, {split.replace('_', ' ')}", results)
        for title, splits in report["results"].items()
        for split, results in splits.items()
    ]
    print("\n" + " " * 12 + "".join(f"{title:>22}" for title, _ in columns))
    for task in TASKS:
        print(f"{task:12}" + "".join(f"{results[task]:>22.1%}" for _, results in columns))
    print(
        f"{report['seconds']:.0f} seconds, seed {report['seed']}, {report['images']} held-out images"
    )


def main(argv: Sequence[str] | None = None) -> int:
    description = (__doc__ or "").splitlines()[0]
    parser = common.argument_parser(description, "tiny_v2", images=4000, judged=50)
    parser.add_argument("--prepare", action="store_true",
                        help="only make the base model and the training data")  # fmt: skip
    args = parser.parse_args(argv)
    common.prepare_workdir(args, ("base", "run", "shapes", EVALUATION))
    demo = TinyV2(args.workdir, args.images, args.judged, args.seed)
    demo.prepare() if args.prepare else demo.run()
    return 0


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and end the process; a UserError becomes one line on stderr."""
    errors.run(lambda: main(argv))
