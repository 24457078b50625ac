"""Stage 1 of BLIP-2: the Q-Former learns to read images by contrast, matching and captions.

    python -m minigpt4_jax.train --config=blip2_stage1 --workdir=DIR --config.model=MODEL \
        --config.data.path=FILE

MODEL is made by `python -m convert build --variant=blip2-qformer`, for a new Q-Former with
`--qformer=DIR`, where DIR holds bert-base-uncased.
"""

from ml_collections import ConfigDict

from minigpt4_jax.training.recipes import blip2, check_argument


def get_config(arg: str = "") -> ConfigDict:
    check_argument(arg)
    c = blip2()
    c.variant = "blip2-qformer"

    c.steps = 8680  # 10 epochs of the 1.4 million captions of COCO and Visual Genome
    c.batch_size = 1600  # the original: 16 GPUs x 100; all rows are contrasted with each other
    c.warmup_steps = 5000
    return c
