"""Stage 1 of BLIP-2: the Q-Former learns to read images by contrast, matching and captions.

    python -m minigpt4_jax.train --config=blip2_stage1 --workdir=DIR --config.model=MODEL \
        --config.data.path=FILE

`--config=blip2_stage1:coco` goes on with retrieval on COCO: the vision encoder is trained too, at 364 pixels
(`convert build --set image_size=364`), and captions of the same image are no negatives of each other. The
original lowers the learning rate of the vision encoder's first layers, which is not done here.

MODEL is made by `python -m convert build --variant=blip2-qformer`, for a new Q-Former with
`--qformer=DIR`, where DIR holds bert-base-uncased.
"""

from ml_collections import ConfigDict

from minigpt4_jax.training.recipes import blip2, check_argument


def get_config(arg: str = "") -> ConfigDict:
    check_argument(arg, ("coco",))
    c = blip2()
    c.variant = "blip2-qformer"

    c.steps = 8680  # 10 epochs of the 1.4 million captions of COCO and Visual Genome
    c.batch_size = 1600  # the original: 16 GPUs x 100; all rows are contrasted with each other
    c.warmup_steps = 5000
    if arg == "coco":
        c.data.image_ids = True
        c.freeze_vit = False
        c.init_lr, c.min_lr, c.warmup_lr = 1e-5, 0.0, 1e-8
        c.steps = 12650  # 5 epochs of the 567,000 captions of COCO
        c.batch_size = 224  # the original: 16 GPUs x 14
        c.warmup_steps = 1000
    return c
