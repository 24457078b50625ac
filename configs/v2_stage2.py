"""Stage 2 of MiniGPT-v2: fine-grained datasets only, to improve on each task.

    python -m minigpt4_jax.train --config=v2_stage2 --workdir=DIR --config.model=MODEL \
        --config.data.root=DATA

MODEL is the directory of the stage-1 model. How DATA is laid out, and how to move or leave out a dataset:
minigpt4_jax/training/recipes.py.
"""

from ml_collections import ConfigDict

from minigpt4_jax.training.recipes import TASKS, minigpt_v2


def get_config(arg: str = "") -> ConfigDict:
    c = minigpt_v2(arg, TASKS)  # the paper gives no ratios: those of the released mixture
    c.steps = 50_000
    c.batch_size = 64
    c.accumulate = 16  # micro-batches of 4 rows; 1 if the devices together hold 64
    c.init_lr = 1e-5
    c.min_lr = 1e-6  # the paper gives only the peak learning rate
    return c
