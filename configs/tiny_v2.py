"""MiniGPT-v2 in small: all its tasks on the generated dataset `shapes`, on a CPU in half an hour. LoRA of
SmolLM2-135M and a projection from the patches of the demonstration's vision side are trained together.

    python -m minigpt4_jax.tiny_v2 --workdir=tiny_v2     everything, with what it can do before and after
    python -m minigpt4_jax.tiny_v2 --workdir=tiny_v2 --prepare, then
    python -m minigpt4_jax.train --config=tiny_v2 --workdir=tiny_v2/run     the training alone
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    if arg:
        raise ValueError(f"unknown argument {arg!r}; tiny_v2 takes none")
    c = ConfigDict()

    c.model = "tiny_v2/base"  # made by --prepare
    c.variant = "minigpt-v2"
    c.data = ConfigDict()
    c.data.path = ("tiny_v2/rows.jsonl",)  # few objects first
    c.data.val_path = ()
    c.data.shuffle = False  # the rows have an order of their own
    c.data.pad_tokens = 16
    c.data.pad_answers = 16

    c.dtype = "float32"  # the fastest on a CPU without bfloat16 units
    c.steps = 1303
    c.batch_size = 4  # many small steps: there is time for five thousand rows only
    c.seed = 42

    # Eleven thousand questions instead of the paper's millions. The vision side's patches name each
    # word by one large value, so that this rate suits the projection as well as LoRA.
    c.init_lr = 2e-3
    c.min_lr = 1e-4
    c.warmup_lr = 1e-5
    c.warmup_steps = 20
    c.weight_decay = 0.0
    c.beta2 = 0.98
    c.clip = 1.0

    c.log_every = 20
    c.eval_every = 0
    c.sample_every = 0
    c.save_every = 300
    c.keep = 1
    return c
