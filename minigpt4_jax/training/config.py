"""The configuration of a training run: its fields, with their defaults.

A file of settings names what it changes (training.config_files); everything else is as written here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class DatasetConfig:
    """One dataset of a mixture. Its key in data.mix is its name in logs."""

    ratio: float = 1.0  # of turns, beside the others' ratios; 0: left out
    batch_size: int = 0  # of its own batches; 0: config.batch_size
    tokens: int = 0  # instead: as many rows as together have so many tokens, padding included
    reader: str = ""  # files, webdataset, tfds or a published dataset; "": the one of its name
    path: tuple[
        str, ...
    ] = ()  # files or a folder, as the reader wants them; shards; TFDS's data_dir
    images: str = ""  # the folder of images, for published datasets; "": where they are published
    dataset: str = ""  # with tfds: name[:version]
    split: str = "train"  # with tfds
    prompts: tuple[str, ...] = ()  # for its rows without a question; (): data.prompts
    clean_captions: bool = False  # with files, webdataset, tfds; see data.clean_captions


@dataclass(frozen=True)
class DataConfig:
    """What is read. A path is a .json, a .jsonl, or a folder with filter_cap.json and image/."""

    path: tuple[str, ...] = ()
    mix: Mapping[str, DatasetConfig] = field(default_factory=dict)  # instead: datasets by name
    mix_by: str = "step"  # draw a dataset for each batch, or "example": for each row of one
    root: str = ""  # folder that the relative paths of mix begin at
    max_broken: float = 0.01  # share of rows that may be left out, broken; 0: the first is an error
    val_path: tuple[str, ...] = ()  # held-out data for the validation loss and the samples
    prompts: tuple[str, ...] = ()  # one a batch, for rows without a question; (): bare image
    clean_captions: bool = False  # the original's stage 1: lower case, no punctuation, 50 words
    shuffle: bool = True  # anew each epoch; False: in the order of the file, easy ones first say
    crop: bool = False  # random resized crop, as version 1 was trained first; moves what boxes name
    workers: int = 0  # processes that decode images; 0: threads of this one
    threads: int = 2  # in each of them
    timeout: float = 600.0  # seconds without a batch until they count as hung; 0: wait for ever
    pad_tokens: int = 32  # rows are padded to multiples of these, so that few programs are compiled
    pad_answers: int = 16
    pack_tokens: int = 0  # several short examples in a row of so many tokens; 0: a row for each


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
