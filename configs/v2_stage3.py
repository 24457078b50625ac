"""Stage 3 of MiniGPT-v2: conversations and instructions are added, so that it chats.

    python -m minigpt4_jax.train --config=v2_stage3 --workdir=DIR --config.model=MODEL \
        --config.data.root=DATA

MODEL is the directory of the stage-2 model. How DATA is laid out, and how to move or leave out a dataset:
minigpt4_jax/training/recipes.py.
"""

from ml_collections import ConfigDict

from minigpt4_jax.training.recipes import INSTRUCTIONS, TASKS, minigpt_v2


def get_config(arg: str = "") -> ConfigDict:
    c = minigpt_v2(arg, INSTRUCTIONS + TASKS)  # the paper gives no ratios: the released mixture's
    c.steps = 35_000
    c.batch_size = 24
    c.accumulate = 4  # micro-batches of 6 rows; 1 if the devices together hold 24
    c.init_lr = 1e-5
    c.min_lr = 1e-6  # the paper gives only the peak learning rate
    return c
