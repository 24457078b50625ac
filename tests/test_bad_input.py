"""Bad input, from the command line to the files: one line, an exit code, nothing half-written.

Other tests of bad input: checkpoints (missing, truncated, HTML, pickled code, wrong variant) in
tests/convert, rows of data in tests/data, configurations in tests/training, single images in
processing/test_images.py, the Python interface in inference/test_model.py, the chat in cli/test_chat.py.
"""

import errno
import json
import shutil

import numpy as np
import pytest
from helpers import tiny
from PIL import Image

import minigpt4_jax
from minigpt4_jax import errors
from minigpt4_jax.checkpoint import model_directory, writer
from minigpt4_jax.cli import train as command
from minigpt4_jax.processing import images
from minigpt4_jax.visualization import plots

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    tiny.write_random_model(folder / "model", llm_layers=1)
    tiny.write_data(folder / "data", rows=4)
    return folder


@pytest.fixture
def train(home, tmp_path, capsys):
    """train(*options) -> (exit code, lines on stderr) of `python -m minigpt4_jax.train`."""
    short = [
        "--config=finetune", f"--config.model={home / 'model'}", "--config.steps=2",
        "--config.batch_size=2", "--config.dtype=float32", "--config.save_every=1",
        "--config.sample_every=0",
        f"--workdir={tmp_path / 'w'}",
    ]  # fmt: skip

    def run(*options):
        if not any("data.path" in option for option in options):  # a repeated option adds a value
            options = (*options, f"--config.data.path={home / 'data' / 'rows.jsonl'}")
        with pytest.raises(SystemExit) as stop:
            errors.run(lambda: command.main([*short, *options]))
        return stop.value.code, capsys.readouterr().err.splitlines()

    return run


def refused(train, *options):
    """The one line that the command ends with."""
    code, lines = train(*options)
    assert code == 2, lines
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def rows(folder, *captions):
    """A dataset of one image with these captions."""
    path = folder / "rows.jsonl"
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    path.write_text("".join(json.dumps({"image": "a.png", "caption": c}) + "\n" for c in captions))
    return path


# --- errors before a run starts -------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--config.batch_size=0", "config.batch_size is 0"),
        ("--config.bach_size=4", "did you mean config.batch_size"),
        ("--config.steps=many", "config.steps is 'many'"),
        ("--config=stage9", "did you mean stage"),
        ("--config.model={0}/none", "is not a model directory"),
        ("--config.model={0}/data", "is not a model directory"),
        ("--config.data.path={0}/none.jsonl", "there is no such file"),
        ("--config.data.path={0}/model", "has no filter_cap.json"),
        ("--config.variant=minigpt4-llama2", "is a minigpt4-vicuna model"),
        ("--workdir=/proc/nowhere/w", "cannot write /proc/nowhere/w: "),
        ("--workdir={0}/data/rows.jsonl", "cannot write "),
    ],
)
def test_bad_options(home, train, tmp_path, option, message):
    assert message in refused(train, option.format(home))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the dataset is empty"),
        ("\n\n", "the dataset is empty"),
        ("<!DOCTYPE html><html></html>", "line 1: is not JSON"),
        ('{"image": "a.png", "caption": "a dog"}\n{"image": "a.png", "cap', "line 2: is not JSON"),
        ('{"image": "a.png", "caption": ""}', 'line 1: "caption" is empty'),
        ('{"image": "a.png", "caption": " \\n"}', 'line 1: "caption" is empty'),
        ('{"image": "b.png", "caption": "x"}', "1 of 1 images are missing"),
    ],
)
def test_bad_dataset_files(train, tmp_path, text, message):
    path = rows(tmp_path)
    path.write_text(text)
    assert message in refused(train, f"--config.data.path={path}")
    assert not (tmp_path / "w").exists()


def test_a_caption_of_punctuation_only(train, tmp_path):
    clean = ["--config.data.clean_captions=True", f"--config.data.path={rows(tmp_path, '...')}"]
    assert "empty once its punctuation is removed" in refused(train, *clean)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("name", ["llm-00001.safetensors", "projection-00001.safetensors"])
def test_a_truncated_model_starts_no_run(home, train, tmp_path, name):
    """A workdir is bound to its model, so a run must not be created for damaged weights."""
    model = shutil.copytree(home / "model", tmp_path / "model")
    data = (model / name).read_bytes()
    (model / name).write_bytes(data[: len(data) // 2])
    line = refused(train, f"--config.model={model}")
    assert name in line and "damaged" in line
    (model / name).unlink()
    assert "missing" in refused(train, f"--config.model={model}")
    assert not (tmp_path / "w").exists()


def test_a_run_is_not_written_into_a_model_that_it_reads(home, train, tmp_path):
    base = shutil.copytree(home / "model", tmp_path / "base")
    tensors = model_directory.Tensors(base)
    parts = [(name, tensors[name]) for name in tensors if name.startswith("projection.")]
    config = model_directory.read_config(base)
    model = writer.write_model(tmp_path / "model", config, parts, base=base)
    (tmp_path / "link").symlink_to(base, target_is_directory=True)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for workdir in (model, model / "more", tmp_path / "link" / "w"):
        line = refused(train, f"--config.model={model}", f"--workdir={workdir}")
        assert f"--workdir: {workdir} is in" in line and "choose another" in line
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


# --- errors during a run --------------------------------------------------------------------------


def test_a_broken_image_ends_the_run_which_continues_once_repaired(train, tmp_path):
    """Also: captions longer than the limit are cut with a warning, not an error."""
    data, model = tmp_path / "data", tmp_path / "w" / "model"
    path = tiny.write_data(data, rows=4)
    intact = (data / "2.png").read_bytes()
    (data / "2.png").write_bytes(intact[: len(intact) // 2])
    options = [f"--config.data.path={path}", "--config.max_text_length=3"]
    line = refused(train, *options)
    assert "2.png" in line and not model.exists()
    (data / "2.png").write_bytes(intact)
    code, lines = train(*options)
    assert code == 0, lines
    assert model_directory.read_config(model).max_text_length == 3


def test_a_full_disk_at_the_end_loses_no_step(train, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise FULL

    workdir = tmp_path / "w"
    with monkeypatch.context() as patched:
        patched.setattr(writer, "save_file", full)
        line = refused(train)
    assert "the disk is full; nothing was written" in line and str(workdir / "model") in line
    assert not (workdir / "model").exists() and not list(workdir.glob(".*"))
    steps = (workdir / "metrics.jsonl").read_text()
    code, lines = train()
    assert code == 0, lines
    assert (workdir / "metrics.jsonl").read_text() == steps  # no step was repeated
    assert set(model_directory.Tensors(workdir / "model")) >= {
        "projection.weight",
        "projection.bias",
    }


def test_pictures_on_a_full_disk(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def write_some_bytes(self, path, **_):
        path.write_bytes(b"\x89PNG")
        raise FULL

    out = tmp_path / "a.png"
    monkeypatch.setattr(Figure, "savefig", write_some_bytes)
    with pytest.raises(errors.UserError, match=r"a\.png: the disk is full"):
        plots.loss_plot([{"step": 1, "loss": 2.0}], out)
    monkeypatch.setattr(Image.Image, "save", write_some_bytes)
    with pytest.raises(errors.UserError, match=r"a\.png: the disk is full"):
        plots.contact_sheet([np.zeros((4, 4, 3), np.uint8)], ["x"], [True], out)
    assert not list(tmp_path.iterdir())


# --- unusual but valid images ---------------------------------------------------------------------


def test_unusual_images(home, tmp_path):
    """1x1, 16-bit, CMYK, transparent and very wide images go through the whole model."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    gray = (pixels[..., 0].astype(np.uint16) << 8) | 255
    odd = {
        "one.png": Image.new("RGB", (1, 1), (200, 30, 30)),
        "deep.png": Image.fromarray(gray),
        "print.jpg": Image.fromarray(pixels).convert("CMYK"),
        "clear.png": Image.fromarray(pixels).convert("RGBA"),
        "long.png": Image.new("L", (20_000, 1), 9),
    }
    paths = [tmp_path / name for name in odd]
    for path, image in zip(paths, odd.values(), strict=True):
        image.save(path)
    assert Image.open(paths[1]).mode.startswith("I;16") and Image.open(paths[2]).mode == "CMYK"
    model = minigpt4_jax.load(home / "model", "float32")
    visual = model.encode_images(paths)
    assert np.isfinite(visual).all()
    plain = [np.asarray(images.open_image(path)) for path in paths]
    np.testing.assert_array_equal(visual, model.encode_images(plain))
    np.testing.assert_array_equal(plain[1], np.repeat(pixels[..., :1], 3, axis=2))
    np.testing.assert_array_equal(plain[3], pixels)


def test_leave_is_called_after_an_unexpected_exception_too(capsys):
    """Otherwise one of several processes would wait for the others at its exit, and they for it."""

    def leave(code):
        raise SystemExit(code)

    with pytest.raises(SystemExit) as e:
        errors.run(lambda: {}["absent"], leave)
    assert e.value.code == 1 and "KeyError: 'absent'" in capsys.readouterr().err
    with pytest.raises(KeyError):
        errors.run(lambda: {}["absent"])
