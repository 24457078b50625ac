"""Stage 1 of MiniGPT-v2: broad knowledge, from web captions and fine-grained datasets together.

    python -m minigpt4_jax.train --config=v2_stage1 --workdir=DIR --config.model=MODEL \
        --config.data.root=DATA

MODEL is made by `python -m convert build --variant=minigpt-v2`. How DATA is laid out, and how to move or
leave out a dataset: minigpt4_jax/training/recipes.py.
"""

from ml_collections import ConfigDict

from minigpt4_jax.training.recipes import TASKS, WEB, minigpt_v2


def get_config(arg: str = "") -> ConfigDict:
    # The paper gives no ratios: web captions as in stage 1 of MiniGPT-4, the rest as in the released
    # mixture. The paper also uses GRIT-20M, which has no reader here.
    c = minigpt_v2(arg, WEB + TASKS)
    c.steps = 400_000
    c.batch_size = 96
    c.accumulate = 16  # micro-batches of 6 rows; 1 if the devices together hold 96
    c.init_lr = 1e-4
    c.min_lr = 1e-5  # the paper gives only the peak learning rate
    return c
