"""Stage 1 of MiniGPT-v2: broad knowledge, from web captions and from precisely labelled data
together, at 448 px as in all its stages.

    python -m minigpt4_jax.train --config=v2_stage1 --workdir=DIR --config.model=MODEL \
        --config.data.root=DATA

DATA holds the datasets as the original's instructions lay them out (README.md has the table); a dataset
that lies elsewhere is named by, say, --config.data.mix.gqa.path=DIR, and one that is not at hand is left
out by --config.data.mix.gqa.ratio=0.
"""

from ml_collections import ConfigDict

from minigpt4_jax.training.v2_recipe import TASKS, WEB, recipe


def get_config(arg: str = "") -> ConfigDict:
    if arg:
        raise ValueError(f"unknown argument {arg!r}; v2_stage1 takes none")
    # The paper gives no ratios for this stage. Web captions: as in stage 1 of MiniGPT-4; the rest: as in the
    # released mixture. The paper also has GRIT-20M, which has no reader here.
    c = recipe(WEB + TASKS)
    c.model = ""  # made by `python -m convert build --variant=minigpt-v2`
    c.steps = 400_000
    c.batch_size = 96
    c.accumulate = 16  # parts of 6 rows; 1 where the devices hold 96 together
    c.init_lr = 1e-4
    c.min_lr = 1e-5  # the paper names the highest rate alone
    return c
