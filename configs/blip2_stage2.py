"""Stage 2 of BLIP-2: the Q-Former and a projection learn to speak to a frozen language model.

    python -m minigpt4_jax.train --config=blip2_stage2:opt2.7b --workdir=DIR --config.model=MODEL \
        --config.data.path=FILE

The argument names the language model: opt2.7b (the default), opt6.7b, flant5xl, flant5xxl. MODEL is made by
`python -m convert build --variant=blip2-opt` (or blip2-flant5) from a Q-Former of stage 1.
"""

from ml_collections import ConfigDict

from minigpt4_jax.training.recipes import BLIP2_LANGUAGE_MODELS, blip2, check_argument


def get_config(arg: str = "") -> ConfigDict:
    check_argument(arg, tuple(BLIP2_LANGUAGE_MODELS))
    c = blip2()
    c.variant, c.llm_width = BLIP2_LANGUAGE_MODELS[arg or "opt2.7b"]

    c.steps = 13560  # 10 epochs
    c.batch_size = 1024  # the original: 16 GPUs x 64
    c.accumulate = 8 if arg.endswith(("xxl", "6.7b")) else 4
    c.warmup_steps = 2000
    return c
