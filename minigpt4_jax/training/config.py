"""The configuration of a training run: its fields, with their defaults.

A file of settings names what it changes (training.config_files); everything else is as written here.
"""

from dataclasses import dataclass, field

from minigpt4_jax.data.config import DataConfig


@dataclass(frozen=True)
class LoraChoice:
    """Adapters on the language model. A value that is left as it is here is the model's own; a
    model without adapters gets new ones when the rank is given."""

    rank: int = 0
    alpha: float = 0.0  # of new ones: 16
    targets: tuple[str, ...] = ()  # of new ones: q, v; some of q, k, v, o, gate, up, down
    dropout: float = -1.0  # on their input, in training; of new ones: 0.05


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on, besides its data's content and its model's weights."""

    model: str = ""  # model directory, made by `python -m convert build` or by an earlier run
    variant: str = ""  # refuse a model of another variant; "": any
    llm_width: int = 0  # refuse a language model of another width; 0: any
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraChoice = field(default_factory=LoraChoice)
    prompt_template: str = ""  # around a row's question, {} in its place; "": the model's own
    end_symbol: str = ""  # closes every answer; "": the model's own
    max_text_length: int = 0  # tokens an answer may have; 0: the model's own

    freeze_vit: bool = True
    freeze_qformer: bool = True
    dtype: str = "bfloat16"  # of frozen matrices and their products; "float32" for exactness
    # devices: sizes of data, fsdp and model, as data:2,fsdp:4; "" or "auto": chosen and told
    mesh: str = ""
    remat: bool = False  # recompute activations in the backward pass: less memory, more time

    steps: int = 1000
    batch_size: int = 12
    accumulate: int = 1  # micro-batches a step
    seed: int = 42  # the original's; order of the data, prompts, dropout

    schedule: str = "cosine"  # or "step"
    init_lr: float = 3e-5
    min_lr: float = 1e-5
    warmup_lr: float = 1e-6
    warmup_steps: int = 200
    steps_per_epoch: int = 0  # only the step schedule, and a warmup over several epochs, ask for it
    decay_rate: float = 1.0  # of the step schedule
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip: float = 0.0  # largest global norm of the gradient; 0: no clipping, as the original

    log_every: int = 10
    eval_every: int = 200  # validation loss; 0: never
    eval_examples: int = 200  # at most so many of the validation rows
    sample_every: int = 200  # caption a few validation images into the log; 0: never
    sample_images: int = 4
    sample_tokens: int = 60
    save_every: int = 100  # checkpoint
    keep: int = 3  # checkpoints on disk
    # of several processes: seconds without a sign of one until the others end, as it is gone
    heartbeat_timeout: float = 100.0
