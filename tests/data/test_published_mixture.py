"""The configurations of MiniGPT-v2: published ratios, learning rates and batch sizes; datasets below one
folder, laid out as in the original's instructions."""

import os

import numpy as np
import pytest
from helpers.published_layouts import Disk, write_everything

from minigpt4_jax.data.readers import open_components
from minigpt4_jax.training.config_cli import parse as parse_config

pytestmark = pytest.mark.smoke
TASKS = {
    "coco_caption": (10, 6), "textcaps_caption": (30, 6), "coco_vqa": (15, 6), "ok_vqa": (8, 6),
    "aok_vqa": (12, 6), "gqa": (50, 6), "ocrvqa": (30, 6), "refcoco": (25, 6), "refcocop": (25, 6),
    "refcocog": (25, 6), "invrefcoco": (10, 6), "invrefcocop": (10, 6), "invrefcocog": (10, 6),
    "refvg": (40, 6),
}  # fmt: skip
INSTRUCTIONS = {
    "flickr_grounded_caption": (80, 2), "flickr_CaptionToPhrase": (80, 2),
    "flickr_ObjectToPhrase": (80, 2), "llava_detail": (20, 4), "llava_reason": (80, 4),
    "llava_conversation": (30, 2), "multitask_conversation": (50, 2),
    "unnatural_instruction": (10, 1),
}  # fmt: skip
WEB = {"laion": (115, 64), "cc_sbu": (14, 64)}


def parse(name, *args):
    args = [f"--config={name}", "--workdir=w", "--config.model=m", "--config.data.root=d", *args]
    return parse_config(args)[0]


def test_the_released_mixture():
    c = parse("v2_finetune")
    assert {n: (d.ratio, d.batch_size) for n, d in c.data.mix.items()} == TASKS | INSTRUCTIONS
    assert (c.init_lr, c.min_lr, c.warmup_lr, c.warmup_steps) == (1e-5, 1e-6, 1e-6, 1000)
    assert (c.steps, c.weight_decay, c.end_symbol, c.max_text_length) == (
        50_000,
        0.05,
        "</s>",
        1024,
    )
    assert c.variant == "minigpt-v2" and c.data.mix_by == "step" and c.data.root == "d"


@pytest.mark.parametrize(
    ("stage", "steps", "batch", "lr", "mix"),
    [
        (1, 400_000, 96, 1e-4, WEB | TASKS),
        (2, 50_000, 64, 1e-5, TASKS),
        (3, 35_000, 24, 1e-5, TASKS | INSTRUCTIONS),
    ],
)
def test_the_stages_of_the_paper(stage, steps, batch, lr, mix):
    c = parse(f"v2_stage{stage}")
    assert (c.steps, c.batch_size, c.init_lr) == (steps, batch, lr)
    assert {n: d.ratio for n, d in c.data.mix.items()} == {n: r for n, (r, _) in mix.items()}
    assert all(d.batch_size == 0 for d in c.data.mix.values())


@pytest.mark.parametrize("name", ["v2_stage1", "v2_stage2", "v2_stage3", "v2_finetune"])
def test_every_dataset_is_found_below_the_root(tmp_path, name):
    write_everything(Disk(tmp_path))
    without = [f"--config.data.mix.{web}.ratio=0" for web in WEB] if name == "v2_stage1" else []
    c = parse(name, f"--config.data.root={tmp_path}", *without)
    components = open_components(c.data)
    assert {component.name for component in components} == {
        n for n, d in c.data.mix.items() if d.ratio > 0
    }
    for component in components:
        example = component.source.example(0, np.random.default_rng(0))
        assert all(os.path.isfile(image) for image in example.images)
        assert component.source.dropped == {}
        assert len(example.images) == (component.name != "unnatural_instruction")
