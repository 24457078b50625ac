"""TFDS builders of `shapes` and of MiniGPT-4's stage-2 set; writing them needs no TensorFlow.

    python -m minigpt4_jax.data.tfds_build shapes
    tfds build shapes --imports=minigpt4_jax.data.tfds_builders --file_format=array_record

Features are only text and bytes (an image is its file's bytes), so that TensorFlow is not needed.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from minigpt4_jax.data.json_records import read_sources
from minigpt4_jax.shapes.drawing import render
from minigpt4_jax.shapes.scene import SPLITS, scene_at
from minigpt4_jax.shapes.text import description, questions, short_caption

Rows = Iterator[tuple[str, dict[str, Any]]]
SHAPES_SIZES = {"train": 6000, "heldout": 200, "heldout_pairs": 200}
_SEED = 0


def _features(*texts: str) -> tfds.features.FeaturesDict:
    image = {"image": tfds.features.Scalar(np.object_)}
    return tfds.features.FeaturesDict(image | {name: tfds.features.Text() for name in texts})


class Shapes(tfds.core.GeneratorBasedBuilder):
    """Generated scenes of coloured shapes, with short and detailed captions and a question: the same as
    `python -m minigpt4_jax.shapes` with its default sizes and seed."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = _features("caption", "description", "question", "answer")
        return self.dataset_info_from_configs(features=features, description=self.__doc__)

    def _split_generators(self, dl_manager: Any) -> dict[str, Rows]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Rows:
        for index in range(SHAPES_SIZES[split]):
            scene = scene_at(_SEED, index, split)
            rng = np.random.default_rng([_SEED, SPLITS.index(split), index, 1])
            out = io.BytesIO()
            Image.fromarray(render(scene)).save(out, "PNG", compress_level=1)
            stage2_text = description(scene, rng)
            question, answer = questions(scene, rng)[0]
            yield f"{index:06d}", {
                "image": out.getvalue(), "caption": short_caption(scene),
                "description": stage2_text,
                "question": question, "answer": answer,
            }  # fmt: skip


class CcSbuAlign(tfds.core.GeneratorBasedBuilder):
    """MiniGPT-4's stage-2 set: filter_cap.json and image/, or any data that training reads."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "A folder with filter_cap.json and image/{image_id}.jpg."

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=_features("caption"), description=self.__doc__
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Rows]:
        return {"train": self._generate_examples(Path(dl_manager.manual_dir))}

    def _generate_examples(self, folder: Path) -> Rows:
        for number, example in enumerate(read_sources(folder)):
            (image,) = example.images
            yield f"{number:06d}", {
                "image": Path(str(image)).read_bytes(), "caption": example.answers[0]
            }  # fmt: skip
