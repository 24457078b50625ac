"""The v2 configurations: the published ratios, rates and batch sizes, and datasets found below one folder as
the original's instructions lay them out."""

import os
import pickle

import numpy as np
import pytest
from layouts import Disk

from minigpt4_jax.training import config as configs
from minigpt4_jax.training.datasets import open_parts

pytestmark = pytest.mark.smoke
CAT = "COCO_train2014_000000000007.jpg"
TASKS = {
    "coco_caption": (10, 6), "textcaps_caption": (30, 6), "coco_vqa": (15, 6), "ok_vqa": (8, 6),
    "aok_vqa": (12, 6), "gqa": (50, 6), "ocrvqa": (30, 6), "refcoco": (25, 6), "refcocop": (25, 6),
    "refcocog": (25, 6), "invrefcoco": (10, 6), "invrefcocop": (10, 6), "invrefcocog": (10, 6),
    "refvg": (40, 6),
}  # fmt: skip
TALK = {
    "flickr_grounded_caption": (80, 2), "flickr_CaptionToPhrase": (80, 2),
    "flickr_ObjectToPhrase": (80, 2), "llava_detail": (20, 4), "llava_reason": (80, 4),
    "llava_conversation": (30, 2), "multitask_conversation": (50, 2),
    "unnatural_instruction": (10, 1),
}  # fmt: skip
WEB = {"laion": (115, 64), "cc_sbu": (14, 64)}


def parse(name, *args):
    args = [f"--config={name}", "--workdir=w", "--config.model=m", "--config.data.root=d", *args]
    return configs.parse(args)[0]


def test_the_released_mixture():
    c = parse("v2_finetune")
    assert {n: (d.ratio, d.batch_size) for n, d in c.data.mix.items()} == TASKS | TALK
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
        (3, 35_000, 24, 1e-5, TASKS | TALK),
    ],
)
def test_the_stages_of_the_paper(stage, steps, batch, lr, mix):
    c = parse(f"v2_stage{stage}")
    assert (c.steps, c.batch_size, c.init_lr) == (steps, batch, lr)
    assert {n: d.ratio for n, d in c.data.mix.items()} == {n: r for n, (r, _) in mix.items()}
    assert all(d.batch_size == 0 for d in c.data.mix.values())


def write_everything(disk):
    """A row of each dataset, below one folder."""
    disk.picture(f"coco/images/{CAT}")
    coco = {"image": f"train2014/{CAT}", "question": "What?"}
    disk.json("coco_captions/annotations/coco_karpathy_train.json", [{**coco, "caption": "A cat"}])
    for name in ("vqav2/vqa_train", "vqav2/vqa_val", "okvqa/okvqa_train"):
        disk.json(f"{name}.json", [{**coco, "answer": ["cat"]}])
    disk.json("aokvqa/aokvqa_v1p0_train.json", [{**coco, "direct_answers": ["cat"]}])
    for picture in ("textcaps/train_images/7.jpg", "gqa/images/7.jpg", "ocrvqa/images/7.jpg"):
        disk.picture(picture)
    disk.json("textcaps/TextCaps_0.1_train.json", {"data": [{"image_id": "7", "caption_str": "A"}]})
    disk.json("gqa/train_balanced_questions.json", [{**coco, "image": "7.jpg", "answer": "cat"}])
    book = {"imageURL": "a/b.jpg", "split": 1, "questions": ["What?"], "answers": ["cat"]}
    disk.json("ocrvqa/dataset.json", {"7": book})
    instances = {
        "images": [{"id": 7, "width": 8, "height": 6}],
        "annotations": [{"id": 1, "bbox": [1, 1, 4, 4]}],
    }
    ref = {"image_id": 7, "ann_id": 1, "split": "train", "sentences": [{"raw": "it"}]}
    for name, split in (("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd")):
        disk.json(f"refcoco_annotations/{name}/instances.json", instances)
        disk.bytes(f"refcoco_annotations/{name}/refs({split}).p", pickle.dumps([ref]))
    disk.picture("visual_genome/VG_100K/7.jpg")
    region = {"x": 1, "y": 1, "width": 4, "height": 4, "phrase": "it"}
    disk.json("visual_genome/region_descriptions.json", [{"id": 7, "regions": [region]}])
    size = {"image_id": 7, "width": 8, "height": 6, "url": "http://a/VG_100K/7.jpg"}
    disk.json("visual_genome/image_data.json", [size])
    disk.picture("filtered_flickr/images/7.jpg")
    texts = {"grounded_caption": "a", "caption": "a", "output": "a", "phrase": "a", "bbox": "a"}
    for name in ("groundedcaption", "captiontobbox", "phrasetobbox"):
        disk.json(f"filtered_flickr/{name}.json", [{"image_id": "7", **texts}])
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
    talk = [{"id": "000000000007", "conversations": turns}]
    for name in ("detail_23k", "complex_reasoning_77k", "conversation_58k"):
        disk.json(f"llava/{name}.json", talk)
    disk.json("multitask_conversation/multi_task_conversation.json", talk)
    task = {"instruction_with_input": "Say a.", "constraints": None, "output": "a"}
    disk.json("unnatural_instructions/filtered_unnatural_instruction.json", [{"instances": [task]}])


@pytest.mark.parametrize("name", ["v2_stage1", "v2_stage2", "v2_stage3", "v2_finetune"])
def test_every_dataset_is_found_below_the_root(tmp_path, name):
    write_everything(Disk(tmp_path))
    without = [f"--config.data.mix.{web}.ratio=0" for web in WEB] if name == "v2_stage1" else []
    c = parse(name, f"--config.data.root={tmp_path}", *without)
    parts = open_parts(c.data)
    assert {part.name for part in parts} == {n for n, d in c.data.mix.items() if d.ratio > 0}
    for part in parts:
        example = part.source.example(0, np.random.default_rng(0))
        assert all(os.path.isfile(image) for image in example.images)
        assert part.source.dropped == {}
        assert len(example.images) == (part.name != "unnatural_instruction")
