"""Stage 1 of MiniGPT-4: the projection learns to put images into the language model's words, on
millions of web captions, with nothing but the image in front of the caption.

    python -m minigpt4_jax.train --config=stage1 --workdir=DIR --config.model=MODEL \
        --config.data.path=FILE

The argument selects the language model: `stage1` Vicuna 7B, `stage1:vicuna13b`, `stage1:llama2`.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    known = ("", "vicuna7b", "vicuna13b", "llama2")
    if arg not in known:
        raise ValueError(f"unknown argument {arg!r}; known are {', '.join(known[1:])}")
    c = ConfigDict()

    c.model = ""  # model directory
    c.variant = "minigpt4-llama2" if arg == "llama2" else "minigpt4-vicuna"
    c.llm_width = 5120 if arg == "vicuna13b" else 0  # 0: any

    c.data = ConfigDict()
    c.data.path = ()  # several may be given; rows are drawn from all alike
    c.data.val_path = ()
    c.data.prompts = ()  # none: the row is the bare visual tokens and the caption
    c.data.clean_captions = True  # blip_caption: lower case, no punctuation, at most 50 words
    c.data.workers = 0

    c.end_symbol = "\n"
    c.max_text_length = 32

    c.freeze_vit = True
    c.freeze_qformer = True
    c.dtype = "bfloat16"
    c.remat = arg == "vicuna13b"

    c.steps = 20_000  # 4 "epochs" of 5000
    c.batch_size = 256  # the original: 4 cards of 64
    c.accumulate = 8 if arg == "vicuna13b" else 4
    c.seed = 42

    c.schedule = "cosine"
    c.init_lr = 1e-4
    c.min_lr = 8e-5
    c.warmup_lr = 1e-6
    c.warmup_steps = 5000
    c.steps_per_epoch = 5000
    c.weight_decay = 0.05
    c.beta1 = 0.9
    c.beta2 = 0.999

    c.log_every = 50
    c.eval_every = 1000
    c.sample_every = 1000
    c.sample_tokens = 32
    c.save_every = 1000
    c.keep = 3
    return c
