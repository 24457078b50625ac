"""Stage 1 of MiniGPT-4: align the projection with the language model on millions of web captions.

    python -m minigpt4_jax.train --config=stage1 --workdir=DIR --config.model=MODEL \
        --config.data.path=FILE

The argument selects the language model: `stage1` Vicuna 7B, `stage1:vicuna13b`, `stage1:llama2`.
MODEL is made by `python -m convert build`.
"""

from ml_collections import ConfigDict

from minigpt4_jax.training.recipes import minigpt4


def get_config(arg: str = "") -> ConfigDict:
    c = minigpt4(arg)

    # No prompts: a row is the visual tokens followed by the caption.
    c.data.clean_captions = True  # BLIP's caption processor: lower case, no punctuation, 50 words
    c.end_symbol = "\n"
    c.max_text_length = 32

    c.steps = 20_000  # 4 "epochs" of 5000
    c.batch_size = 256  # the original: 4 GPUs x 64
    c.accumulate = 8 if arg == "vicuna13b" else 4
    c.remat = arg == "vicuna13b"

    c.init_lr = 1e-4
    c.min_lr = 8e-5
    c.warmup_steps = 5000
    c.steps_per_epoch = 5000

    c.log_every = 50
    c.eval_every = 1000
    c.sample_every = 1000
    c.sample_tokens = 32
    c.save_every = 1000
    return c
