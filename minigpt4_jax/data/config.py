"""The configuration of training data: `config.data` of a training run."""

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
