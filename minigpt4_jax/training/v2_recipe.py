"""What the trainings of MiniGPT-v2 have in common: their datasets, and settings that no stage changes.

The recipes themselves are configs/v2_stage1.py, v2_stage2.py, v2_stage3.py and v2_finetune.py. This is not
beside them, as `configs` may be a folder of the user's own where a config file is run.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ml_collections import ConfigDict


class Published(NamedTuple):
    """A dataset as the released training (minigptv2_finetune.yaml) mixes it."""

    name: str  # of its reader
    ratio: int  # of turns
    batch_size: int  # of a batch of this dataset
    path: str  # its files, below config.data.root
    images: str = ""  # its pictures, where they are not published with it


_COCO = "coco/images"  # train2014

# Web captions, in the ratio of stage 1 of MiniGPT-4.
WEB = (
    Published("laion", 115, 64, "laion/laion_dataset/{00000..10488}.tar"),
    Published("cc_sbu", 14, 64, "cc_sbu/cc_sbu_dataset/{00000..01255}.tar"),
)
# Precisely labelled: captions, places, questions.
TASKS = (
    Published("coco_caption", 10, 6, "coco_captions/annotations", _COCO),
    Published("textcaps_caption", 30, 6, "textcaps"),
    Published("refcoco", 25, 6, "refcoco_annotations", _COCO),
    Published("refcocop", 25, 6, "refcoco_annotations", _COCO),
    Published("refcocog", 25, 6, "refcoco_annotations", _COCO),
    Published("invrefcoco", 10, 6, "refcoco_annotations", _COCO),
    Published("invrefcocop", 10, 6, "refcoco_annotations", _COCO),
    Published("invrefcocog", 10, 6, "refcoco_annotations", _COCO),
    Published("refvg", 40, 6, "visual_genome"),
    Published("coco_vqa", 15, 6, "vqav2", _COCO),
    Published("ok_vqa", 8, 6, "okvqa", _COCO),
    Published("aok_vqa", 12, 6, "aokvqa", _COCO),
    Published("gqa", 50, 6, "gqa"),
    Published("ocrvqa", 30, 6, "ocrvqa"),
)
# Dialogues, instructions and grounded descriptions.
TALK = (
    Published("multitask_conversation", 50, 2, "multitask_conversation", _COCO),
    Published("llava_conversation", 30, 2, "llava", _COCO),
    Published("unnatural_instruction", 10, 1, "unnatural_instructions"),
    Published("llava_detail", 20, 4, "llava", _COCO),
    Published("llava_reason", 80, 4, "llava", _COCO),
    Published("flickr_grounded_caption", 80, 2, "filtered_flickr"),
    Published("flickr_CaptionToPhrase", 80, 2, "filtered_flickr"),
    Published("flickr_ObjectToPhrase", 80, 2, "filtered_flickr"),
)


def recipe(datasets: Sequence[Published], *, own_batches: bool = False) -> ConfigDict:
    """A configuration that mixes these by their ratios; a stage adds its steps, batch and rates.

    own_batches: each dataset has batches of its own size, not of `batch_size`."""
    c = ConfigDict()
    c.model = ""  # model directory; of a later stage, what the stage before left
    c.variant = "minigpt-v2"

    c.data = ConfigDict()
    c.data.root = ""
    c.data.mix_by = "step"  # one dataset a batch, drawn by its ratio
    c.data.mix = ConfigDict()
    for d in datasets:
        mixed = {"ratio": float(d.ratio), "path": d.path, "images": d.images}
        c.data.mix[d.name] = mixed | ({"batch_size": d.batch_size} if own_batches else {})
    c.data.workers = 8

    c.end_symbol = "</s>"
    c.max_text_length = 1024

    c.freeze_vit = True  # LoRA on q and v of the model, and the projection, are trained
    c.dtype = "bfloat16"
    c.remat = True
    c.seed = 42

    c.schedule = "cosine"
    c.warmup_lr = 1e-6
    c.warmup_steps = 1000
    c.steps_per_epoch = 1000
    c.weight_decay = 0.05
    c.beta1 = 0.9
    c.beta2 = 0.999

    c.log_every = 50
    c.eval_every = 0
    c.sample_every = 0
    c.save_every = 1000
    c.keep = 3
    return c
