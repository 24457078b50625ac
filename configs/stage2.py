"""Stage 2 of MiniGPT-4: the same projection learns to answer in the chat format, on 3,439 detailed
descriptions (cc_sbu_align). 7 minutes on one A100 in the paper.

    python -m minigpt4_jax.train --config=stage2 --workdir=DIR --config.model=MODEL \
        --config.data.path=DIR

The argument selects the language model: `stage2` Vicuna 7B, `stage2:vicuna13b`, `stage2:llama2`.
`stage2:any` applies the recipe to any other model, with its own prompt format: BLIP-2 with OPT or FlanT5, or
another chat model with BLIP-2's Q-Former. MODEL is the directory of the stage-1 model.
"""

from ml_collections import ConfigDict

from minigpt4_jax.training.recipes import (
    ALIGNMENT_PROMPTS,
    LANGUAGE_MODELS,
    check_argument,
    minigpt4,
)


def get_config(arg: str = "") -> ConfigDict:
    check_argument(arg, (*LANGUAGE_MODELS, "any"))
    c = minigpt4("" if arg == "any" else arg)

    c.data.prompts = ALIGNMENT_PROMPTS  # one is drawn for each batch
    c.end_symbol = "</s>" if arg == "llama2" else "###"
    if arg == "any":
        c.variant, c.end_symbol = "", ""  # any; the model's own
    c.max_text_length = 160

    c.steps = 1000  # 5 "epochs" of 200; the paper says 400
    c.batch_size = 12
    c.accumulate = 2 if arg == "vicuna13b" else 1

    c.init_lr = 3e-5
    c.min_lr = 1e-5
    c.warmup_steps = 200
    c.steps_per_epoch = 200

    c.eval_every = 100
    c.sample_every = 100
    c.sample_tokens = 120
    return c
