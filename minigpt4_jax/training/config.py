"""The configuration of a training run: its fields and their defaults.

A config file (`configs/`) sets what differs from these defaults; see training.config_cli.
"""

from dataclasses import dataclass, field

from minigpt4_jax.data.config import DataConfig

SCHEDULES = ("cosine", "step")  # values of TrainConfig.schedule


@dataclass(frozen=True)
class LoraChoice:
    """LoRA adapters on the language model.

    A value left at its default here is the model's own. A model without adapters gets new ones if
    rank is set.

    rank: 0: no new adapters.
    alpha: of new adapters: 16 if 0.
    targets: of new adapters: some of q, k, v, o, gate, up, down; (): q and v.
    dropout: on the adapters' input, in training; of new adapters: 0.05 if negative.
    """

    rank: int = 0
    alpha: float = 0.0
    targets: tuple[str, ...] = ()
    dropout: float = -1.0


@dataclass(frozen=True)
class EvalConfig:
    """Benchmarks that are run during training (minigpt4_jax/evaluation).

    benchmarks: names such as "refcoco" or "shapes"; (): none.
    root: the folder of their files.
    splits: of benchmarks that have several; (): all that are usual.
    every: steps between; 0: after the last step alone.
    limit: rows of each, the first ones.
    batch_size: rows decoded together.
    best: one of them, as "refcoco_val": WORKDIR/best has the model with its best score; "": none.
    """

    benchmarks: tuple[str, ...] = ()
    root: str = ""
    splits: tuple[str, ...] = ()
    every: int = 0
    limit: int = 100
    batch_size: int = 32
    best: str = ""


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on besides the content of its data and its model's weights.

    Model and text
    model: model directory, made by `python -m convert build` or by an earlier run.
    variant: refuse a model of another variant; "": any.
    llm_width: refuse a language model of another width; 0: any.
    prompt_template: text around a question, which replaces {}; "": the model's own.
    end_symbol: closes every answer; "": the model's own.
    max_text_length: tokens of an answer, the rest is cut; 0: the model's own.

    What is trained, and where
    freeze_vit, freeze_qformer: leave these parts as they are.
    dtype: of frozen matrices and their products; "float32" for exactness.
    frozen_dtype: "float8" multiplies the frozen matrices of the language model and the vision encoder in
        e4m3, which is faster on GPUs that can (docs/guides/gpu.md) and halves their memory; "": dtype.
    mesh: devices per axis, such as "data:2,fsdp:4"; "" or "auto": chosen and logged.
    remat: recompute activations in the backward pass: less memory, more time.

    Batches and steps
    steps: updates of the parameters.
    batch_size: rows per step, of all devices together.
    accumulate: micro-batches per step; batch_size is a multiple of it.
    seed: of the data order, the prompts and dropout; 42 in the original.

    Optimizer (AdamW: weight_decay, beta1, beta2, eps)
    schedule: "cosine" or "step": from warmup_lr to init_lr in warmup_steps, then down to min_lr.
    steps_per_epoch: needed by the step schedule and by a warmup longer than one epoch.
    decay_rate: of the step schedule, per epoch.
    qformer_lr_scale: learning rate of a trained Q-Former, relative to the other parameters.
    clip: maximum global norm of the gradient; 0: no clipping, as in the original.

    Logs and checkpoints
    log_every: steps between printed lines; metrics.jsonl has every step.
    eval_every: steps between validation losses; 0: never.
    eval_examples: number of validation rows used.
    sample_every: steps between captions of a few validation images, all different; 0: never.
    sample_images, sample_tokens: how many images, and tokens per caption at most.
    eval: benchmarks that are run during training.
    save_every: steps between checkpoints.
    keep: checkpoints kept on disk.
    heartbeat_timeout: with several processes: seconds without a sign of one until the others stop.
    """

    model: str = ""
    variant: str = ""
    llm_width: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraChoice = field(default_factory=LoraChoice)
    prompt_template: str = ""
    end_symbol: str = ""
    max_text_length: int = 0

    freeze_vit: bool = True
    freeze_qformer: bool = True
    dtype: str = "bfloat16"
    frozen_dtype: str = ""
    mesh: str = ""
    remat: bool = False

    steps: int = 1000
    batch_size: int = 12
    accumulate: int = 1
    seed: int = 42

    schedule: str = "cosine"
    init_lr: float = 3e-5
    min_lr: float = 1e-5
    warmup_lr: float = 1e-6
    warmup_steps: int = 200
    steps_per_epoch: int = 0
    decay_rate: float = 1.0
    qformer_lr_scale: float = 1.0
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip: float = 0.0

    log_every: int = 10
    eval_every: int = 200
    eval_examples: int = 200
    sample_every: int = 200
    sample_images: int = 4
    sample_tokens: int = 60
    eval: EvalConfig = field(default_factory=EvalConfig)
    save_every: int = 100
    keep: int = 3
    heartbeat_timeout: float = 100.0

    @property
    def micro_batch_size(self) -> int:
        """Rows that are processed at a time."""
        return self.batch_size // self.accumulate
