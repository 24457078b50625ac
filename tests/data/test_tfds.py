"""TFDS datasets as sources, and the TFDS builders, without TensorFlow."""

import json
import pickle
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from helpers.resuming import check_resumed, half, loader, uninterrupted

from minigpt4_jax.data import tfds_build
from minigpt4_jax.data.mixture import MixtureComponent
from minigpt4_jax.data.tfds_source import TfdsSource
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.images import open_image
from minigpt4_jax.shapes import scene
from minigpt4_jax.shapes.drawing import render

RNG = np.random.default_rng(0)


def test_missing_tfds_is_an_error(monkeypatch):
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
    from minigpt4_jax.data import tfds_builders

    monkeypatch.setattr(
        tfds_builders, "SHAPES_SIZES", {"train": 4, "heldout": 2, "heldout_pairs": 2}
    )
    build(tfds, "shapes", tmp_path)
    source = pickle.loads(pickle.dumps(TfdsSource("mine", "shapes", "train", str(tmp_path), False)))
    scenes = [render(scene.scene_at(0, n, "train")).tobytes() for n in range(4)]
    found = [np.asarray(open_image(source.example(n, RNG).images[0])).tobytes() for n in range(4)]
    assert sorted(found) == sorted(scenes)  # TFDS shuffles
    assert source.example(0, RNG).questions[0].startswith("<Img><ImageHere></Img>")
    assert "tensorflow" not in sys.modules
    with pytest.raises(UserError, match="TFDS cannot open shapes, split validation"):
        TfdsSource("mine", "shapes", "validation", str(tmp_path), False)


def write_stage2_data(folder, photos):
    (folder / "image").mkdir(parents=True)
    for n, photo in enumerate(photos):
        open_image(photo).save(folder / "image" / f"{n}.png")
    rows = [{"image_id": n, "caption": f"picture {n}"} for n in range(len(photos))]
    (folder / "filter_cap.json").write_text(json.dumps({"annotations": rows}))


def open_stage2_data(folder):
    return TfdsSource("mine", "cc_sbu_align", "train", str(folder), True)


def check_stage2_data(source, photos):
    assert len(source) == len(photos)
    for index in range(len(photos)):
        example = source.example(index, RNG)
        number = int(example.answers[0].removeprefix("picture "))
        picture = np.asarray(open_image(example.images[0]))
        np.testing.assert_array_equal(picture, np.asarray(open_image(photos[number])))


def test_stage_2_data_and_resuming_on_it(tfds, tmp_path, photos):
    write_stage2_data(tmp_path / "set", photos[:5])
    build(tfds, "cc_sbu_align", tmp_path / "tfds", manual_dir=str(tmp_path / "set"))
    check_stage2_data(open_stage2_data(tmp_path / "tfds"), photos[:5])

    def opened(**changes):
        return loader([MixtureComponent("mine", open_stage2_data(tmp_path / "tfds"))], **changes)

    expected, states = uninterrupted(opened(), 6)
    for stop, state in enumerate(states):
        check_resumed(state, expected[stop:], opened())
    check_resumed(states[1], expected[1:], *[opened(shard=partial(half, n)) for n in (0, 1)])
    check_resumed(states[4], expected[4:], opened(workers=2, threads=1))


def test_the_command_builds_both_datasets(tfds, tmp_path, photos):
    write_stage2_data(tmp_path / "set", photos[:3])
    command = [
        sys.executable, "-m", "minigpt4_jax.data.tfds_build", "shapes", "cc_sbu_align",
        f"--data_dir={tmp_path / 'tfds'}", f"--manual_dir={tmp_path / 'set'}",
        "--max_examples_per_split=3",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "shapes: train 3, heldout 3, heldout_pairs 3; in " in done.stdout
    check_stage2_data(open_stage2_data(tmp_path / "tfds"), photos[:3])
    for split in ("train", "heldout", "heldout_pairs"):
        assert len(TfdsSource("mine", "shapes", split, str(tmp_path / "tfds"), False)) == 3


def test_missing_source_data(tfds, tmp_path):
    with pytest.raises(UserError, match="--manual_dir=SET"):
        tfds_build.main(["cc_sbu_align"])
    with pytest.raises(UserError, match=r"has no filter_cap\.json"):
        tfds_build.main(
            ["cc_sbu_align", f"--manual_dir={tmp_path}", f"--data_dir={tmp_path / 'd'}"]
        )
