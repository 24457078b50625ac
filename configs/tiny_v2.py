"""MiniGPT-v2 in small: all its tasks on generated images, on a CPU in half an hour.

LoRA on SmolLM2-135M and a projection of the demonstration's image patches are trained together.

    python -m minigpt4_jax.tiny_v2 --workdir=tiny_v2      # everything, evaluated before and after
    python -m minigpt4_jax.tiny_v2 --workdir=tiny_v2 --prepare      # or prepare, then only train:
    python -m minigpt4_jax.train --config=tiny_v2 --workdir=tiny_v2/run
"""

from ml_collections import ConfigDict

from minigpt4_jax.training.recipes import check_argument, demo


def get_config(arg: str = "") -> ConfigDict:
    check_argument(arg)
    c = demo()
    c.model = "tiny_v2/base"  # made by --prepare
    c.variant = "minigpt-v2"

    c.data.path = ("tiny_v2/rows.jsonl",)
    c.data.pad_tokens = 16
    c.data.pad_answers = 16

    # Eleven thousand questions instead of the paper's millions. The patch encoder represents each word by
    # one large value, so that this learning rate suits the projection as well as LoRA.
    c.steps = 1303
    c.init_lr = 2e-3
    c.min_lr = 1e-4
    c.warmup_steps = 20

    c.save_every = 300
    return c
