"""The configuration of training data: `config.data` of a training run.

The values are checked once, by `training.config_check`; whatever takes a DataConfig trusts it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

MIX_BY = ("step", "example")  # values of DataConfig.mix_by


@dataclass(frozen=True)
class DatasetConfig:
    """One dataset of a mixture. Its key in `data.mix` is its name in logs.

    ratio: share of the batches (or rows, see DataConfig.mix_by), relative to the other datasets' ratios;
        0 leaves the dataset out.
    batch_size: rows in a batch of this dataset; 0: config.batch_size.
    tokens: alternative to batch_size: as many rows as fit into this many tokens, padding included.
    reader: "files" (JSON), "webdataset", "tfds" or the name of a published dataset (data.datasets);
        "": the reader named like the dataset.
    path: files or a folder for the reader; shards for webdataset; data_dir for tfds.
    images: image folder of a published dataset; "": where it is published.
    dataset: tfds only: name[:version].
    split: tfds only.
    prompts: for rows without a question; (): data.prompts.
    clean_captions: files, webdataset and tfds only; see DataConfig.clean_captions.
    """

    ratio: float = 1.0
    batch_size: int = 0
    tokens: int = 0
    reader: str = ""
    path: tuple[str, ...] = ()
    images: str = ""
    dataset: str = ""
    split: str = "train"
    prompts: tuple[str, ...] = ()
    clean_captions: bool = False


@dataclass(frozen=True)
class DataConfig:
    """The training data of a run, and how batches are made of it.

    path: one or several datasets: a .json or .jsonl file, or a folder with filter_cap.json and image/.
    mix: alternative to path: datasets by name, mixed by their ratios.
    mix_by: "step" draws a dataset for each batch, "example" for each row of a batch.
    root: folder that relative paths in mix refer to.
    max_broken: share of the rows (and of a dataset's shards) that may be missing or unreadable, and are
        then skipped; 0: the first one is an error.
    val_path: held-out data for the validation loss and the sample captions; as path.
    prompts: for rows without a question, one is drawn for each batch; (): the caption follows the image.
    clean_captions: clean captions as the original does in stage 1 (BLIP's caption processor: lower case,
        no punctuation, at most 50 words).
    shuffle: a new order each epoch; False: the order of the file, for a curriculum.
    crop: random resized crop, the training augmentation of MiniGPT-4; not for MiniGPT-v2, as boxes in the
        texts are not adjusted.
    flip: mirror half of the images, as BLIP-2's training does; not for texts that say left and right.
    image_ids: BLIP-2's first stage knows rows of the same image (the same file): they share
        the contrastive targets and are no negatives of each other, as LAVIS trains retrieval on COCO.
    exif: rotate the images of own files (data.path, data.val_path, reader "files") as their EXIF orientation
        says, so that boxes are for the picture as viewers show it; other datasets are read as stored.
    workers: processes that load images; 0: threads of the training process.
    threads: threads per worker process, or of the training process.
    timeout: seconds without a batch after which the workers count as hung; 0: wait forever.
    pad_tokens: row lengths are rounded up to a multiple of this, to limit the number of compiled programs.
    pad_answers: the same for the number of labels in a row.
    pack_tokens: pack several short examples into rows of this many tokens; 0: one example per row.
    """

    path: tuple[str, ...] = ()
    mix: Mapping[str, DatasetConfig] = field(default_factory=dict)
    mix_by: str = "step"
    root: str = ""
    max_broken: float = 0.01
    val_path: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    clean_captions: bool = False
    shuffle: bool = True
    crop: bool = False
    flip: bool = False
    image_ids: bool = False
    exif: bool = True
    workers: int = 0
    threads: int = 2
    timeout: float = 600.0
    pad_tokens: int = 32
    pad_answers: int = 16
    pack_tokens: int = 0
