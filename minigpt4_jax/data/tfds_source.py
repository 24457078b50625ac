"""A TFDS dataset as a source: `tfds.data_source` over array_record files, without TensorFlow.

Install with `pip install 'minigpt4_jax[tfds]'`; make a dataset with `tfds build --file_format=array_record`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from minigpt4_jax.data.json_records import Example, blip_caption
from minigpt4_jax.errors import DataError, UserError
from minigpt4_jax.processing.chat_templates import with_images
from minigpt4_jax.processing.images import ImageSource

# Feature names; the first that a dataset has is used.
IMAGES = ("image", "images", "jpg", "png")
CAPTIONS = ("caption", "captions", "text", "description")
QUESTIONS = ("question", "questions")
ANSWERS = ("answer", "answers", "label_text")


class TfdsSource:
    """A Source over a split of a TFDS dataset. One of several captions or answers of a row is drawn."""

    def __init__(self, name: str, dataset: str, split: str, data_dir: str | None, clean: bool):
        """UserError: TFDS is not installed, there is no such dataset or split in array_record, or
        its features are not images with texts."""
        self.name, self._clean = name, clean
        self.dropped: dict[str, int] = {}
        self.left_out: dict[str, int] = {}
        self._dataset = (dataset, split, data_dir)
        self._rows: Any = None  # opened in each process
        features = self._open()
        self._image = _first(IMAGES, features)
        self._question, self._answer = _first(QUESTIONS, features), _first(ANSWERS, features)
        self._caption = _first(CAPTIONS, features)
        if not (self._caption and self._image) and not (self._question and self._answer):
            raise UserError(
                f"data {name}: {dataset} has the features {', '.join(features)}; expected one of "
                f"{', '.join(IMAGES)} with one of {', '.join(CAPTIONS)}, or question with answer"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}

    def example(self, index: int, rng: np.random.Generator) -> Example:
        if self._rows is None:
            self._open()
        where = f"data {self.name}, row {index}"
        row = self._rows[index]
        images = _images(row[self._image], where) if self._image else ()
        if self._question and self._answer:
            question = with_images(_text(row[self._question], rng, where), len(images))
            return Example(images, (question,), (_text(row[self._answer], rng, where),))
        caption = _text(row[self._caption], rng, where)
        if self._clean and not (caption := blip_caption(caption)):
            raise DataError(f"{where}: its caption is empty once cleaned", "row without a caption")
        return Example(images, (), (caption,))

    def _open(self) -> list[str]:
        """Open the files; returns the names of the features."""
        dataset, split, data_dir = self._dataset
        try:
            import tensorflow_datasets as tfds
        except ImportError:
            raise UserError(
                f"data {self.name}: reading TFDS needs `pip install 'minigpt4_jax[tfds]'`"
            ) from None
        try:
            builder = tfds.builder(dataset, data_dir=data_dir)
            features = builder.info.features
            skip = {
                key: tfds.decode.SkipDecoding()
                for key, feature in features.items()
                if isinstance(feature, tfds.features.Image)
            }
            self._rows = builder.as_data_source(split=split, decoders=skip)
        except Exception as e:  # TFDS raises errors of many kinds
            raise UserError(
                f"data {self.name}: TFDS cannot open {dataset}, split {split}, in "
                f"{data_dir or 'its default data_dir'} ({' '.join(str(e).split())[:200]}); expected "
                "a dataset made with --file_format=array_record"
            ) from None
        return list(features)


def _first(names: Sequence[str], features: Sequence[str]) -> str:
    return next((name for name in names if name in features), "")


def _images(value: Any, where: str) -> tuple[ImageSource, ...]:
    """Encoded bytes, arrays [H, W, 1 or 3], or a list of either."""
    if isinstance(value, bytes):
        return (value,)
    array = np.asarray(value)
    if array.dtype == object:
        return tuple(bytes(encoded) for encoded in array.reshape(-1))
    if array.ndim == 4:
        return tuple(image for item in array for image in _images(item, where))
    if array.ndim == 3 and array.shape[2] == 1:
        array = np.repeat(array, 3, axis=2)
    return (array,)


def _text(value: Any, rng: np.random.Generator, where: str) -> str:
    """A text, or a random one of several."""
    if not isinstance(value, (bytes, str)):
        texts = list(np.asarray(value, object).reshape(-1))
        value = texts[int(rng.integers(len(texts)))] if texts else ""
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: a text is empty", "row with an empty text")
    return text
