"""`make compare`: what BLIP-2's way of training and MiniGPT-4's second stage each contribute, in small.

Four ways to teach a frozen language model to see, on the quickstart's images, encoder and SmolLM2:
(a) BLIP-2's: Q-Former and projection are trained on captions; (b) only the projection is; (c) b, then
MiniGPT-4's second stage; (d) a, then the second stage. Writes a table, loss curves and contact sheets.
"""

import argparse
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from minigpt4_jax import errors
from minigpt4_jax.demos import common, quickstart
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.chat_templates import IMAGE_TAG, STAGE2_PROMPTS

if TYPE_CHECKING:
    from minigpt4_jax.config import ModelConfig
    from minigpt4_jax.shapes.scene import Scene

SEEDS = (0, 1)
CAPTION_TOKENS, DESCRIPTION_TOKENS = 40, 72
SHOWN = 6  # images on a contact sheet, with one answer of each way
OTHER_WORDS = "<Img><ImageHere></Img> What can you see here?"  # not one of the prompts of training


class Way(NamedTuple):
    """A way of training: its configuration, and the way whose model it continues from."""

    title: str
    config: str
    steps: int  # fewer than the quickstart's: eight trainings are to fit into half an hour
    after: str | None = None


WAYS = {
    "a": Way("Q-Former and projection, captions (BLIP-2)", "quickstart:qformer", 200),
    "b": Way("projection, captions (stage 1)", "quickstart:stage1", 200),
    "c": Way("b, then stage 2 (MiniGPT-4)", "quickstart:stage2", 160, after="b"),
    "d": Way("a, then stage 2", "quickstart:stage2", 160, after="a"),
}


@dataclass(frozen=True)
class Measurement:
    """One way with one seed. Shares are of the held-out images, 0 to 1."""

    caption: float  # all attributes right, after the bare image
    chat: float  # all attributes right, asked with a prompt of the second stage in the chat format
    other: float  # all attributes right, asked in words that no stage has shown
    attributes: float  # share of right attributes, asked as for `chat`
    ended: float  # answers of `chat` that end by themselves
    words: float  # median length of an answer of `chat`
    loss: float  # mean negative log-likelihood of the true descriptions' tokens, in the chat format
    seconds: float  # training, with all before it
    trained: int  # parameters, in all stages


class RecipeComparison:
    """Trains and measures the ways, one seed after the other."""

    def __init__(self, workdir: Path, seeds: Sequence[int], images: int, judged: int):
        self.workdir, self.seeds, self.images, self.judged = workdir, seeds, images, judged
        self.log = common.ProgressLog()
        self.results: dict[str, list[Measurement]] = {way: [] for way in WAYS}

    def run(self) -> None:
        for seed in self.seeds:
            self.run_seed(seed, self.workdir / f"seed{seed}")
        seconds = round(self.log.seconds, 1)
        common.write_report(
            self.workdir,
            {
                "seeds": list(self.seeds), "training_images": self.images, "judged": self.judged,
                "seconds": seconds,
                "results": {
                    way: [vars(m) for m in measurements] for way, measurements in self.results.items()
                },
            },
        )  # fmt: skip
        text = markdown_table(self.results, self.judged, self.seeds)
        (self.workdir / "table.md").write_text(text)
        print(f"\n{text}\n{seconds:.0f} seconds. Pictures: {self.workdir}/seed*/*.png")

    def run_seed(self, seed: int, folder: Path) -> None:
        base, data = folder / "base", folder / "shapes"
        self.log(f"seed {seed}: the base model and {self.images} images")
        quickstart.build_base(base, seed)
        quickstart.draw_data(data, self.images, seed)
        answers: dict[str, list[str]] = {}
        seconds: dict[str, float] = {}
        for name, way in WAYS.items():
            self.log(f"seed {seed}: training {name}, {way.title}")
            start = base if way.after is None else folder / way.after / "model"
            stage = "stage2" if way.config.endswith("stage2") else "stage1"
            before = time.perf_counter()
            rows = data / "train" / f"{stage}.jsonl"
            trained = common.train_with_config(
                way.config, start, rows, seed, folder / name, steps=way.steps
            )
            seconds[name] = time.perf_counter() - before + seconds.get(way.after or "", 0.0)
            measured, answers[name] = measure(
                trained, name, data / "heldout", self.judged, seconds[name]
            )
            self.results[name].append(measured)
            self.log(
                f"seed {seed}: {name}: {measured.chat:.0%} right when asked in the chat format"
            )
        self.draw_pictures(folder, answers)

    def draw_pictures(self, folder: Path, answers: Mapping[str, Sequence[str]]) -> None:
        """The loss curves of a seed, and the first held-out images with the answers of all ways."""
        from minigpt4_jax.visualization.plots import contact_sheet, loss_plot

        curves = {
            f"{name}: {way.title}": folder / name / "metrics.jsonl" for name, way in WAYS.items()
        }
        loss_plot(curves, folder / "loss.png")
        scenes = quickstart.read_scenes(folder / "shapes" / "heldout", SHOWN)
        paths, captions, right = [], [], []
        for i, (path, scene) in enumerate(scenes):
            for name in WAYS:
                paths.append(path)
                captions.append(f"({name}) {answers[name][i]}")
                right.append(quickstart.is_right(scene, answers[name][i]))
        contact_sheet(
            paths, captions, right, folder / "contact_sheet.png",
            title="Asked in the chat format", columns=len(WAYS),
        )  # fmt: skip


def measure(
    model_dir: Path, way: str, split_dir: Path, count: int, seconds: float
) -> tuple[Measurement, list[str]]:
    """What a trained model does with the first `count` images of a split, and its answers in the chat."""
    from minigpt4_jax import load
    from minigpt4_jax.processing.chat_templates import fill_template

    model = load(model_dir, "float32")
    scenes = quickstart.read_scenes(split_dir, count)
    images = [path for path, _ in scenes]
    template = model.config.prompt_template
    chat = [fill_template(template, STAGE2_PROMPTS[0])] * len(images)
    other = [fill_template(template, OTHER_WORDS)] * len(images)
    captions = model.generate(images, [IMAGE_TAG] * len(images), max_new_tokens=CAPTION_TOKENS)
    outputs = [
        o for (o,) in model.generate_details(images, chat, max_new_tokens=DESCRIPTION_TOKENS)
    ]
    other_texts = model.generate(images, other, max_new_tokens=DESCRIPTION_TOKENS)
    nll, tokens = model.score(images, chat, quickstart.true_texts(split_dir, images, stage2=True))
    texts = [output.text for output in outputs]
    exact, attributes = judge(scenes, texts)
    measured = Measurement(
        caption=judge(scenes, captions)[0],
        chat=exact,
        other=judge(scenes, other_texts)[0],
        attributes=attributes,
        ended=statistics.mean(output.finish_reason == "stop" for output in outputs),
        words=statistics.median(len(text.split()) for text in texts),
        loss=float(nll.sum() / tokens.sum()),
        seconds=round(seconds, 1),
        trained=count_trained(model.config, qformer=trains_qformer(way)),
    )
    return measured, texts


def judge(scenes: "Sequence[tuple[Path, Scene]]", texts: Sequence[str]) -> tuple[float, float]:
    """The share of texts that are entirely right, and the share of right attributes."""
    from minigpt4_jax.evaluation.benchmarks.shapes import description_rows, judge_descriptions

    figures = judge_descriptions(description_rows(scenes), texts).original
    return figures["exact"] / 100, figures["attributes"] / 100


def trains_qformer(way: str) -> bool:
    """Whether the Q-Former learns in a way, or in the one that it continues from."""
    from minigpt4_jax.training.config import TrainConfig
    from minigpt4_jax.training.config_cli import read_config_file
    from minigpt4_jax.training.config_values import build

    _, config, _, after = WAYS[way]
    if after is not None and trains_qformer(after):
        return True
    return not build(TrainConfig, read_config_file(config), "config").freeze_qformer


def count_trained(config: "ModelConfig", *, qformer: bool) -> int:
    """Parameters that training changes."""
    from flax import nnx

    from minigpt4_jax.checkpoint.parameters import abstract_model
    from minigpt4_jax.training.train_step import is_trained, trained_parts

    parts = trained_parts(freeze_vit=True, freeze_qformer=not qformer, config=config)
    state = nnx.to_flat_state(nnx.state(abstract_model(config)))
    return sum(math.prod(leaf.shape) for path, leaf in state if is_trained(path, parts))


def markdown_table(
    results: Mapping[str, Sequence[Measurement]], judged: int, seeds: Sequence[int]
) -> str:
    """The measurements by way, one figure for each seed, and what they show."""
    columns = {
        "loss, chat format": lambda m: f"{m.loss:.3f}",
        "caption right": lambda m: f"{m.caption:.0%}",
        "right in chat": lambda m: f"{m.chat:.0%}",
        "attributes": lambda m: f"{m.attributes:.0%}",
        "other wording": lambda m: f"{m.other:.0%}",
        "ends by itself": lambda m: f"{m.ended:.0%}",
        "words": lambda m: f"{m.words:.0f}",
        "seconds": lambda m: f"{m.seconds:.0f}",
        "trained": lambda m: f"{m.trained:,}",
    }
    lines = [
        " | ".join(["| way", *columns]) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for name, measurements in results.items():
        cells = [" / ".join(dict.fromkeys(map(show, measurements))) if key == "trained"
                 else " / ".join(map(show, measurements)) for key, show in columns.items()]  # fmt: skip
        lines.append(" | ".join([f"| ({name}) {WAYS[name].title}", *cells]) + " |")
    return "\n".join(
        [
            *lines, "",
            f"Seeds {', '.join(map(str, seeds))}, {judged} held-out images each; `right`: every attribute of "
            "every object and the background. `seconds` and `trained` include the stage before.",
            "",
            "What this shows: which parameters captions need here, and what a short second stage in the chat "
            "format changes. What it does not show: the same for photographs. The encoder was trained to "
            "name these shapes, the world is small, and the language model has 135 million parameters.",
        ]
    )  # fmt: skip


def read_seeds(text: str) -> list[int]:
    """The seeds of `--seeds=0,1`. UserError: something else, or a seed twice."""
    seeds = [int(part) for part in text.split(",") if part.strip().isdecimal()]
    if len(seeds) != len(text.split(",")) or len(set(seeds)) != len(seeds):
        raise UserError(f"--seeds={text}: expected different numbers, such as 0,1")
    return seeds


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--workdir", type=Path, default=Path("compare"), help="directory to write")
    parser.add_argument(
        "--seeds", default=",".join(map(str, SEEDS)), help="one run of all ways each"
    )
    parser.add_argument("--images", type=int, default=3000, help="training images to draw")
    parser.add_argument("--judged", type=int, default=40, help="held-out images to evaluate on")
    args = parser.parse_args(argv)
    seeds = read_seeds(args.seeds)
    common.prepare_workdir(args, [f"seed{seed}" for seed in seeds])
    RecipeComparison(args.workdir, seeds, args.images, args.judged).run()
    return 0


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and end the process; a UserError becomes one line on stderr."""
    errors.run(lambda: main(argv))


if __name__ == "__main__":
    run()
