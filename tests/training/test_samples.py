"""Captions of validation images during a run: which images, and the contact sheets."""

import dataclasses
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny
from PIL import Image

from minigpt4_jax.data.config import DataConfig
from minigpt4_jax.data.json_records import Example
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.evaluation import choose_examples, sampled_turn
from minigpt4_jax.training.trainer import train

pytestmark = pytest.mark.usefixtures("traced_steps")


def examples(*images: str) -> list[Example]:
    return [Example(tuple(image.split()), ("",), (str(i),)) for i, image in enumerate(images)]


@pytest.mark.parametrize(
    ("images", "count", "expected"),
    [
        (["a"] * 5 + ["b"] * 5 + ["c"] * 5, 2, [0, 5]),
        (["a", "b", "a", "b", "c", "c"], 3, [0, 1, 4]),
        (["a"] * 5, 3, [0]),
        ([f"{i}" for i in range(100)], 4, [0, 25, 50, 75]),
        (["", "a", "", "b"], 9, [1, 3]),
        (["x/a", "x/./a", "x/y/../a", "x/b"], 9, [0, 3]),  # the same file
        (["a b", "a b", "b a", "a"], 9, [0, 2, 3]),  # two images a row
        (["", ""], 3, []),
        (["a", "b"], 0, []),
    ],
)
def test_chosen_images_differ_and_are_spread_over_the_file(images, count, expected):
    rows = examples(*images)
    assert choose_examples(rows, count) == [rows[i] for i in expected]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    """Four captions a picture in the validation file."""
    folder = tmp_path_factory.mktemp("samples")
    tiny.write_model(folder / "model", llm_layers=1)
    rows = tiny.write_data(folder / "data", rows=6)
    lines = rows.read_text().splitlines()
    captions = folder / "data" / "captions.jsonl"
    captions.write_text("".join(f"{line}\n" * 4 for line in lines))
    data = DataConfig(path=(str(rows),), val_path=(str(captions),))
    fields = {
        "steps": 4, "batch_size": 2, "warmup_steps": 1, "dtype": "float32", "save_every": 2,
        "log_every": 1, "eval_every": 0, "sample_every": 2, "sample_images": 3, "sample_tokens": 6,
        "max_text_length": 12,  # batches of one width: each width is a program
    }  # fmt: skip
    return TrainConfig(model=str(folder / "model"), data=data, **fields)


def events(workdir: Path) -> list:
    """TensorBoard's events, in order of writing."""
    from tensorboardX.proto import event_pb2

    result = []
    for path in sorted((workdir / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data, position = path.read_bytes(), 0
        while position < len(data):  # length, its checksum, the event, its checksum
            (length,) = struct.unpack_from("<Q", data, position)
            start = position + 12
            result.append(event_pb2.Event.FromString(data[start : start + length]))
            position = start + length + 4
    return result


def image_events(workdir: Path) -> list[tuple[int, bytes]]:
    """(step, PNG) of the images that TensorBoard shows: it drops those after a restart's step."""
    shown: list[tuple[int, bytes]] = []
    for event in events(workdir):
        if event.HasField("session_log"):
            shown = [(step, png) for step, png in shown if step < event.step]
        shown += [
            (event.step, value.image.encoded_image_string)
            for value in event.summary.value
            if value.HasField("image")
        ]
    return shown


def sheets(workdir: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (workdir / "samples").iterdir()}


def samples(workdir: Path) -> list[tuple[int, str]]:
    records = [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]
    return [(r["step"], Path(r["image"]).name) for r in records]


EXPECTED = [(step, name) for step in (2, 4) for name in ("0.png", "2.png", "4.png")]


def test_each_validation_is_a_contact_sheet(config, tmp_path):
    train(config, tmp_path / "w")
    assert samples(tmp_path / "w") == EXPECTED
    files = sheets(tmp_path / "w")
    assert sorted(files) == ["2.png", "4.png"]
    assert image_events(tmp_path / "w") == [(2, files["2.png"]), (4, files["4.png"])]
    with Image.open(tmp_path / "w" / "samples" / "4.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).reshape(-1, 3).astype(int)
    for color in ("red", "blue"):  # of 0.png and 4.png, and of 2.png
        assert (np.abs(pixels - tiny.COLORS[color]).max(axis=1) < 30).sum() > 1000


MARK = "<Img><ImageHere></Img>"


@pytest.mark.parametrize(
    ("example", "images", "question"),
    [
        (Example(("a",), (), ("x",)), ("a",), ""),
        (Example(("a", "b"), (), ("x",)), ("a", "b"), ""),
        (Example(("a", "b"), (f"{MARK} or {MARK}?",), ("x",)), ("a", "b"), f"{MARK} or {MARK}?"),
        (Example(("a",), ("hi", f"{MARK} so?"), ("x", "y")), ("a",), f"{MARK} so?"),
        (Example(("a", "b"), (f"{MARK} 1", f"{MARK} 2"), ("x", "y")), ("a",), f"{MARK} 1"),
        (Example((b"png",), ("what",), ("x",)), (b"png",), f"{MARK} what"),
    ],
)
def test_a_sample_asks_the_first_question_with_images(example, images, question):
    assert sampled_turn(example) == (images, question)


def test_rows_with_several_images_are_sampled_too(config, tmp_path, capsys):
    """Their images are beside each other. Files of one name are told apart by their folders."""
    folder = Path(config.data.path[0]).parent
    (folder / "other").mkdir(exist_ok=True)
    Image.open(folder / "2.png").save(folder / "other" / "0.png")
    rows = [
        {"images": ["0.png", "2.png"], "question": "<image> or <image>?", "answer": "both"},
        {"image": "0.png", "caption": "red"},
        {"image": "other/0.png", "caption": "blue"},
    ]
    several = folder / "several.jsonl"
    several.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = dataclasses.replace(config.data, val_path=(str(several),))
    train(dataclasses.replace(config, data=data, steps=2), tmp_path / "w")
    first, *others = map(json.loads, (tmp_path / "w" / "samples.jsonl").read_text().splitlines())
    assert first["image"] == [str(folder / "0.png"), str(folder / "2.png")]
    assert first["prompt"].count("<ImageHere>") == 2 and "or" in first["prompt"]
    assert [r["image"] for r in others] == [str(folder / "0.png"), str(folder / "other" / "0.png")]
    tags = [v.tag for event in events(tmp_path / "w") for v in event.summary.value if "/" in v.tag]
    name = folder.name
    names = [f"{name}/0.png + {name}/2.png", f"{name}/0.png", "other/0.png"]
    assert [tag.removesuffix("/text_summary") for tag in tags] == [f"samples/{n}" for n in names]
    assert f"  {names[0]}: " in capsys.readouterr().out
    with Image.open(tmp_path / "w" / "samples" / "2.png") as sheet:
        card = np.asarray(sheet.convert("RGB")).astype(int)[58:234, 14:190]  # of the first row
    half = card.shape[1] // 2
    for color, part in (("red", card[:, :half]), ("blue", card[:, half:])):
        assert (np.abs(part - tiny.COLORS[color]).max(axis=-1) < 30).sum() > 1000


def test_validation_rows_without_images_are_said_once(config, tmp_path, capsys):
    text = Path(config.data.path[0]).with_name("text.jsonl")
    text.write_text('{"question": "why", "answer": "so"}\n')
    data = dataclasses.replace(config.data, val_path=(str(text),))
    train(dataclasses.replace(config, data=data), tmp_path / "w")
    assert capsys.readouterr().out.count("no samples: no row of the validation data has an im") == 1


def test_a_resumed_run_has_each_sheet_once(config, tmp_path):
    class Crash(Exception):
        pass

    def crash(record):
        if record["step"] == 4:
            raise Crash

    w = tmp_path / "w"
    train(config, tmp_path / "whole")
    with pytest.raises(Crash):
        train(dataclasses.replace(config, save_every=100, sample_every=1), w, on_metrics=crash)
    assert sorted(sheets(w)) == ["1.png", "2.png", "3.png"]
    train(config, w)  # from the start, for there is no checkpoint
    assert samples(w) == EXPECTED
    assert sheets(w) == sheets(tmp_path / "whole")
    with pytest.raises(Crash):
        train(config, tmp_path / "again", on_metrics=crash)
    train(config, tmp_path / "again")
    assert samples(tmp_path / "again") == EXPECTED
    assert image_events(tmp_path / "again") == image_events(tmp_path / "whole")
