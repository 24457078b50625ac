"""python -m minigpt4_jax.tiny_v2: MiniGPT-v2 in small, all its tasks, before and after training.

Converts SmolLM2-135M-Instruct with LoRA and the vision side of patches this package ships, generates
the dataset `shapes` with questions of every task, trains by configs/tiny_v2.py, judges answers about
held-out images, and leaves report.json, loss.png and contact_sheet.png in the workdir.
"""

import argparse
import json
import shutil
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from minigpt4_jax import errors
from minigpt4_jax.demos.quickstart import language_model
from minigpt4_jax.errors import UserError

if TYPE_CHECKING:
    from minigpt4_jax.inference.model import Model
    from minigpt4_jax.shapes.scene import Scene
    from minigpt4_jax.shapes.tasks import Asked

VISION = Path(__file__).parents[1] / "assets" / "shapes_vision_v2.safetensors"
SETTINGS = (  # what differs from the released MiniGPT-v2
    "chat_template=chatml",  # without the system message of SmolLM2's own template
    "merge_patches=2",  # of 64 patches; four in a row often show two objects
    "lora.targets=q,k,v,o,gate,up,down",  # reads boxes sooner than q and v alone
    "lora.rank=16",
    "lora.dropout=0",  # each row comes once
)
PHASES: tuple[tuple[dict[str, int], tuple[int, ...]], ...] = (  # questions, objects of the scenes
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
JUDGED = ("refer", "identify", "vqa", "caption", "grounding")
QUESTIONS = 4  # of an image that are judged, of vqa's many
NEW_TOKENS = 96
SHOWN = 12  # answers on the contact sheet


class Judged(NamedTuple):
    """A question about an image, what the model answered, and how right that is, 0 to 1."""

    image: Path
    asked: "Asked"
    answer: str
    score: float


class TinyV2:
    """The steps in order; each prints what it did and how long it took."""

    def __init__(self, workdir: Path, images: int, judged: int, seed: int):
        self.workdir, self.images, self.judged, self.seed = workdir, images, judged, seed
        self.begin = time.perf_counter()
        self.results: dict[str, dict[str, dict[str, float]]] = {}

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.begin:4.0f} s] {text}", flush=True)

    def prepare(self) -> None:
        """The base model, the images, and the rows of training."""
        from convert.cli import main as convert
        from minigpt4_jax.shapes.dataset import write_dataset

        self.say("converting SmolLM2-135M-Instruct and the demonstration's vision side of patches")
        # The patches' values are large (see training/shapes_patches.py), word embeddings are short.
        convert([
            "build", "--variant=minigpt-v2", f"--vision={VISION}", f"--llm={language_model()}",
            f"--out={self.workdir / 'base'}", f"--seed={self.seed}", "--projection-scale=0.01",
            *(f"--set={setting}" for setting in SETTINGS),
        ])  # fmt: skip
        self.say(f"drawing {self.images} training images of coloured shapes")
        shapes = self.workdir / "shapes"
        write_dataset(
            shapes, train=self.images, heldout=200, heldout_pairs=200, seed=self.seed, workers=2
        )
        write_rows(shapes / "train", self.workdir / "rows.jsonl", self.seed)

    def run(self) -> None:
        self.prepare()
        base, shapes = self.workdir / "base", self.workdir / "shapes"
        self.judge("before", base, {"heldout": max(1, self.judged // 5)}, shapes)
        model = self.train(base)
        splits = {"heldout": self.judged, "heldout_pairs": (self.judged + 1) // 2}
        found = self.judge("after", model, splits, shapes)
        self.finish(model, found)

    def train(self, base: Path) -> Path:
        from minigpt4_jax.training.config_cli import read_config_file
        from minigpt4_jax.training.config_values import from_mapping
        from minigpt4_jax.training.trainer import train

        values = read_config_file("tiny_v2")
        values |= {"model": str(base), "seed": self.seed}
        values["data"]["path"] = (str(self.workdir / "rows.jsonl"),)
        self.say(f"training projection and LoRA, {values['steps']} steps")
        return train(from_mapping(values), self.workdir / "run").model

    def judge(
        self, title: str, model_dir: Path, splits: dict[str, int], shapes: Path
    ) -> list[Judged]:
        """Ask about the first so many images of each split; the answers for `heldout`."""
        from minigpt4_jax import load

        model, found = load(model_dir, "float32"), {}
        for split, count in splits.items():
            found[split] = judge_split(model, shapes / split, count)
        self.results[title] = {split: shares(answers) for split, answers in found.items()}
        told = ", ".join(f"{k} {v:.0%}" for k, v in self.results[title]["heldout"].items())
        self.say(f"{title}, held-out images: {told}")
        return found["heldout"]

    def finish(self, model: Path, found: list[Judged]) -> None:
        from minigpt4_jax.visualization.plots import loss_plot

        write_sheet(found, self.workdir / "contact_sheet.png")
        loss_plot(self.workdir / "run" / "metrics.jsonl", self.workdir / "loss.png")
        seconds = round(time.perf_counter() - self.begin, 1)
        report = {"seed": self.seed, "images": self.judged, "results": self.results}
        report |= {"training_images": self.images, "seconds": seconds}
        (self.workdir / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        print_report(report)
        one = next(j for j in found if j.asked.task == "refer")
        phrase = one.asked.question.rsplit(" of ", 1)[1]
        print(f"\nLook at {self.workdir / 'contact_sheet.png'}. Ask for yourself:")
        print(
            f"  python -m minigpt4_jax.chat --model={model} --image={one.image} --temperature=0 \\"
        )
        print(f'    --task=refer --prompt="{phrase}" --save-image=boxes.png')


def write_rows(train_dir: Path, out: Path, seed: int) -> int:
    """Write what training asks, a row {"image", "conversations"} each, in its order; returns how many."""
    from minigpt4_jax.shapes.dataset import read_scenes
    from minigpt4_jax.shapes.tasks import Phase, training_rows
    from minigpt4_jax.training.config_cli import read_config_file

    known = read_scenes(train_dir)
    phases = [Phase(questions, counts) for questions, counts in PHASES]
    batch = read_config_file("tiny_v2")["batch_size"]
    rows = training_rows([scene for _, scene in known], phases, batch, TURNS, seed)
    with out.open("w") as file:
        for i, turns in rows:
            talk = [
                {"from": speaker, "value": value}
                for asked in turns
                for speaker, value in (("human", asked.question), ("gpt", asked.answer))
            ]
            image = str(known[i][0].relative_to(out.parent))
            file.write(json.dumps({"image": image, "conversations": talk}) + "\n")
    return len(rows)


# --- judging --------------------------------------------------------------------------------------


def judge_split(model: "Model", split_dir: Path, count: int) -> list[Judged]:
    """Everything that is judged about the first `count` images of a split, answered greedily."""
    from minigpt4_jax.shapes.dataset import read_scenes

    known = read_scenes(split_dir)[:count]
    rows = [(path, scene, a) for i, (path, scene) in enumerate(known) for a in exam(scene, i)]
    answers = model.generate(
        [path for path, _, _ in rows], [a.question for _, _, a in rows],
        max_new_tokens=NEW_TOKENS, template=True, batch_size=32,
    )  # fmt: skip
    return [
        Judged(path, a, answer, score(scene, a, answer))
        for (path, scene, a), answer in zip(rows, answers, strict=True)
    ]


def exam(scene: "Scene", seed: int) -> list["Asked"]:
    """What is judged of a scene: all but detection, and of vqa's questions a few."""
    from minigpt4_jax.shapes.tasks import asked

    rng = np.random.default_rng([seed, 5])
    everything = [a for a in asked(scene, rng) if a.task in JUDGED]
    short = [a for a in everything if a.task == "vqa"]
    chosen = set(rng.permutation(len(short))[:QUESTIONS].tolist())
    return [a for a in everything if a.task != "vqa"] + [
        a for i, a in enumerate(short) if i in chosen
    ]


def score(scene: "Scene", asked: "Asked", answer: str) -> float:
    """How right an answer is: 1 or 0, and for grounding the share of objects that are named and found.

    refer: the first box overlaps the true one by more than half; caption: every attribute is right;
    vqa and identify: the very words.
    """
    from minigpt4_jax.processing.boxes import iou, parse_boxes
    from minigpt4_jax.shapes.text import matches

    if asked.task == "caption":
        return float(matches(scene, answer))
    if asked.task in ("vqa", "identify"):
        return float(answer.strip().lower() == asked.answer.lower())
    side = scene.image_size
    found = parse_boxes(answer, side, side)
    if asked.task == "refer" and asked.box is not None:
        return float(bool(found) and iou(found[0][1], asked.box) > 0.5)
    true = parse_boxes(asked.answer, side, side)
    hits = sum(any(p == phrase and iou(b, box) > 0.5 for p, b in found) for phrase, box in true)
    return hits / max(len(true), len(found))


def shares(found: list[Judged]) -> dict[str, float]:
    """Task -> mean score."""
    scores: dict[str, list[float]] = defaultdict(list)
    for judged in found:
        scores[judged.asked.task].append(judged.score)
    return {task: sum(s) / len(s) for task in JUDGED if (s := scores[task])}


def write_sheet(found: list[Judged], out: Path) -> None:
    """A contact sheet: answers of every task about different images, their boxes drawn."""
    from minigpt4_jax.visualization.plots import contact_sheet

    images = list(dict.fromkeys(j.image for j in found))[:SHOWN]
    shown = [
        next(j for j in found if j.image == image and j.asked.task == JUDGED[i % len(JUDGED)])
        for i, image in enumerate(images)
    ]
    contact_sheet(
        [_picture(j) for j in shown],
        [f"{j.asked.question}: {j.answer}" for j in shown],
        [j.score == 1 for j in shown],
        out, truths=[j.asked.answer for j in shown], title="Images never seen in training", side=240,
    )  # fmt: skip


def _picture(judged: Judged) -> Any:
    """The image with the boxes of the answer, or of the question where that has one."""
    from minigpt4_jax.visualization.boxes import draw_boxes

    for text in (judged.answer, judged.asked.question):
        try:
            return draw_boxes(judged.image, text)
        except UserError:
            continue
    return judged.image


def print_report(report: dict[str, Any]) -> None:
    """The table: each task before and after training."""
    columns = [
        (f"{title}, {split.replace('_', ' ')}", results)
        for title, splits in report["results"].items()
        for split, results in splits.items()
    ]
    print("\n" + " " * 12 + "".join(f"{title:>22}" for title, _ in columns))
    for task in JUDGED:
        print(f"{task:12}" + "".join(f"{results[task]:>22.1%}" for _, results in columns))
    print(
        f"{report['seconds']:.0f} seconds, seed {report['seed']}, {report['images']} held-out images"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("tiny_v2"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=4000, help="training images")
    parser.add_argument("--judged", type=int, default=50, help="held-out images asked about")
    parser.add_argument("--prepare", action="store_true", help="only what training needs")
    a = parser.parse_args(argv)
    if a.images < 100 or not 1 <= a.judged <= 200:
        raise UserError("--images must be at least 100 and --judged between 1 and 200")
    for name in ("base", "run", "shapes"):
        shutil.rmtree(a.workdir / name, ignore_errors=True)
    a.workdir.mkdir(parents=True, exist_ok=True)
    steps = TinyV2(a.workdir, a.images, a.judged, a.seed)
    steps.prepare() if a.prepare else steps.run()
    return 0


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and end the process; a UserError is one line on stderr."""
    errors.run(lambda: main(argv))
