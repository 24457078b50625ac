"""TFDS datasets as sources, and the builders; without TensorFlow."""

import json
import pickle
import sys

import numpy as np
import pytest

from minigpt4_jax.data.tfds_source import TfdsSource
from minigpt4_jax.errors import UserError
from minigpt4_jax.images import open_image

RNG = np.random.default_rng(0)


def test_missing_tfds_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match=r"pip install 'minigpt4_jax\[tfds\]'"):
        TfdsSource("mine", "shapes", "train", None, False)


@pytest.fixture
def tfds():
    return pytest.importorskip("tensorflow_datasets")


def build(tfds, name, folder, **options):
    from minigpt4_jax.data import tfds_builders  # noqa: F401

    builder = tfds.builder(name, data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(**options))


def test_shapes(tfds, tmp_path, monkeypatch):
    from minigpt4_jax.data import shapes, tfds_builders

    monkeypatch.setattr(
        tfds_builders, "SHAPES_SIZES", {"train": 4, "heldout": 2, "heldout_pairs": 2}
    )
    build(tfds, "shapes", tmp_path)
    source = pickle.loads(pickle.dumps(TfdsSource("mine", "shapes", "train", str(tmp_path), False)))
    scenes = [shapes.render(shapes.scene_at(0, n, "train")).tobytes() for n in range(4)]
    found = [np.asarray(open_image(source.example(n, RNG).images[0])).tobytes() for n in range(4)]
    assert sorted(found) == sorted(scenes)  # TFDS has an order of its own
    assert source.example(0, RNG).questions[0].startswith("<Img><ImageHere></Img>")
    assert "tensorflow" not in sys.modules
    with pytest.raises(UserError, match="TFDS cannot open shapes, split validation"):
        TfdsSource("mine", "shapes", "validation", str(tmp_path), False)


def test_the_stage_2_set(tfds, tmp_path, photos):
    folder = tmp_path / "set"
    (folder / "image").mkdir(parents=True)
    for n in range(3):
        open_image(photos[n]).save(folder / "image" / f"{n}.png")
    rows = [{"image_id": n, "caption": f"picture {n}"} for n in range(3)]
    (folder / "filter_cap.json").write_text(json.dumps({"annotations": rows}))
    build(tfds, "cc_sbu_align", tmp_path / "tfds", manual_dir=str(folder))
    source = TfdsSource("mine", "cc_sbu_align", "train", str(tmp_path / "tfds"), True)
    assert len(source) == 3
    for index in range(3):
        example = source.example(index, RNG)
        number = int(example.answers[0].removeprefix("picture "))
        picture = np.asarray(open_image(example.images[0]))
        np.testing.assert_array_equal(picture, np.asarray(open_image(photos[number])))
