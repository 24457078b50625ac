"""`python -m minigpt4_jax.data check`: counts, invalid rows and the contact sheet."""

import io
import json
import os
import pickle
import tarfile
import threading

import pytest
from helpers.published_layouts import Disk, write_everything
from helpers.sideways import write_photo
from PIL import Image

from minigpt4_jax.cli.check_data import main
from minigpt4_jax.errors import UserError
from minigpt4_jax.visualization import plots


def write_rows(folder, photos, name="rows.jsonl", **changes):
    rows = [
        {"image": photo, "question": "[refer] where?", "answer": "{<10><20><60><80>}"}
        for photo in photos
    ]
    rows[0] |= changes
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(folder, data):
    path = folder / "mine.py"
    path.write_text(f"def get_config():\n    return {{'data': {data!r}}}\n")
    return str(path)


def test_own_data_needs_no_configuration(tmp_path, photos, capsys):
    rows = write_rows(tmp_path, photos)
    sheet = f"--sheet={tmp_path / 'sheet.png'}"
    assert main(["check", str(rows), sheet]) == 0
    with_config = ["check", "finetune", f"--config.data.path={rows}", sheet]
    first = capsys.readouterr().out
    assert main(with_config) == 0 and capsys.readouterr().out == first
    rows.rename(tmp_path / "metadata.jsonl")
    assert main(["check", str(tmp_path), sheet, "--config.data.exif=False"]) == 0


def test_mixture(tmp_path, photos, capsys):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"<html>")
    good = write_rows(tmp_path, photos)
    bad = write_rows(tmp_path, photos, "bad.jsonl", image=str(broken))
    mix = {
        "good": {"reader": "files", "path": str(good), "ratio": 3},
        "bad": {"reader": "files", "path": str(bad)},
        "cc_sbu": {"path": str(tmp_path / "none.tar")},
        "off": {"ratio": 0},
    }
    sheet = tmp_path / "sheet.png"
    args = ["check", config(tmp_path, {"mix": mix}), f"--sheet={sheet}", "--samples=2"]
    assert main(args) == 1
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[1].split() == ["bad", "10", "0", "20.0%", "10", "1"]
    assert lines[2] == "  1 file that is no image"
    assert "broken.png: is a web page" in lines[3]
    assert "there is no shard at" in out
    assert [line.split() for line in lines if line.startswith("good")] == [
        ["good", "10", "0", "60.0%", "10", "0"]
    ]
    assert not any(line.startswith("off") for line in lines)
    assert Image.open(sheet).width > 500
    assert main([*args, "--config.data.mix.bad.ratio=0", "--config.data.mix.cc_sbu.ratio=0"]) == 0


def test_plain_files_and_boxes_on_the_contact_sheet(tmp_path, photos, capsys):
    path, sheet = write_rows(tmp_path, photos), tmp_path / "sheet.png"
    assert main(["check", "finetune", f"--config.data.path={path}", f"--sheet={sheet}"]) == 0
    assert str(path) in capsys.readouterr().out
    colors = {color for _, color in Image.open(sheet).convert("RGB").getcolors(10**6)}
    plain = write_rows(tmp_path, photos, "plain.jsonl")
    plain.write_text(plain.read_text().replace("{<10><20><60><80>}", "there"))
    main(["check", "finetune", f"--config.data.path={plain}", f"--sheet={sheet}"])
    without = {color for _, color in Image.open(sheet).convert("RGB").getcolors(10**6)}
    assert colors - without


@pytest.mark.parametrize("exif", [True, False])
def test_photos_of_own_data_are_turned_and_published_ones_are_not(tmp_path, monkeypatch, exif):
    photo = write_photo(tmp_path / "1.jpg")
    row = {"image": "1.jpg", "question": "What?", "answer": ["a"]}
    Disk(tmp_path).json("okvqa_train.json", [row])
    own = write_rows(tmp_path, [str(photo)])
    mix = {
        "mine": {"reader": "files", "path": str(own)},
        "ok_vqa": {"path": str(tmp_path), "images": str(tmp_path)},
    }
    upright = []
    monkeypatch.setattr(
        plots, "contact_sheet",
        lambda images, *_, **__: upright.extend(i.height > i.width for i in images),
    )  # fmt: skip
    sheet = [f"--sheet={tmp_path / 'sheet.png'}", f"--config.data.exif={exif}"]
    assert main(["check", config(tmp_path, {"mix": mix}), *sheet]) == 0
    assert upright == [exif, False]
    upright.clear()
    assert main(["check", str(own), *sheet]) == 0
    assert upright == [exif]


def test_unused_rows_are_counted_by_cause(tmp_path, capsys):
    disk = Disk(tmp_path)
    write_everything(disk, 6)
    (tmp_path / "coco/images/COCO_train2014_000000000009.jpg").unlink()
    refs = tmp_path / "refcoco_annotations/refcoco/refs(unc).p"
    rows = pickle.loads(refs.read_bytes())
    rows[0]["split"] = rows[1]["split"] = "val"
    rows[4]["sentences"] = []
    refs.write_bytes(pickle.dumps(rows))
    mix = {
        "refcoco": {"path": "refcoco_annotations", "images": "coco/images"},
        "gqa": {"path": "gqa"},
    }
    sheet = tmp_path / "sheet.png"
    path = config(tmp_path, {"root": str(tmp_path), "mix": mix})
    assert main(["check", path, f"--sheet={sheet}", "--samples=2"]) == 0
    out = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert out[1:-1] == [
        ["gqa", "6", "0", "50.0%", "6", "0"],
        ["refcoco", "2", "2", "50.0%", "2", "0"],
        ["1", "without", "their", "image"],
        ["1", "without", "words"],
        ["2", "of", "another", "split,", "by", "definition"],
    ]
    assert Image.open(sheet).width > 500


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["check", "stage2"], "config.data.path"),
        (["check", "nope"], "unknown"),
        (["look", "stage2"], "invalid choice"),
        (["check", "stage2", "--config.data.pth=x"], "did you mean config.data.path"),
        (["check", "stage2", "--samples=-1"], "must be 0 or more"),
    ],
)
def test_invalid_arguments(args, message):
    with pytest.raises(UserError, match=message):
        main(args)


def check(folder, path, capsys, *args):
    sheet = f"--sheet={folder / 'sheet.png'}"
    code = main(["check", "finetune", f"--config.data.path={path}", sheet, *args])
    return code, capsys.readouterr().out


@pytest.mark.parametrize("broken", [0, 131, 199])
def test_every_row_is_opened(tmp_path, photos, capsys, broken):
    truncated = tmp_path / "truncated.jpg"
    Image.effect_noise((64, 64), 50).save(truncated)
    truncated.write_bytes(truncated.read_bytes()[:-900])
    images = [photos[n % len(photos)] for n in range(200)]
    images[broken] = str(truncated)
    path = write_rows(tmp_path, images)
    code, out = check(tmp_path, path, capsys)
    assert code == 1
    assert out.splitlines()[1].split()[1:] == ["200", "0", "200", "1"]
    assert "  1 image that cannot be decoded\n" in out


def test_every_cause_has_an_example(tmp_path, photos, capsys):
    contents = {"html.png": b"<html>", "empty.png": b"", "other.png": b"<html>"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(pipe := tmp_path / "pipe.png")
    reading = threading.Timer(5, lambda: os.close(os.open(pipe, os.O_RDWR)))  # ends a reader
    reading.start()
    path = write_rows(tmp_path, [*photos, *contents, "pipe.png"])
    code, out = check(tmp_path, path, capsys, "--samples=0")
    assert code == 1
    reading.cancel()
    messages = [line for line in out.splitlines() if line.startswith("  image ")]
    assert len(messages) == 3
    for text in ("is a web page", "empty.png: the file is empty", "pipe.png: is a pipe"):
        assert sum(text in message for message in messages) == 1


def test_damaged_shards_are_a_failure_whatever_is_opened(tmp_path, photos, capsys):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, photo in enumerate(photos):
            tar.add(photo, f"{number}.png")
            text = tarfile.TarInfo(f"{number}.txt")
            text.size = 4
            tar.addfile(text, io.BytesIO(b"word"))
    data = {"mix": {"cc": {"reader": "webdataset", "path": str(tmp_path / "*.tar")}}}
    args = ["check", config(tmp_path, data), "--look=0", "--samples=0"]
    assert main(args) == 0
    (tmp_path / "b.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:700])
    assert main(args) == 1
    assert "  1 shards that are damaged" in capsys.readouterr().out


def test_the_sheet_is_checked_before_rows_are_opened(tmp_path, photos, monkeypatch):
    path = write_rows(tmp_path, photos)
    monkeypatch.setattr("minigpt4_jax.cli.check_data.check", None)
    for sheet, message in ((tmp_path, "is a directory"), (path / "a.png", "is no directory that")):
        with pytest.raises(UserError, match=message):
            main(["check", "finetune", f"--config.data.path={path}", f"--sheet={sheet}"])


def test_look_limits_the_rows_and_says_so(tmp_path, photos, capsys):
    path = write_rows(tmp_path, photos * 9)
    code, out = check(tmp_path, path, capsys, "--look=7", "--samples=2")
    assert code == 0
    assert out.splitlines()[1].split()[1:] == ["90", "0", "7", "0"]
    assert "opened 7 of 90 rows" in out


@pytest.mark.parametrize("as_mixture", [False, True])
def test_missing_images_count_whatever_is_opened(tmp_path, photos, capsys, as_mixture):
    """They were looked for. A row is counted once, and those that are opened not twice."""
    path = write_rows(tmp_path, [*photos, "none.png", "gone.png", str(tmp_path)])
    options = [f"--config.data.path={path}"]
    name = "finetune"
    if as_mixture:
        mix = {"mine": {"reader": "files", "path": str(path)}}
        name, options = config(tmp_path, {"mix": mix}), []
    for look in (0, 3, 12, 13):
        args = ["check", name, *options, f"--sheet={tmp_path / 'sheet.png'}"]
        assert main([*args, f"--look={look}", "--samples=0"]) == 1
        out = capsys.readouterr().out
        row = out.splitlines()[1].split()
        assert (row[1], row[-2:]) == ("13", [str(look), "3"])
        assert "  2 image that is missing\n" in out and "  1 image that is a directory\n" in out
        assert ("none.png" in out or "gone.png" in out) and f"image {tmp_path}" in out


def test_missing_images_and_folders_are_counted(tmp_path, photos, capsys):
    path = write_rows(tmp_path, [*photos, "none.png", "gone.png", str(tmp_path)])
    code, out = check(tmp_path, path, capsys)
    assert code == 1
    assert "  2 image that is missing\n" in out
    assert "  1 image that is a directory\n" in out
