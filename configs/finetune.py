"""Fine-tune a trained model on your own data.

    python -m minigpt4_jax.train --config=finetune --workdir=DIR --config.model=MODEL \
        --config.data.path=my.jsonl

Rows are {"image": path, "caption": text} or {"image": path, "conversations": [...]}; paths are
relative to the file. Prompt template, end symbol and text length are the model's own.
"""

from ml_collections import ConfigDict

from minigpt4_jax.training.recipes import ALIGNMENT_PROMPTS


def get_config(arg: str = "") -> ConfigDict:
    c = ConfigDict()
    c.model = ""  # directory of the model to start from

    c.data = ConfigDict()
    c.data.path = ()  # .json, .jsonl, or a folder with filter_cap.json and image/
    c.data.val_path = ()  # held-out rows: validation loss and sample captions appear in the log
    c.data.prompts = ALIGNMENT_PROMPTS[:1]  # for rows with only a caption

    c.lora = ConfigDict()
    c.lora.rank = 0  # such as 8 or 64: adds adapters to a model without; 0: the model's own, if any
    c.lora.targets = ()  # of added adapters: any of q, k, v, o, gate, up, down; (): q and v

    c.steps = 500
    c.batch_size = 8
    c.accumulate = 1  # micro-batches; raise it if memory runs out, the result is the same

    c.init_lr = 3e-5  # as in stage 2
    c.min_lr = 1e-5
    c.warmup_steps = 50

    c.eval_every = 100
    c.sample_every = 100
    return c
