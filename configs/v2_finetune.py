"""The released training of MiniGPT-v2 (its minigptv2_finetune.yaml): all of its tasks and
conversations, mixed, from a released checkpoint or the stage-2 model.

    python -m minigpt4_jax.train --config=v2_finetune --workdir=DIR --config.model=MODEL \
        --config.data.root=DATA

DATA holds the datasets as the original's instructions lay them out (README.md has the table); a dataset
that lies elsewhere is named by, say, --config.data.mix.gqa.path=DIR, and one that is not at hand is left
out by --config.data.mix.gqa.ratio=0.
"""

from ml_collections import ConfigDict

from minigpt4_jax.training.v2_recipe import TALK, TASKS, recipe


def get_config(arg: str = "") -> ConfigDict:
    if arg:
        raise ValueError(f"unknown argument {arg!r}; v2_finetune takes none")
    c = recipe(TALK + TASKS, own_batches=True)
    c.model = ""  # a released checkpoint, converted, or the stage-2 model
    c.steps = 50_000  # 50 "epochs" of 1000
    c.batch_size = 6  # of a dataset that names none of its own
    c.accumulate = 1
    c.init_lr = 1e-5
    c.min_lr = 1e-6
    return c
