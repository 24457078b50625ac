"""Stage 3 of MiniGPT-v2: conversations and instructions join, so that it chats.

    python -m minigpt4_jax.train --config=v2_stage3 --workdir=DIR --config.model=MODEL \
        --config.data.root=DATA

DATA holds the datasets as the original's instructions lay them out (README.md has the table); a dataset
that lies elsewhere is named by, say, --config.data.mix.gqa.path=DIR, and one that is not at hand is left
out by --config.data.mix.gqa.ratio=0.
"""

from ml_collections import ConfigDict

from minigpt4_jax.training.v2_recipe import TALK, TASKS, recipe


def get_config(arg: str = "") -> ConfigDict:
    if arg:
        raise ValueError(f"unknown argument {arg!r}; v2_stage3 takes none")
    # The paper gives no ratios: those of the released mixture.
    c = recipe(TALK + TASKS)
    c.model = ""  # directory of the stage-2 model
    c.steps = 35_000
    c.batch_size = 24
    c.accumulate = 4  # parts of 6 rows; 1 where the devices hold 24 together
    c.init_lr = 1e-5
    c.min_lr = 1e-6  # the paper names the highest rate alone
    return c
