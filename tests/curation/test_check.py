"""`curate check`: numbers before and after, near duplicates, unconfirmed objects, a sheet."""

import json

import numpy as np
import pytest
from helpers.sideways import SIZE, upright, write_photo
from PIL import Image, ImageDraw, ImageFilter

from minigpt4_jax import errors
from minigpt4_jax.cli import curate
from minigpt4_jax.curation import duplicates
from minigpt4_jax.curation.objects import Vocabulary, read_vocabulary, unconfirmed
from minigpt4_jax.curation.statistics import statistics
from minigpt4_jax.errors import UserError
from minigpt4_jax.visualization import plots

TEXT = "A man in a red coat walks his dog along a quiet street, and behind them a car is parked near a bench."


def picture(seed, size=(96, 72)):
    """Some coloured shapes."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(rng.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, w, h = (rng.random(4) * [size[0], size[1], size[0] / 2, size[1] / 2]).tolist()
        draw.ellipse((x, y, x + w + 4, y + h + 4), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def command(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            errors.run(lambda: curate.main(["check", *map(str, arguments)]))
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return run


def test_near_duplicate_images_are_found_and_others_are_not():
    images = [picture(seed) for seed in range(40)]
    first = images[0]
    variants = [
        first.resize((200, 150)),
        first.filter(ImageFilter.GaussianBlur(0.6)),
        first.crop((1, 1, 95, 71)),
        Image.fromarray(np.clip(np.asarray(first, int) + 6, 0, 255).astype(np.uint8)),
    ]
    prints = [duplicates.fingerprint(image) for image in [*images, *variants]]
    assert duplicates.image_duplicates(prints) == {40 + n: 0 for n in range(len(variants))}
    # equal up to colour: only the thumbnails differ
    red, green = (Image.new("RGB", (64, 64), color) for color in ("red", "green"))
    flat = [duplicates.fingerprint(image) for image in (red, green, red)]
    assert duplicates.image_duplicates(flat) == {2: 0}


def test_bands_find_every_pair_within_the_distance():
    rng = np.random.default_rng(0)
    thumbnail = np.zeros((8, 8, 3), np.float32)
    base = int(rng.integers(0, 1 << 62))
    for distance in (0, 3, 6):
        for _ in range(50):
            bits = rng.choice(64, distance + 1, replace=False)
            near = base ^ sum(1 << int(b) for b in bits[:distance])
            far = base ^ sum(1 << int(b) for b in bits)
            prints = [duplicates.Fingerprint(value, thumbnail) for value in (base, near)]
            assert duplicates.image_duplicates(prints, distance) == {1: 0}
            prints = [duplicates.Fingerprint(value, thumbnail) for value in (base, far)]
            assert duplicates.image_duplicates(prints, distance) == {}


def test_near_duplicate_texts_are_those_of_the_exact_similarity():
    texts = [
        TEXT,
        TEXT.replace("quiet", "narrow"),
        "Another text about a cat that sleeps.",
        TEXT + " Yes.",
    ]
    assert duplicates.text_duplicates(texts, 0.7) == {1: 0, 3: 0}
    assert duplicates.text_duplicates(texts, 0.9) == {3: 0}
    assert duplicates.text_duplicates(["", "a", ""], 1.0) == {2: 0}


def test_objects_are_found_in_singular_and_plural_and_by_synonyms():
    vocabulary = read_vocabulary(None)
    assert vocabulary.find(TEXT) == {"person", "dog", "car", "bench"}
    assert vocabulary.find("Two puppies, hot dogs, teddy bears and BUSES") == {
        "dog", "hot dog", "teddy bear", "bus",
    }  # fmt: skip
    number, missing = unconfirmed(TEXT, ["a lady with her puppy"], ["car"], vocabulary)
    assert (number, missing) == (4, ["bench"])
    with pytest.raises(UserError, match='line 2: "a" also names "b"'):
        Vocabulary(["b, a", "a"])
    with pytest.raises(UserError, match="names no object"):
        Vocabulary(["# none", ""])


def test_statistics_are_counted_by_hand():
    rows = [
        {"id": "0", "image": "a", "caption": "A dog runs. A dog runs. A cat sits."},
        {"id": "1", "image": "a", "caption": "A dog runs on the grass.", "references": ["a dog"]},
        {"id": "2", "image": "b", "caption": "A cat and a truck.", "objects": ["cat"]},
        {"id": "3", "image": "c", "error": "no image"},
    ]
    found = statistics(rows, read_vocabulary(None))
    assert (found["rows"], found["images"], found["described"]) == (4, 3, 3)
    assert found["words"]["mean"] == round((9 + 6 + 5) / 3, 2) and found["words"]["median"] == 6
    assert found["sentences"]["mean"] == round(5 / 3, 2)
    assert found["vocabulary"] == 10  # a dog runs cat sits on the grass and truck
    assert found["texts_with_repetition"] == 1  # "a dog runs a"
    assert found["first_words"] == {"most_frequent": "a dog runs", "share": round(2 / 3, 4)}
    assert found["objects"] == {
        "rows": 2, "named": 3, "unconfirmed": 1, "unconfirmed_share": round(1 / 3, 4),
        "texts_with_unconfirmed": 0.5, "most_frequent": {"truck": 1},
    }  # fmt: skip


def test_the_command_removes_counts_and_shows(command, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for n in range(6):
        picture(n).save(folder / f"{n}.png")
    picture(0).resize((120, 90)).save(folder / "again.png")
    (folder / "broken.png").write_text("no image")
    texts = ["One text.", "Another about a truck."]
    texts += [f"The {n}th picture shows {c * 9}." for n, c in enumerate("abcd")]
    rows = [{"id": str(n), "image": f"{n}.png", "caption": texts[n]} for n in range(6)]
    rows += [
        {"id": "near", "image": "again.png", "caption": "Something else entirely."},
        {"id": "same", "image": "3.png", "caption": texts[1]},
        {"id": "broken", "image": "broken.png", "caption": "A text that is alone."},
        {"id": "error", "image": "4.png", "error": "unreadable"},
    ]
    source = write(folder / "rows.jsonl", rows)
    before = write(folder / "before.jsonl", [{**row, "caption": TEXT} for row in rows])
    references = write(
        tmp_path / "r.jsonl", [{"id": "1", "references": ["a street"], "objects": ["bus"]}]
    )
    out = tmp_path / "out.jsonl"
    arguments = [
        f"--input={source}", f"--output={out}", f"--before={before}", f"--references={references}",
        "--samples=4",
    ]  # fmt: skip
    code, said, err = command(*arguments)
    assert code == 0, err
    assert [row["id"] for row in read(out)] == [str(n) for n in range(6)]
    assert read(out)[1]["unconfirmed"] == ["truck"] and read(out)[1]["objects"] == ["bus"]
    removed = {row["id"]: row for row in read(tmp_path / "out.removed.jsonl")}
    assert (
        removed["near"]["cause"] == "near-duplicate image"
        and removed["near"]["duplicate_of"] == "0"
    )
    assert (
        removed["same"]["cause"] == "near-duplicate text" and removed["same"]["duplicate_of"] == "1"
    )
    assert removed["broken"]["cause"] == "image that cannot be read"
    assert removed["error"]["cause"] == "not described"
    assert "6 of 10 rows kept" in said and "before" in said
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report["before"]["rows"] == 10 and report["after"]["rows"] == 6
    assert sum(report["removed"].values()) == 4
    sheet = Image.open(tmp_path / "out.png")
    assert sheet.width > 300 and len(set(sheet.resize((40, 40)).getdata())) > 20
    code, said, _ = command(
        *arguments, "--max-unconfirmed=0", "--image-distance=-1", "--text-similarity=2"
    )
    assert code == 0 and "removed: unconfirmed objects" in said and "near-duplicate" not in said


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--image-distance=40"], "--image-distance=40: expected 0 to 32"),
        (["--text-similarity=0"], "--text-similarity=0: expected 0 to 1"),
        (["--references=none.jsonl"], "none.jsonl: there is no such file"),
        (["--objects=none.txt"], "none.txt: there is no such file"),
    ],
)
def test_wrong_options(command, tmp_path, more, message):
    source = write(tmp_path / "rows.jsonl", [{"id": "1", "image": "1.png", "caption": "text"}])
    code, _, err = command(f"--input={source}", f"--output={tmp_path / 'o.jsonl'}", *more)
    assert code == 2 and message in err and not (tmp_path / "o.jsonl").exists()
    write(tmp_path / "r.jsonl", [{"id": "7", "objects": ["cat"]}])
    code, _, err = command(
        f"--input={source}",
        f"--output={tmp_path / 'o.jsonl'}",
        f"--references={tmp_path / 'r.jsonl'}",
    )
    assert code == 2 and "none of its ids" in err


@pytest.mark.parametrize("exif", [True, False])
def test_photos_are_compared_and_shown_upright(command, tmp_path, monkeypatch, exif):
    upright(write_photo(tmp_path / "stored.png")).save(tmp_path / "upright.png")
    sizes = []
    monkeypatch.setattr(
        plots, "contact_sheet", lambda images, *_: sizes.extend(i.size for i in images)
    )
    rows = [
        {"id": "1", "image": "stored.png", "caption": "One text."},
        {"id": "2", "image": "upright.png", "caption": "Quite another one."},
    ]
    arguments = [
        f"--input={write(tmp_path / 'rows.jsonl', rows)}",
        f"--output={tmp_path / 'o.jsonl'}",
    ]
    code, _, err = command(*arguments, *([] if exif else ["--no-exif"]))
    assert code == 0, err
    assert [row["id"] for row in read(tmp_path / "o.jsonl")] == (["1"] if exif else ["1", "2"])
    assert sorted(sizes) == ([SIZE[::-1]] if exif else [SIZE[::-1], SIZE])
