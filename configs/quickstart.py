"""`make quickstart`: the two stages in small. SmolLM2-135M stays frozen, and so does the demonstration's
vision side; the projection (128 -> 576) alone is trained, on generated scenes of coloured shapes.

The argument selects the stage: `quickstart:stage1` (short captions, the bare image in front) and
`quickstart:stage2` (detailed descriptions in the language model's chat format).
"""

from ml_collections import ConfigDict


def get_config(arg: str = "stage1") -> ConfigDict:
    if arg not in ("stage1", "stage2"):
        raise ValueError(f"unknown argument {arg!r}; known are stage1, stage2")
    stage2 = arg == "stage2"
    c = ConfigDict()

    c.model = ""  # model directory
    c.data = ConfigDict()
    c.data.path = ()
    c.data.val_path = ()
    c.data.prompts = (
        (
            "<Img><ImageHere></Img> Describe this image in detail.",
            "<Img><ImageHere></Img> Take a look at this image and describe what you notice.",
            "<Img><ImageHere></Img> Please provide a detailed description of the picture.",
            "<Img><ImageHere></Img> Could you describe the contents of this image for me?",
        )
        if stage2
        else ()
    )
    c.data.shuffle = False  # the rows have an order of their own: few objects first
    c.data.pad_tokens = 16 if stage2 else 8  # short rows: tight padding is worth three programs
    c.data.pad_answers = 16 if stage2 else 8

    c.end_symbol = "<|im_end|>" if stage2 else "\n"
    c.max_text_length = 96 if stage2 else 40
    c.dtype = "float32"  # the fastest on a CPU without bfloat16 units

    c.steps = 400 if stage2 else 370
    c.batch_size = 4  # many small steps: there is time for two thousand rows only
    c.seed = 42

    # Two thousand examples instead of the paper's five million, so a rate a thousand times higher: the vision
    # side names each word by one large value in a dimension of its own, and bears it.
    c.init_lr = 0.1 if stage2 else 0.15
    c.min_lr = 1e-3
    c.warmup_lr = 1e-5
    c.warmup_steps = 10
    c.weight_decay = 0.0
    c.beta2 = 0.98
    c.clip = 1.0

    c.log_every = 20
    c.eval_every = 0
    c.sample_every = 0
    c.save_every = 100
    c.keep = 1
    return c
