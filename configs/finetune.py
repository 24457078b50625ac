"""Your own data on a trained model: name the model and a file.

    python -m minigpt4_jax.train --config=finetune --workdir=DIR --config.model=MODEL \
        --config.data.path=my.jsonl

Rows are {"image": path, "caption": text} or {"image": path, "conversations": [...]}; paths are
relative to the file. Prompt template, end symbol and text length are the model's own.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    c = ConfigDict()

    c.model = ""  # directory of the model to start from
    c.data = ConfigDict()
    c.data.path = ()  # .json, .jsonl, or a directory with filter_cap.json and image/
    c.data.val_path = ()  # rows kept apart: validation loss and sample captions appear in the log
    c.data.prompts = ("<Img><ImageHere></Img> Describe this image in detail.",)  # for bare captions
    c.data.workers = 0

    c.lora = ConfigDict()
    c.lora.rank = 0  # 8 or 64, say: adapters for a model without; 0: the model's own, if it has any
    c.lora.targets = ()  # of new ones: q, v; any of q, k, v, o, gate, up, down

    c.dtype = "bfloat16"
    c.steps = 500
    c.batch_size = 8
    c.accumulate = 1  # raise it when memory is short: same result in as many parts
    c.seed = 42

    c.init_lr = 3e-5  # as stage 2
    c.min_lr = 1e-5
    c.warmup_lr = 1e-6
    c.warmup_steps = 50
    c.weight_decay = 0.05

    c.log_every = 10
    c.eval_every = 100
    c.sample_every = 100
    c.save_every = 100
    c.keep = 3
    return c
