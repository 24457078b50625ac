"""The released training of MiniGPT-v2 (its minigptv2_finetune.yaml): all of its tasks and
conversations, mixed, from a released checkpoint or the stage-2 model.

    python -m minigpt4_jax.train --config=v2_finetune --workdir=DIR --config.model=MODEL \
        --config.data.root=DATA

DATA holds the datasets as the original's instructions lay them out (README.md has the table); a dataset
that lies elsewhere is named by, say, --config.data.mix.gqa.path=DIR, and one that is not at hand is left
out by --config.data.mix.gqa.ratio=0.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    if arg:
        raise ValueError(f"unknown argument {arg!r}; v2_finetune takes none")
    c = ConfigDict()

    c.model = ""  # model directory
    c.variant = "minigpt-v2"

    coco = "coco/images"  # train2014
    c.data = ConfigDict()
    c.data.root = ""
    c.data.mix_by = "step"  # one dataset a batch, drawn by its ratio
    c.data.mix = ConfigDict()
    for name, ratio, batch_size, path, images in (
        ("multitask_conversation", 50, 2, "multitask_conversation", coco),
        ("llava_conversation", 30, 2, "llava", coco),
        ("unnatural_instruction", 10, 1, "unnatural_instructions", ""),
        ("llava_detail", 20, 4, "llava", coco),
        ("llava_reason", 80, 4, "llava", coco),
        ("flickr_grounded_caption", 80, 2, "filtered_flickr", ""),
        ("flickr_CaptionToPhrase", 80, 2, "filtered_flickr", ""),
        ("flickr_ObjectToPhrase", 80, 2, "filtered_flickr", ""),
        ("coco_caption", 10, 6, "coco_captions/annotations", coco),
        ("textcaps_caption", 30, 6, "textcaps", ""),
        ("refcoco", 25, 6, "refcoco_annotations", coco),
        ("refcocop", 25, 6, "refcoco_annotations", coco),
        ("refcocog", 25, 6, "refcoco_annotations", coco),
        ("invrefcoco", 10, 6, "refcoco_annotations", coco),
        ("invrefcocop", 10, 6, "refcoco_annotations", coco),
        ("invrefcocog", 10, 6, "refcoco_annotations", coco),
        ("refvg", 40, 6, "visual_genome", ""),
        ("coco_vqa", 15, 6, "vqav2", coco),
        ("ok_vqa", 8, 6, "okvqa", coco),
        ("aok_vqa", 12, 6, "aokvqa", coco),
        ("gqa", 50, 6, "gqa", ""),
        ("ocrvqa", 30, 6, "ocrvqa", ""),
    ):
        c.data.mix[name] = {
            "ratio": float(ratio),
            "batch_size": batch_size,
            "path": path,
            "images": images,
        }
    c.data.workers = 8

    c.end_symbol = "</s>"
    c.max_text_length = 1024

    c.freeze_vit = True  # LoRA on q and v of the model, and the projection, are trained
    c.dtype = "bfloat16"
    c.remat = True

    c.steps = 50_000  # 50 "epochs" of 1000
    c.batch_size = 6  # of a dataset that names none of its own
    c.accumulate = 1
    c.seed = 42

    c.schedule = "cosine"
    c.init_lr = 1e-5
    c.min_lr = 1e-6
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
