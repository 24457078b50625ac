"""`curate export`: what the readers of training read back, images, names, the data card."""

import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from minigpt4_jax import errors
from minigpt4_jax.cli import curate
from minigpt4_jax.curation.card import USAGE
from minigpt4_jax.curation.decisions import Decision, Decisions
from minigpt4_jax.curation.images import list_images
from minigpt4_jax.curation.rows import image_fields, read_rows
from minigpt4_jax.data.datasets import open_dataset
from minigpt4_jax.data.json_records import read_sources
from minigpt4_jax.data.readers import open_source
from minigpt4_jax.processing.images import open_image
from minigpt4_jax.training.config_cli import parse as parse_config

FORMATS = ("minigpt4", "jsonl", "webdataset", "parquet")


@pytest.fixture
def command(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            errors.run(lambda: curate.main(["export", *map(str, arguments)]))
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return run


def smooth(seed):
    """An image that JPEG changes little."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((80, 60), Image.Resampling.BICUBIC)


@pytest.fixture
def source(tmp_path):
    """Rows of a JPEG (two samples), a PNG with alpha, a rotated JPEG, an image in a tar; and one error."""
    folder = tmp_path / "in"
    (folder / "a").mkdir(parents=True)
    smooth(0).save(folder / "a" / "x.jpg", quality=95)
    smooth(1).convert("RGBA").save(folder / "a_x.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth(2).save(folder / "turned.jpg", quality=95, exif=exif)
    data = io.BytesIO()
    smooth(3).save(data, "JPEG", quality=95)
    with tarfile.open(folder / "s.tar", "w") as tar:
        member = tarfile.TarInfo("k.jpg")
        member.size = len(data.getvalue())
        tar.addfile(member, io.BytesIO(data.getvalue()))
    (in_tar,) = list_images(str(folder / "s.tar"))
    rows = [
        {
            "id": "a/x",
            "image": "a/x.jpg",
            "sample": 0,
            "caption": "first \u00e9 text",
            "original": "first",
        },
        {"id": "a/x", "image": "a/x.jpg", "sample": 1, "caption": "second text"},
        {"id": "a_x", "image": "a_x.png", "caption": "third text"},
        {"id": "turned", "image": "turned.jpg", "caption": "fourth text"},
        {"id": "s/k", **image_fields(in_tar.source, folder), "caption": "fifth text"},
        {"id": "e", "image": "none.jpg", "error": "there is no such file"},
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    polish = {"command": "polish", "model": "gpt-x", "temperature": 0.7, "removed": {"short": 3}}
    settings = {**polish, "history": [{"command": "describe", "prompt": "Describe it.", "seed": 5}]}
    (folder / "rows.jsonl.settings.json").write_text(json.dumps(settings))
    return path


def read_back(out, kind):
    """(caption, image) of every row, as the command in the data card reads it."""
    words = USAGE[kind].replace("DIR", str(out)).removesuffix(" ...").split()
    assert words[:3] == ["python", "-m", "minigpt4_jax.train"]
    c, _ = parse_config(words[3:], data_only=True)
    if c.data.mix:
        dataset = open_source("curated", c.data.mix["curated"])
        examples = [dataset.example(i, np.random.default_rng(0)) for i in range(len(dataset))]
    else:
        examples = read_sources(c.data.path)
    return [(e.answers[0], np.asarray(open_image(e.images[0]), int)) for e in examples]


@pytest.mark.parametrize("kind", FORMATS)
def test_training_reads_back_what_was_exported(source, command, tmp_path, kind):
    out = tmp_path / "out"
    code, said, err = command(
        f"--input={source}", f"--out={out}", f"--format={kind}", "--shard-rows=2"
    )
    assert code == 0, err
    assert (
        "5 rows with 4 images, 2 of them encoded as JPEG" in said
        and "1 left out: not described" in said
    )
    rows = [row for row in read_rows(source) if "caption" in row]
    pairs = read_back(out, kind)
    assert [caption for caption, _ in pairs] == [row["caption"] for row in rows]
    expected = [
        smooth(0),
        smooth(0),
        smooth(1),
        smooth(2).transpose(Image.Transpose.ROTATE_270),
        smooth(3),
    ]
    for (_, found), image in zip(pairs, expected, strict=True):
        assert found.shape == np.asarray(image).shape
        assert np.abs(found - np.asarray(image, int)).mean() < 3
    listed = (out / "SHA256SUMS").read_text().splitlines()
    for line in listed:
        digest, name = line.split("  ")
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    files = {
        p.relative_to(out).as_posix()
        for p in out.rglob("*")
        if p.suffix != ".index" and p.is_file()
    }
    assert files == {line.split("  ")[1] for line in listed} | {"SHA256SUMS"}


def test_the_originals_layout(source, command, tmp_path):
    out = tmp_path / "out"
    assert command(f"--input={source}", f"--out={out}")[0] == 0
    rows = json.loads((out / "filter_cap.json").read_text())["annotations"]
    assert [row["image_id"] for row in rows] == ["a_x", "a_x", "a_x-2", "turned", "s_k"]
    assert all(set(row) == {"image_id", "caption"} for row in rows)
    assert (out / "image/a_x.jpg").read_bytes() == (source.parent / "a/x.jpg").read_bytes()
    dataset = open_dataset("cc_sbu_align", out)
    assert len(dataset) == 5


def test_the_card_has_what_made_the_rows(source, command, tmp_path):
    out = tmp_path / "out"
    assert command(f"--input={source}", f"--out={out}")[0] == 0
    card = json.loads((out / "card.json").read_text())
    assert [step["command"] for step in card["steps"]] == ["describe", "polish", "export"]
    assert card["counts"] == {"rows": 5, "images": 4, "images encoded as JPEG": 2}
    assert card["removed"] == {"polish": {"short": 3}, "export": {"not described": 1}}
    assert card["steps"][-1]["input"]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    text = (out / "README.md").read_text()
    for part in (
        "Describe it.",
        "gpt-x",
        "| polish | short | 3 |",
        "| rows | 5 |",
        "--config=stage2",
    ):
        assert part in text


def test_decisions_are_applied(source, command, tmp_path):
    rows = read_rows(source)
    path = tmp_path / "in" / "rows.decisions.jsonl"
    decisions = Decisions(path)
    decisions.put(rows[0], Decision("reject"))
    decisions.put(rows[1], Decision("edit", "better text"))
    decisions.put(rows[2], Decision("accept"))
    asks = [f"--input={source}", f"--out={tmp_path / 'out'}", "--format=jsonl"]
    code, _, err = command(*asks)
    assert code == 2 and f"pass --decisions={path}" in err
    assert command(*asks, f"--decisions={path}")[0] == 0
    pairs = read_back(tmp_path / "out", "jsonl")
    assert [caption for caption, _ in pairs] == [
        "better text",
        "third text",
        "fourth text",
        "fifth text",
    ]
    code, said, _ = command(*asks, f"--decisions={path}", "--only-accepted", "--overwrite")
    assert code == 0 and "2 rows with 2 images" in said and "2 left out: not reviewed" in said
    code, said, _ = command(*asks, "--no-decisions", "--overwrite", "--max-per-image=1")
    assert code == 0 and "4 rows with 4 images" in said and "1 left out: more samples" in said


def test_nothing_is_replaced_unasked_or_left_half_written(source, command, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    asks = [f"--input={source}", f"--out={out}"]
    code, _, err = command(*asks, "--overwrite")
    assert code == 2 and "is no earlier export" in err
    (out / "mine.txt").unlink()
    out.rmdir()
    assert command(*asks)[0] == 0
    code, _, err = command(*asks)
    assert code == 2 and "pass --overwrite" in err
    before = (out / "card.json").read_bytes()
    (source.parent / "turned.jpg").write_bytes(b"no image")
    code, _, err = command(*asks, "--overwrite")
    assert code == 2 and "turned.jpg" in err
    assert (out / "card.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_a_damaged_parquet_file_is_named(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(errors.UserError, match=r"x\.parquet: cannot be read as Parquet"):
        read_sources(tmp_path / "x.parquet")
