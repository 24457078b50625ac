"""The released training of MiniGPT-v2 (minigptv2_finetune.yaml): all tasks and conversations mixed.

    python -m minigpt4_jax.train --config=v2_finetune --workdir=DIR --config.model=MODEL \
        --config.data.root=DATA

MODEL is a converted released checkpoint or the stage-2 model. How DATA is laid out, and how to move or
leave out a dataset: minigpt4_jax/training/recipes.py.
"""

from ml_collections import ConfigDict

from minigpt4_jax.training.recipes import INSTRUCTIONS, TASKS, minigpt_v2


def get_config(arg: str = "") -> ConfigDict:
    c = minigpt_v2(arg, INSTRUCTIONS + TASKS, own_batch_sizes=True)
    c.steps = 50_000  # 50 "epochs" of 1000
    c.batch_size = 6  # of a dataset without a batch size of its own
    c.init_lr = 1e-5
    c.min_lr = 1e-6
    return c
