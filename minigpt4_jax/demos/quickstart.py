"""`make quickstart`: train a model that describes images, from nothing, in the paper's two stages.

Converts SmolLM2-135M-Instruct and the vision encoder in this package, draws the dataset `shapes`,
trains the projection in two stages, evaluates descriptions of held-out images, and writes
report.json, loss.png and contact_sheet.png to the workdir.
"""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from minigpt4_jax import errors
from minigpt4_jax.demos import common

if TYPE_CHECKING:
    from minigpt4_jax.inference.model import Model
    from minigpt4_jax.shapes.scene import Scene

SPLITS = ("heldout", "heldout_pairs")
CURRICULUM: dict[str, tuple[dict[int, int], ...]] = {
    # phases of each stage: number of objects -> how many such scenes
    "stage1": ({1: 80}, {1: 40, 2: 40}, {1: 250, 2: 800, 3: 800}),
    "stage2": ({1: 60}, {1: 30, 2: 30}, {1: 400, 2: 800, 3: 800}),
}
SHOWN = 12  # images on the contact sheet
EVALUATION = "evaluation"  # folder of results in the workdir


class SplitMetrics(NamedTuple):
    """The results of a model on one split."""

    exact: float  # share of images whose attributes are all right
    attributes: float  # share of right attributes
    loss: float  # mean negative log-likelihood of the true texts' tokens
    texts: list[str]


class Quickstart:
    """Runs the steps in order; each prints what it does and when it began."""

    def __init__(self, workdir: Path, seed: int, images: int, judged: int):
        self.workdir, self.seed, self.images, self.judged = workdir, seed, images, judged
        self.log = common.ProgressLog()
        self.report: dict[str, Any] = {"seed": seed, "training_images": images, "results": {}}

    def run(self) -> None:
        base, data = self.workdir / "base", self.workdir / "shapes"
        self.build(base)
        self.draw(data)
        self.evaluate("untrained", base, data, stage2=False, quick=True)
        stage1 = self.train("stage1", base, data)
        self.evaluate("after stage 1", stage1, data, stage2=False)
        title = "after stage 1, asked in the chat format"
        self.evaluate(title, stage1, data, stage2=True, quick=True)
        stage2 = self.train("stage2", stage1, data)
        final = self.evaluate("after stage 2", stage2, data, stage2=True)
        self.finish(stage2, data, final)

    def build(self, out: Path) -> None:
        self.log("converting SmolLM2-135M-Instruct and the demonstration's vision encoder")
        build_base(out, self.seed)

    def draw(self, out: Path) -> None:
        self.log(f"drawing {self.images} training images of coloured shapes")
        draw_data(out, self.images, self.seed)

    def train(self, stage: str, model: Path, data: Path) -> Path:
        self.log(f"training the projection, {stage}")
        rows = data / "train" / f"{stage}.jsonl"
        return common.train_with_config(
            f"quickstart:{stage}", model, rows, self.seed, self.workdir / stage
        )

    def evaluate(
        self, title: str, model_dir: Path, data: Path, *, stage2: bool, quick: bool = False
    ) -> dict[str, SplitMetrics]:
        """Describe held-out images greedily and check the texts. quick: half of the first split.

        In the chat format this is the benchmark `shapes_description`, with its files and report."""
        from minigpt4_jax import load
        from minigpt4_jax.evaluation.report import write_report
        from minigpt4_jax.evaluation.results import find_results

        model = load(model_dir, "float32")
        splits, count = (SPLITS[:1], (self.judged + 1) // 2) if quick else (SPLITS, self.judged)
        out = self.workdir / EVALUATION / title.replace(" ", "_").replace(",", "")
        results = {
            split: evaluate_split(model, data / split, count, stage2, out if stage2 else None)
            for split in splits
        }
        self.report["results"][title] = {
            split: {"exact": m.exact, "attributes": m.attributes, "loss": m.loss, "images": count}
            for split, m in results.items()
        }
        if stage2:
            write_report(list(find_results(out).values()), out)
        exact = results["heldout"].exact
        self.log(f"{title}: {exact:.0%} of {count} held-out images entirely right")
        return results

    def finish(self, model: Path, data: Path, final: dict[str, SplitMetrics]) -> None:
        from minigpt4_jax.visualization.plots import contact_sheet, loss_plot

        sheet, plot = self.workdir / "contact_sheet.png", self.workdir / "loss.png"
        shown, texts = read_scenes(data / "heldout", SHOWN), final["heldout"].texts[:SHOWN]
        right = [is_right(scene, text) for (_, scene), text in zip(shown, texts, strict=True)]
        contact_sheet(
            [path for path, _ in shown], texts, right, sheet, title="Images never seen in training"
        )
        loss_plot({s: self.workdir / s / "metrics.jsonl" for s in ("stage1", "stage2")}, plot)
        self.report["seconds"] = round(self.log.seconds, 1)
        common.write_report(self.workdir, self.report)
        print_report(self.report)
        for (path, _), text in zip(shown[:3], texts, strict=False):
            print(f"\n{path}\n  {text}")
        page = self.workdir / EVALUATION / "after_stage_2" / "report.html"
        print(
            f"\nLook at {sheet}, {plot} and {page}. To ask about an image that you drew yourself:"
        )
        print(
            f"  python -m minigpt4_jax.chat --model={model} --image={shown[0][0]} --temperature=0 \\"
        )
        print('    --prompt="Describe this image in detail."')


def build_base(out: Path, seed: int) -> None:
    """Convert the language model and the vision encoder; the projection is random."""
    # SmolLM2's word embeddings are small (norm 2.5): visual tokens begin at that size.
    common.build_base_model(
        out,
        seed,
        "--variant=minigpt4-vicuna",
        "--projection-scale=0.2",
        # ChatML without the system message that SmolLM2's own template adds: shorter rows.
        "--set=chat_template=chatml",
    )


def draw_data(out: Path, images: int, seed: int) -> None:
    """Draw the dataset, and write the rows of both stages."""
    common.draw_dataset(out, images, seed)
    for stage in CURRICULUM:
        write_rows(out / "train", stage)


def write_rows(train_dir: Path, stage: str) -> None:
    """Write a stage's rows {"image", "caption"} in training order."""
    rows = read_scenes(train_dir)
    texts = true_texts(train_dir, [path for path, _ in rows], stage == "stage2")
    with (train_dir / f"{stage}.jsonl").open("w") as file:
        for i in training_order([len(scene.objects) for _, scene in rows], CURRICULUM[stage]):
            image = str(rows[i][0].relative_to(train_dir))
            file.write(json.dumps({"image": image, "caption": texts[i]}) + "\n")


def training_order(
    counts: list[int], phases: Sequence[Mapping[int, int]], batch: int = 4
) -> list[int]:
    """Indices of scenes in training order, each once. counts: the number of objects of each scene.

    phases: number of objects -> how many such scenes, shuffled; the remaining scenes come last. The
    model learns what a word looks like, and the form of an answer, sooner from short texts. As far as
    possible the scenes of a batch have equally many objects: then their texts are of similar length,
    and little is padding.
    """
    order: list[int] = []
    remaining = {n: [i for i, c in enumerate(counts) if c == n] for n in sorted(set(counts))}
    for phase in (*phases, {n: len(counts) for n in remaining}):
        groups: list[list[int]] = []
        for n in sorted(phase.keys() & remaining.keys()):
            taken, remaining[n] = remaining[n][: phase[n]], remaining[n][phase[n] :]
            groups += [taken[k : k + batch] for k in range(0, len(taken), batch)]
        full = [group for group in groups if len(group) == batch]
        random.Random(0).shuffle(full)
        order += [i for group in [*full, *(g for g in groups if len(g) < batch)] for i in group]
    return order


def read_scenes(split_dir: Path, count: int | None = None) -> "list[tuple[Path, Scene]]":
    """The first `count` (or all) images of a split with their scenes."""
    from minigpt4_jax.shapes import dataset

    return dataset.read_scenes(split_dir)[:count]


def is_right(scene: "Scene", text: str) -> bool:
    """Whether a text describes every attribute of a scene."""
    from minigpt4_jax.shapes.claims import matches

    return matches(scene, text)


def evaluate_split(
    model: "Model", split_dir: Path, count: int, stage2: bool, out: Path | None = None
) -> SplitMetrics:
    """Describe the first `count` images of a split.

    stage2: in the chat format and with detailed texts; else from the bare image, with captions.
    out: folder for the answers and scores of the benchmark `shapes_description`, for stage2.
    """
    from minigpt4_jax.evaluation.benchmarks.shapes import description_rows, judge_descriptions
    from minigpt4_jax.processing.chat_templates import IMAGE_TAG, fill_template

    scenes = read_scenes(split_dir, count)
    images, rows = [path for path, _ in scenes], description_rows(scenes)
    question = fill_template(model.config.prompt_template, rows[0].question)
    prompts = [question if stage2 else IMAGE_TAG] * len(images)
    if out is not None:
        _, scores = common.evaluate_on_shapes(
            model, out.name, "shapes_description", split_dir, count, out
        )
        texts, figures = [row["answer"] for row in scores["per_row"]], scores["original"]
    else:
        texts = model.generate(
            images, prompts, max_new_tokens=72 if stage2 else 40, batch_size=count
        )
        figures = judge_descriptions(rows, texts).original
    nll, tokens = model.score(images, prompts, true_texts(split_dir, images, stage2))
    return SplitMetrics(
        exact=figures["exact"] / 100,
        attributes=figures["attributes"] / 100,
        loss=float(nll.sum() / tokens.sum()),
        texts=texts,
    )


def true_texts(split_dir: Path, images: Sequence[Path], stage2: bool) -> list[str]:
    """The dataset's text for each image. stage2: the detailed description, else the caption."""
    if stage2:
        rows = json.loads((split_dir / "filter_cap.json").read_text())["annotations"]
        texts = {str(row["image_id"]): row["caption"] for row in rows}
    else:
        lines = (split_dir / "captions.jsonl").read_text().splitlines()
        texts = {Path(row["image"]).stem: row["caption"] for row in map(json.loads, lines)}
    return [texts[path.stem] for path in images]


def print_report(report: dict[str, Any]) -> None:
    """Print loss, right attributes and entirely right images before and after each stage."""
    columns = f"{'loss':>6}{'attributes':>12}{'exact':>7}"
    print(f"\n{'':40}{'held-out scenes':>25}{'colour-shape pairs never seen':>34}")
    print(f"{'':40}{columns:>25}{columns:>34}")
    for title, splits in report["results"].items():
        cells = [
            f"{r['loss']:6.3f}{r['attributes']:12.1%}{r['exact']:7.0%}" for r in splits.values()
        ]
        print(f"{title:40}{cells[0]:>25}" + "".join(f"{cell:>34}" for cell in cells[1:]))
    print(f"{report['seconds']:.0f} seconds, seed {report['seed']}")


def main(argv: Sequence[str] | None = None) -> int:
    description = (__doc__ or "").splitlines()[0]
    args = common.argument_parser(description, "quickstart", images=3000, judged=60).parse_args(
        argv
    )
    common.prepare_workdir(args, ("base", "stage1", "stage2", "shapes", EVALUATION))
    Quickstart(args.workdir, args.seed, args.images, args.judged).run()
    return 0


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and end the process; a UserError becomes one line on stderr."""
    errors.run(lambda: main(argv))
