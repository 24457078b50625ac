"""`make quickstart`: both stages of MiniGPT-4 in small, on generated images of coloured shapes.

Only the projection (128 -> 576) is trained. SmolLM2-135M and the demonstration's vision encoder stay
frozen. The argument selects the stage: `quickstart:stage1` (short captions, no prompt) or
`quickstart:stage2` (detailed descriptions in the language model's chat format). `quickstart:qformer` is
stage 1 as BLIP-2 trains it, for `make compare`: the Q-Former learns too.
"""

from ml_collections import ConfigDict

from minigpt4_jax.training.recipes import ALIGNMENT_PROMPTS, check_argument, demo

PROJECTION_LR, QFORMER_LR = 0.15, 1e-4  # of stage 1; the latter is BLIP-2's


def get_config(arg: str = "stage1") -> ConfigDict:
    check_argument(arg, ("stage1", "stage2", "qformer"))
    stage2 = arg == "stage2"
    c = demo()

    c.data.prompts = ALIGNMENT_PROMPTS if stage2 else ()
    c.data.pad_tokens = 16 if stage2 else 8  # tight padding of short rows is worth three programs
    c.data.pad_answers = 16 if stage2 else 8
    c.end_symbol = "<|im_end|>" if stage2 else "\n"
    c.max_text_length = 96 if stage2 else 40

    # Two thousand examples instead of the paper's five million, hence a learning rate a thousand times
    # higher. The vision encoder tolerates it: it represents each word by one large value in a dimension
    # of its own.
    c.steps = 400 if stage2 else 370
    c.init_lr = 0.1 if stage2 else PROJECTION_LR
    c.min_lr = 1e-3
    c.warmup_steps = 10
    if arg == "qformer":
        c.freeze_qformer = False
        c.qformer_lr_scale = QFORMER_LR / PROJECTION_LR
    return c
