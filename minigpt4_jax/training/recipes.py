"""What the shipped configurations share; the files in `configs/` say what each of them adds.

Every recipe starts from the defaults of `training.config.TrainConfig`. It lives in the package because
`configs` may also be the name of a user's own folder.

Layout of the folder `config.data.root` for MiniGPT-v2: each `path` and `images` of a `PublishedDataset` is
below it. If a dataset lies elsewhere, set its path, for example `--config.data.mix.gqa.path=DIR`; to
leave one out, set its ratio to 0: `--config.data.mix.gqa.ratio=0`.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from minigpt4_jax.processing.chat_templates import STAGE2_PROMPTS

ALIGNMENT_PROMPTS = STAGE2_PROMPTS  # "Describe this image in detail." and three more
LANGUAGE_MODELS = ("vicuna7b", "vicuna13b", "llama2")  # of MiniGPT-4


def check_argument(arg: str, known: Sequence[str] = ()) -> None:
    """ValueError if ARG of `--config=NAME:ARG` is none of the known ones; "" is always known."""
    if arg and arg not in known:
        raise ValueError(
            f"unknown argument {arg!r}; expected {', '.join(known) if known else 'no argument'}"
        )


def minigpt4(language_model: str) -> ConfigDict:
    """Both stages of MiniGPT-4: only the projection is trained.

    language_model: one of LANGUAGE_MODELS, "" for vicuna7b. ValueError for any other.
    """
    check_argument(language_model, LANGUAGE_MODELS)
    c = ConfigDict()
    c.model = ""  # model directory
    c.variant = "minigpt4-llama2" if language_model == "llama2" else "minigpt4-vicuna"
    c.llm_width = 5120 if language_model == "vicuna13b" else 0  # 0: any
    c.data = ConfigDict()
    return c


# Language models of BLIP-2's second stage: variant, and width of the language model.
BLIP2_LANGUAGE_MODELS = {
    "opt2.7b": ("blip2-opt", 2560), "opt6.7b": ("blip2-opt", 4096),
    "flant5xl": ("blip2-flant5", 2048), "flant5xxl": ("blip2-flant5", 4096),
}  # fmt: skip


def blip2() -> ConfigDict:
    """Both stages of BLIP-2 (LAVIS' configurations): the Q-Former and ln_vision are trained on captions of
    COCO and Visual Genome, cropped and mirrored at random, in 10 epochs."""
    c = ConfigDict()
    c.model = ""  # model directory
    c.data = ConfigDict()
    c.data.clean_captions = True
    c.data.crop = True
    c.data.flip = True
    c.freeze_qformer = False

    c.init_lr = 1e-4
    c.min_lr = 1e-5
    c.warmup_lr = 1e-6
    c.weight_decay = 0.05

    c.log_every = 50
    c.eval_every = 1000
    c.sample_every = 1000
    c.sample_tokens = 30
    c.save_every = 1000
    return c


class PublishedDataset(NamedTuple):
    """A dataset as the released training of MiniGPT-v2 (minigptv2_finetune.yaml) mixes it."""

    name: str  # also the name of its reader
    ratio: int  # share of the batches, relative to the other ratios
    batch_size: int  # of a batch of this dataset
    path: str  # annotations, below config.data.root
    images: str = ""  # image folder below config.data.root, unless published with the annotations


_COCO = "coco/images"  # train2014

# Web captions, with the ratios of stage 1 of MiniGPT-4.
WEB = (
    PublishedDataset("laion", 115, 64, "laion/laion_dataset/{00000..10488}.tar"),
    PublishedDataset("cc_sbu", 14, 64, "cc_sbu/cc_sbu_dataset/{00000..01255}.tar"),
)
# Fine-grained datasets: captions, referring expressions, questions.
TASKS = (
    PublishedDataset("coco_caption", 10, 6, "coco_captions/annotations", _COCO),
    PublishedDataset("textcaps_caption", 30, 6, "textcaps"),
    PublishedDataset("refcoco", 25, 6, "refcoco_annotations", _COCO),
    PublishedDataset("refcocop", 25, 6, "refcoco_annotations", _COCO),
    PublishedDataset("refcocog", 25, 6, "refcoco_annotations", _COCO),
    PublishedDataset("invrefcoco", 10, 6, "refcoco_annotations", _COCO),
    PublishedDataset("invrefcocop", 10, 6, "refcoco_annotations", _COCO),
    PublishedDataset("invrefcocog", 10, 6, "refcoco_annotations", _COCO),
    PublishedDataset("refvg", 40, 6, "visual_genome"),
    PublishedDataset("coco_vqa", 15, 6, "vqav2", _COCO),
    PublishedDataset("ok_vqa", 8, 6, "okvqa", _COCO),
    PublishedDataset("aok_vqa", 12, 6, "aokvqa", _COCO),
    PublishedDataset("gqa", 50, 6, "gqa"),
    PublishedDataset("ocrvqa", 30, 6, "ocrvqa"),
)
# Conversations, instructions and grounded descriptions.
INSTRUCTIONS = (
    PublishedDataset("multitask_conversation", 50, 2, "multitask_conversation", _COCO),
    PublishedDataset("llava_conversation", 30, 2, "llava", _COCO),
    PublishedDataset("unnatural_instruction", 10, 1, "unnatural_instructions"),
    PublishedDataset("llava_detail", 20, 4, "llava", _COCO),
    PublishedDataset("llava_reason", 80, 4, "llava", _COCO),
    PublishedDataset("flickr_grounded_caption", 80, 2, "filtered_flickr"),
    PublishedDataset("flickr_CaptionToPhrase", 80, 2, "filtered_flickr"),
    PublishedDataset("flickr_ObjectToPhrase", 80, 2, "filtered_flickr"),
)


def minigpt_v2(
    arg: str, datasets: Sequence[PublishedDataset], *, own_batch_sizes: bool = False
) -> ConfigDict:
    """All stages of MiniGPT-v2: the projection and LoRA on q and v are trained, at 448 pixels.

    arg: what `--config=NAME:ARG` gave; ValueError unless empty. datasets: mixed by their ratios.
    own_batch_sizes: each dataset uses its published batch size instead of `batch_size`.
    """
    check_argument(arg)
    c = ConfigDict()
    c.model = ""  # model directory
    c.variant = "minigpt-v2"

    c.data = ConfigDict()
    c.data.root = ""
    c.data.mix_by = "step"  # every batch comes from one dataset
    c.data.mix = ConfigDict()
    for d in datasets:
        c.data.mix[d.name] = {"ratio": float(d.ratio), "path": d.path, "images": d.images}
        if own_batch_sizes:
            c.data.mix[d.name].batch_size = d.batch_size
    c.data.workers = 8

    c.end_symbol = "</s>"
    c.max_text_length = 1024
    c.remat = True

    c.warmup_steps = 1000
    c.steps_per_epoch = 1000

    c.log_every = 50
    c.eval_every = 0
    c.sample_every = 0
    c.save_every = 1000
    return c


def demo() -> ConfigDict:
    """The demonstrations: a small model trained on generated images, on a CPU, in minutes."""
    c = ConfigDict()
    c.model = ""  # model directory
    c.data = ConfigDict()
    c.data.shuffle = False  # curriculum: images with few objects come first
    c.dtype = "float32"  # the fastest on a CPU without bfloat16 units
    c.batch_size = 4  # many small steps: there is only time for a few thousand rows

    c.warmup_lr = 1e-5
    c.weight_decay = 0.0
    c.beta2 = 0.98
    c.clip = 1.0

    c.log_every = 20
    c.eval_every = 0
    c.sample_every = 0
    c.keep = 1
    return c
