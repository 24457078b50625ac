"""Rows without their image: one limit for own files and published datasets, before training."""

import logging

import pytest
from helpers.published_layouts import Disk

from minigpt4_jax.data.config import DataConfig, DatasetConfig
from minigpt4_jax.data.readers import open_components
from minigpt4_jax.errors import UserError


def own_rows(folder, count, missing):
    disk = Disk(folder)
    for n in range(count - missing):
        disk.picture(f"{n}.png")
    rows = [{"image": f"{n}.png", "caption": "x"} for n in range(count)]
    path = str(disk.json("rows.json", rows))
    return {"path": (path,)}


def own_rows_in_a_mixture(folder, count, missing):
    paths = own_rows(folder, count, missing)["path"]
    return {"mix": {"mine": DatasetConfig(reader="files", path=paths)}}


def published_rows(folder, count, missing):
    disk = Disk(folder)
    for n in range(count - missing):
        disk.picture(f"coco/{n}.jpg")
    rows = [{"image": f"{n}.jpg", "question": "What?", "answer": ["a"]} for n in range(count)]
    disk.json("okvqa_train.json", rows)
    return {"mix": {"ok_vqa": DatasetConfig(path=(str(folder),), images=str(folder / "coco"))}}


LAYOUTS = pytest.mark.parametrize("write", [own_rows, own_rows_in_a_mixture, published_rows])


@LAYOUTS
@pytest.mark.parametrize(("missing", "max_broken"), [(1, 0.05), (3, 0.15), (19, 1.0)])
def test_as_many_as_allowed(tmp_path, caplog, write, missing, max_broken):
    data = DataConfig(**write(tmp_path, 20, missing), max_broken=max_broken)
    with caplog.at_level(logging.WARNING):
        (component,) = open_components(data)
    assert len(component.source) == (20 - missing if write is published_rows else 20)
    (record,) = caplog.records
    assert f"{missing} " in record.getMessage()


@LAYOUTS
@pytest.mark.parametrize(("missing", "max_broken"), [(2, 0.05), (1, 0.01), (7, 0.3)])
def test_more_than_allowed(tmp_path, write, missing, max_broken):
    data = DataConfig(**write(tmp_path, 20, missing), max_broken=max_broken)
    with pytest.raises(
        UserError,
        match=rf"{missing} of 20 rows .*more than config\.data\.max_broken = {max_broken}",
    ) as e:
        open_components(data)
    assert "\n" not in str(e.value)


@LAYOUTS
def test_none_allowed(tmp_path, write):
    data = DataConfig(**write(tmp_path, 20, 1), max_broken=0.0)
    with pytest.raises(UserError, match=r"missing|without their image") as e:
        open_components(data)
    assert "19." in str(e.value)


def test_a_folder_is_no_image(tmp_path):
    disk = Disk(tmp_path)
    disk.picture("photos/1.png")
    rows = [{"image": name, "caption": "x"} for name in ("photos/1.png", "photos")]
    path = str(disk.json("rows.json", rows))
    with pytest.raises(UserError, match=r"1 of 2 images are missing: .*photos \(a folder\)"):
        open_components(DataConfig(path=(path,), max_broken=0.0))
