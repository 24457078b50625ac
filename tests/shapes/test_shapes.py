"""The dataset `shapes`: scenes, splits, pixels, labels, and the files on disk."""

import dataclasses
import errno
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from minigpt4_jax.errors import UserError
from minigpt4_jax.shapes import dataset as shapes_dataset
from minigpt4_jax.shapes import drawing
from minigpt4_jax.shapes import scene as shapes_scene
from minigpt4_jax.shapes.claims import matches
from minigpt4_jax.shapes.labels import scene_labels
from minigpt4_jax.shapes.scene import BACKGROUNDS, CELLS, COLOR_NAMES, COLORS, SHAPES, SIZES, SPLITS


def scenes(count, split="train", seed=7, **kwargs):
    return [shapes_scene.scene_at(seed, i, split, **kwargs) for i in range(count)]


def all_splits(count, **kwargs):
    return [scene for split in SPLITS for scene in scenes(count, split, **kwargs)]


# -------------------------------------------------------------------------------- scenes and splits

SIGNATURES = [  # of scenes 0, 1 and 2 of seed 0: a change of the random numbers is noticed
    "black|large,purple,circle,center;large,purple,star,top right;small,yellow,triangle,right",
    "striped|large,pink,square,bottom left;small,green,square,top;small,red,square,right",
    "gray|large,green,cross,top left",
]


def test_a_seed_gives_the_same_scenes_in_any_order():
    assert [shapes_scene.signature(shapes_scene.scene_at(0, i)) for i in range(3)] == SIGNATURES
    forward = scenes(20)
    backward = [shapes_scene.scene_at(7, i) for i in reversed(range(20))][::-1]
    assert forward == backward
    assert scenes(20, seed=8) != forward
    assert len({shapes_scene.signature(s) for s in all_splits(20)}) > 50
    for scene in forward:
        np.testing.assert_array_equal(drawing.render(scene), drawing.render(scene))


def test_splits_never_share_a_scene():
    train = {shapes_scene.signature(s) for s in scenes(2000)} | {
        shapes_scene.signature(s) for s in scenes(1000, seed=11, counts=(1,))
    }
    heldout = {shapes_scene.signature(s) for s in scenes(500, "heldout", counts=(1, 2))}
    pairs = scenes(500, "heldout_pairs")
    assert not train & heldout
    assert not train & {shapes_scene.signature(s) for s in pairs}
    held = set(shapes_scene.HELDOUT_PAIRS)
    for scene in pairs:
        assert any((o.color, o.shape) in held for o in scene.objects)
    for scene in scenes(1000) + scenes(500, "heldout"):
        assert not any((o.color, o.shape) in held for o in scene.objects)


def test_the_split_depends_only_on_the_content():
    scene = shapes_scene.scene_at(0, 0)
    moved = dataclasses.replace(
        scene,
        texture=1,
        objects=tuple(dataclasses.replace(o, angle=1.0) for o in scene.objects[::-1]),
    )
    assert shapes_scene.signature(moved) == shapes_scene.signature(scene)
    for split in SPLITS:
        assert {shapes_scene.split_of(s) for s in scenes(50, split)} == {split}
    # the share of heldout among all single-object scenes without a held-out pair
    singles = {s: shapes_scene.split_of(s) for s in map(_single, itertools.product(*_ATTRIBUTES))}
    counts = {split: list(singles.values()).count(split) for split in SPLITS}
    assert counts["heldout_pairs"] == 5 * 2 * 9 * 4
    assert counts["heldout"] / (counts["heldout"] + counts["train"]) == pytest.approx(0.1, abs=0.02)


_ATTRIBUTES = (SIZES, COLOR_NAMES, SHAPES, CELLS, BACKGROUNDS)


def _single(attributes):
    size, color, shape, cell, background = attributes
    thing = shapes_scene.Object(shape, color, size, cell, (0, 0, 1, 1), 0.0, (0, 0, 0))
    return shapes_scene.Scene((thing,), background)


def test_every_attribute_is_frequent_in_training():
    things = [o for s in scenes(3000) for o in s.objects]
    for name, values in (
        ("color", COLOR_NAMES),
        ("shape", SHAPES),
        ("size", SIZES),
        ("cell", CELLS),
    ):
        counts = [sum(getattr(o, name) == v for o in things) for v in values]
        assert min(counts) > 0.75 * len(things) / len(values), name
    pairs = {(o.color, o.shape) for o in things}
    assert len(pairs) == len(COLOR_NAMES) * len(SHAPES) - len(shapes_scene.HELDOUT_PAIRS)


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match="'test'"):
        shapes_scene.scene_at(0, 0, "test")
    with pytest.raises(ValueError, match="'test'"):
        shapes_scene.random_scene(np.random.default_rng(0), "test")


def test_objects_are_in_raster_order_in_different_cells():
    for scene in all_splits(300):
        cells = [CELLS.index(o.cell) for o in scene.objects]
        assert cells == sorted(set(cells)) and 1 <= len(cells) <= 3
        pitch = scene.image_size / 3
        for o in scene.objects:
            x1, y1, x2, y2 = o.box
            assert o.column * pitch + 0.9 < x1 < x2 < (o.column + 1) * pitch - 0.9
            assert o.row * pitch + 0.9 < y1 < y2 < (o.row + 1) * pitch - 0.9
            assert abs(o.angle) <= 12
            low, high = {"small": (19, 23), "large": (30, 34)}[o.size]
            assert low <= max(x2 - x1, y2 - y1) <= high


def test_scenes_as_json_and_back():
    for scene in all_splits(30):
        back = shapes_scene.scene_from_dict(
            json.loads(json.dumps(shapes_scene.scene_to_dict(scene)))
        )
        assert shapes_scene.signature(back) == shapes_scene.signature(scene)
        difference = drawing.render(back).astype(int) - drawing.render(scene)
        assert np.abs(difference).mean() < 0.3  # boxes and angles are rounded to hundredths


# ------------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize("size", [112, 224, 100])
def test_boxes_are_tight_and_colors_as_named(size):
    for scene in all_splits(60, image_size=size):
        image, owners = drawing.render_with_owners(scene)
        assert image.shape == (size, size, 3) and image.dtype == np.uint8
        for i, o in enumerate(scene.objects):
            ys, xs = np.nonzero(owners == i + 1)
            drawn = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
            assert np.abs(drawn - o.box).max() < 2, o  # a tilted star's tips are thin
            color = np.median(image[owners == i + 1], 0)
            assert np.abs(color - o.rgb).max() <= 1
            assert np.abs(color - COLORS[o.color]).max() <= 11


def test_pixels_at_the_center_of_objects():
    for scene in all_splits(150):
        image = drawing.render(scene).astype(int)
        for o in scene.objects:
            x, y = int((o.box[0] + o.box[2]) / 2), int((o.box[1] + o.box[3]) / 2)
            difference = np.abs(image[y, x] - o.rgb).max()
            assert difference > 40 if o.shape == "ring" else difference <= 1, o


def test_colors_are_far_from_each_other_and_from_backgrounds():
    colors = np.array(list(COLORS.values()))
    distance = np.abs(colors[:, None] - colors[None]).max(-1) + 255 * np.eye(len(colors))
    assert distance.min() > 4 * 10  # twice the jitter of both
    for scene in all_splits(150):
        image, owners = drawing.render_with_owners(scene)
        ground = image[owners == 0].astype(int).mean(0) if scene.background != "striped" else None
        for o in scene.objects:
            if ground is not None:
                assert np.abs(ground - o.rgb).max() > 40, (o, scene.background)


def test_backgrounds_differ_from_each_other_and_vary():
    empty = {
        b: [drawing.render(shapes_scene.Scene((), b, texture=t)).astype(float) for t in range(40)]
        for b in BACKGROUNDS
    }
    tone = {b: np.array([image.mean() for image in images]) for b, images in empty.items()}
    contrast = {b: np.array([image.std() for image in images]) for b, images in empty.items()}
    assert tone["black"].max() < 45 < 95 < tone["gray"].min() < tone["gray"].max() < 160
    assert tone["white"].min() > 225
    assert contrast["striped"].min() > 15 > contrast["gray"].max()
    assert all(values.std() > 2 for values in tone.values())


def test_another_size_shows_the_same_scene():
    for scene in scenes(20):
        small, large = drawing.render(scene), drawing.render(scene, 224)
        halved = np.asarray(Image.fromarray(large).reduce(2)).astype(int)
        assert large.shape == (224, 224, 3)
        inside = np.abs(halved - small).mean() if scene.background != "striped" else 0
        assert inside < 3


@pytest.mark.parametrize("grid", [7, 8, 14, 16])
def test_patch_labels_are_those_of_the_objects_in_them(grid):
    for scene in all_splits(40):
        owners = drawing.render_with_owners(scene)[1]
        labels = scene_labels(scene, grid)
        np.testing.assert_array_equal(
            labels["patches"], scene_labels(scene, grid, owners)["patches"]
        )
        assert labels["count"] == len(scene.objects)
        assert BACKGROUNDS[labels["background"]] == scene.background
        assert not labels["objects"][len(scene.objects) :].any()
        assert set(np.unique(labels["patches"][..., 0])) == set(range(len(scene.objects) + 1))
        for i, o in enumerate(scene.objects):
            shape, color, size, cell = labels["objects"][i] - 1
            assert (SHAPES[shape], COLOR_NAMES[color], SIZES[size], CELLS[cell]) == (
                *(o.shape, o.color, o.size, o.cell),
            )
            np.testing.assert_array_equal(labels["cells"][cell], labels["objects"][i, :3])
            mine = labels["patches"][labels["patches"][..., 0] == i + 1]
            assert (mine[:, 1:] == labels["objects"][i, :3]).all()
        bounds = [round(k * 112 / grid) for k in range(grid + 1)]
        if 112 % grid == 0:
            for (r, (top, bottom)), (c, (left, right)) in itertools.product(
                enumerate(itertools.pairwise(bounds)), repeat=2
            ):
                counts = np.bincount(owners[top:bottom, left:right].ravel(), minlength=4)[1:]
                enough = counts.max() >= 0.06 * (bottom - top) * (right - left)
                expected = counts.argmax() + 1 if enough else 0
                assert labels["patches"][r, c, 0] == expected
        assert (labels["cells"][:, 0] > 0).sum() == len(scene.objects)


# -------------------------------------------------------------------------------------------- files


def _files(root):
    return {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def _write(out, **kwargs):
    settings = {"train": 60, "heldout": 5, "heldout_pairs": 4, "seed": 3, "progress": False}
    return shapes_dataset.write_dataset(out, **(settings | kwargs))


def test_files_describe_their_scenes(tmp_path):
    out = _write(tmp_path / "new" / "shapes", stage2=20)
    assert os.listdir(tmp_path / "new") == ["shapes"]
    for split, total in (("train", 60), ("heldout", 5), ("heldout_pairs", 4)):
        captions = [json.loads(x) for x in (out / split / "captions.jsonl").open()]
        described = json.loads((out / split / "filter_cap.json").read_text())["annotations"]
        asked = [json.loads(x) for x in (out / split / "questions.jsonl").open()]
        truth = shapes_dataset.read_scenes(out / split)
        assert len(captions) == len(truth) == total == len(os.listdir(out / split / "image"))
        assert len(described) == (20 if split == "train" else total)
        by_name = {}
        for row, (path, scene) in zip(captions, truth, strict=True):
            assert out / split / row["image"] == path
            assert shapes_scene.split_of(scene) == split
            assert matches(scene, row["caption"])
            shown = np.asarray(Image.open(path)).astype(int)
            assert shown.shape == (112, 112, 3)
            assert np.abs(shown - drawing.render(scene)).mean() < 0.3
            by_name[row["image"]] = scene
        for row in described:
            scene = by_name[f"image/{row['image_id']}.png"]
            assert matches(scene, row["caption"])
        assert {row["image"] for row in asked} == set(by_name)
        assert all(row["question"].endswith("?") and row["answer"] for row in asked)
        row = json.loads((out / split / "scenes.jsonl").open().readline())
        assert {"phrase", "box", "shape", "color", "size", "place"} <= set(row["objects"][0])


def test_files_depend_only_on_the_seed(tmp_path):
    one, two = _write(tmp_path / "one"), _write(tmp_path / "two", workers=2)
    assert _files(one) == _files(two)
    other = _write(tmp_path / "other", seed=4)
    assert _files(one).keys() == _files(other).keys()
    assert _files(one) != _files(other)


def test_a_finished_dataset_is_kept_and_another_is_not_overwritten(tmp_path):
    out = _write(tmp_path / "shapes")
    before = (out / "train" / "captions.jsonl").stat().st_mtime_ns
    _write(out)
    assert (out / "train" / "captions.jsonl").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="other settings"):
        _write(out, seed=4)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="is not a dataset"):
        _write(tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    assert (_write(tmp_path / "empty") / "dataset.json").exists()


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    save, calls = Image.Image.save, itertools.count()

    def full(self, *args, **kwargs):
        if next(calls) == 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match="the disk is full; nothing was written"):
        _write(tmp_path / "shapes")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"train": -1}, "train is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"size": 8}, "size is 8"),
        ({"workers": 0}, "workers is 0"),
        ({"stage2": 61}, "stage2 is 61"),
    ],
)
def test_numbers_out_of_range(tmp_path, wrong, message):
    with pytest.raises(UserError, match=message):
        _write(tmp_path / "shapes", **wrong)
    assert os.listdir(tmp_path) == []


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "minigpt4_jax.shapes", "--train=4", "--heldout=1"]
    command += ["--heldout_pairs=1", "--seed=2"]
    done = subprocess.run([*command, f"--out={tmp_path / 'd'}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(shapes_dataset.read_scenes(tmp_path / "d" / "train")) == 4
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "d"
    done = subprocess.run([*command, f"--out={out}"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: cannot write {out}: ")
    assert "Traceback" not in done.stderr


def test_missing_scenes_are_named(tmp_path):
    with pytest.raises(UserError, match=r"scenes\.jsonl"):
        shapes_dataset.read_scenes(tmp_path)
