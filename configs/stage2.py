"""Stage 2 of MiniGPT-4: the same projection learns to answer, on 3,439 detailed descriptions in the
chat format (cc_sbu_align). 7 minutes on one A100 in the paper.

    python -m minigpt4_jax.train --config=stage2 --workdir=DIR --config.model=MODEL \
        --config.data.path=DIR

The argument selects the language model: `stage2` Vicuna 7B, `stage2:vicuna13b`, `stage2:llama2`.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    known = ("", "vicuna7b", "vicuna13b", "llama2")
    if arg not in known:
        raise ValueError(f"unknown argument {arg!r}; known are {', '.join(known[1:])}")
    llama2 = arg == "llama2"
    c = ConfigDict()

    c.model = ""  # directory of the stage-1 model
    c.variant = "minigpt4-llama2" if llama2 else "minigpt4-vicuna"
    c.llm_width = 5120 if arg == "vicuna13b" else 0  # 0: any

    c.data = ConfigDict()
    c.data.path = ()  # a directory with filter_cap.json and image/, .json or .jsonl; or several
    c.data.val_path = ()
    c.data.prompts = (  # the original's prompts/alignment.txt: one is drawn for each batch
        "<Img><ImageHere></Img> Describe this image in detail.",
        "<Img><ImageHere></Img> Take a look at this image and describe what you notice.",
        "<Img><ImageHere></Img> Please provide a detailed description of the picture.",
        "<Img><ImageHere></Img> Could you describe the contents of this image for me?",
    )
    c.data.clean_captions = False
    c.data.workers = 0

    c.end_symbol = "</s>" if llama2 else "###"
    c.max_text_length = 160

    c.freeze_vit = True
    c.freeze_qformer = True
    c.dtype = "bfloat16"
    c.remat = False

    c.steps = 1000  # 5 "epochs" of 200; the paper says 400
    c.batch_size = 12
    c.accumulate = 2 if arg == "vicuna13b" else 1
    c.seed = 42

    c.schedule = "cosine"
    c.init_lr = 3e-5
    c.min_lr = 1e-5
    c.warmup_lr = 1e-6
    c.warmup_steps = 200
    c.steps_per_epoch = 200
    c.weight_decay = 0.05
    c.beta1 = 0.9
    c.beta2 = 0.999

    c.log_every = 10
    c.eval_every = 100
    c.sample_every = 100
    c.sample_tokens = 120
    c.save_every = 100
    c.keep = 3
    return c
