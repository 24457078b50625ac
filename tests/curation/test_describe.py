"""`curate describe`: two turns, each image once, resumable, from folders, shards and JSONL files."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from helpers import tiny
from PIL import Image

import minigpt4_jax
from minigpt4_jax import errors
from minigpt4_jax.cli import common, curate
from minigpt4_jax.cli.curation import describe as command_line
from minigpt4_jax.curation.images import list_images
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.chat_templates import chat_format, with_images

NUM_IMAGES = 11
BELOW = 11  # tokens; about half of the tiny model's greedy answers are shorter
LIMIT = 7


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, and a folder of images, one of them in a folder below and one damaged."""
    folder = tmp_path_factory.mktemp("describe")
    tiny.write_random_model(folder / "model", llm_layers=1)
    rng = np.random.default_rng(0)
    (folder / "images" / "below").mkdir(parents=True)
    for n in range(NUM_IMAGES):
        pixels = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        name = "below/0.png" if n == 0 else f"{n:02}.png"
        Image.fromarray(pixels).save(folder / "images" / name)
    return folder


@pytest.fixture(scope="module")
def model(home):
    return minigpt4_jax.load(home / "model", "float32")


@pytest.fixture
def command(capsys, monkeypatch, model):
    """command(*arguments) -> (exit code, stdout, stderr); the model is loaded once."""
    monkeypatch.setattr(common, "load_model", lambda args: model)

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            errors.run(lambda: curate.main(["describe", *map(str, arguments)]))
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return run


def arguments(home, out, *more, images="images"):
    return [
        f"--model={home / 'model'}", f"--images={home / images}", f"--output={out}", "--batch_size=4",
        f"--max_new_tokens={LIMIT}", f"--continue-below={BELOW}", "--prompt=what is it", *more,
    ]  # fmt: skip


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def expected(model, image, seed, **options):
    """The turns of a description, by plain calls of `generate`."""
    template = chat_format(model.config, model.tokenizer)
    question = with_images("what is it", 1)
    prompt = template.render([(question, None)])
    options = {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": LIMIT} | options
    (first,) = model.generate([image], [prompt], seed=seed, **options)
    if len(model.tokenizer.encode(first)) >= BELOW:
        return [first]
    prompt = template.render([(question, first), ("Continue", None)])
    return [first, *model.generate([image], [prompt], seed=seed + (1 << 31) - (1 << 32), **options)]


def test_short_answers_are_continued(home, model, command, tmp_path):
    out = tmp_path / "out.jsonl"
    code, said, _ = command(*arguments(home, out))
    assert code == 0 and f"{NUM_IMAGES} rows, 0 of them" in said
    rows = read(out)
    assert [row["id"] for row in rows] == [f"{n:02}" for n in range(1, NUM_IMAGES)] + ["below/0"]
    for n, row in enumerate(rows):
        image = tmp_path / row["image"]
        assert row["turns"] == expected(model, image, n)
        assert row["caption"] == " ".join(turn for turn in row["turns"] if turn)
        assert len(row["tokens"]) == len(row["finish_reason"]) == len(row["turns"])
    assert {len(row["turns"]) for row in rows} == {1, 2}


def test_one_turn_and_the_authors_defaults(home, command, tmp_path):
    args = command_line.parse(arguments(home, tmp_path / "a"))
    assert command_line.PROMPT.startswith("Describe this image in detail. Give as many details")
    assert (args.continue_prompt, command_line.CONTINUE_BELOW) == ("Continue", 80)
    assert command(*arguments(home, tmp_path / "a", "--continue-below=0"))[0] == 0
    assert {len(row["turns"]) for row in read(tmp_path / "a")} == {1}


def test_complete_prompts_are_used_as_they_are(home, model, command, tmp_path):
    prompt = "say <ImageHere> now"
    code, _, err = command(
        *arguments(home, tmp_path / "a", "--raw", f"--prompt={prompt}", "--seed=3")
    )
    assert code == 0, err
    row = read(tmp_path / "a")[1]
    options = {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": LIMIT, "seed": 3 + 1}
    assert row["turns"] == model.generate([tmp_path / row["image"]], [prompt], **options)
    code, _, err = command(*arguments(home, tmp_path / "b", "--raw"))
    assert code == 2 and "has no <ImageHere>" in err


def test_samples_differ_and_images_are_encoded_once(home, model, command, tmp_path, monkeypatch):
    encoded = []
    encode = model._encode
    monkeypatch.setattr(
        model, "_encode", lambda pixels: encoded.append(len(pixels)) or encode(pixels)
    )
    code, _, err = command(*arguments(home, tmp_path / "a", "--samples=3", "--seed=5"))
    assert code == 0, err
    rows = read(tmp_path / "a")
    assert [row["sample"] for row in rows] == [0, 1, 2] * NUM_IMAGES
    assert sum(encoded) == NUM_IMAGES
    assert rows[4]["turns"] == expected(model, tmp_path / rows[4]["image"], 5 + 4)
    assert len({row["caption"] for row in rows[:3]}) > 1


def test_a_random_choice_of_images_is_the_seeds(home, command, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        more = ["--num-images=4", f"--seed={seed}", "--temperature=0"]
        assert command(*arguments(home, tmp_path / name, *more))[0] == 0
    a, b, c = (read(tmp_path / name) for name in "abc")
    assert a == b and [r["id"] for r in a] != [r["id"] for r in c] and len(a) == 4


@pytest.mark.parametrize("kept", (0, 3, 8))
def test_an_interrupted_run_goes_on(home, command, tmp_path, kept):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert command(*arguments(home, whole))[0] == 0
    lines = whole.read_bytes().splitlines(keepends=True)
    cut.write_bytes(b"".join(lines[:kept]) + lines[kept][:9])
    settings = tmp_path / "whole.settings.json"
    settings.rename(tmp_path / "cut.settings.json")
    assert command(*arguments(home, cut))[0] == 0
    assert cut.read_bytes() == whole.read_bytes()
    code, _, err = command(*arguments(home, cut, "--temperature=0.5"))
    assert code == 2 and "was started with temperature 1.0, now 0.5" in err


def test_a_killed_process_loses_no_row_and_none_is_described_again(
    home, command, tmp_path, monkeypatch
):
    whole, out, samples = tmp_path / "whole", tmp_path / "out", "--samples=12"
    assert command(*arguments(home, whole, samples))[0] == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "minigpt4_jax.curate", "describe", *arguments(home, out, samples)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while not (out.exists() and out.stat().st_size):
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
    written = out.read_bytes().count(b"\n")
    assert 0 < written < 12 * NUM_IMAGES
    described, run = [], command_line.Describer.run

    def counted_run(self, tasks, batch_size):
        described.extend(task.number for task in tasks)
        return run(self, tasks, batch_size)

    monkeypatch.setattr(command_line.Describer, "run", counted_run)
    assert command(*arguments(home, out, samples))[0] == 0
    assert described == list(range(written, 12 * NUM_IMAGES))
    assert out.read_bytes() == whole.read_bytes()


def test_an_unreadable_image_is_an_error_of_its_row(home, command, tmp_path):
    rows = [{"image": f"images/{name}.png"} for name in ("01", "missing", "02")]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    code, said, _ = command(*arguments(home, out, images="rows.jsonl"))
    assert code == 1 and "3 rows, 1 of them with an error" in said
    first, second, third = read(out)
    assert "missing.png" in second["error"] and "caption" not in second
    assert first["caption"] and third["caption"]
    Image.new("RGB", (20, 20)).save(home / "images" / "missing.png")
    try:
        assert command(*arguments(home, out, "--retry-errors", images="rows.jsonl"))[0] == 0
    finally:
        (home / "images" / "missing.png").unlink()
    again = read(out)
    assert again[0] == first and again[1]["caption"]


def test_wrong_options_are_told_before_the_model_is_loaded(home, command, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "load_model", lambda args: pytest.fail("loaded"))
    out = tmp_path / "out.jsonl"
    for more, expected_message in (
        (["--samples=0"], "--samples=0: expected 1 or more"),
        (["--samples=2", "--temperature=0"], "equal descriptions"),
        (["--num-images=99"], "only 11 images"),
        (["--prompt= "], "--prompt is empty"),
    ):
        code, _, err = command(*arguments(home, out, *more))
        assert code == 2 and expected_message in err, err
    code, _, err = command(*arguments(home, out, images="none"))
    assert code == 2 and "there is no such file" in err
    assert not out.exists()
    code, _, err = command("descrbe")
    assert code == 2
    with pytest.raises(UserError, match="did you mean describe"):
        curate.main(["descrbe"])


# --- the images of a path ---------------------------------------------------------------------


def png(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_images_of_shards_with_and_without_captions(tmp_path):
    metadata = json.dumps({"caption": " a red square "}).encode()
    write_tar(tmp_path / "0.tar", {"a.png": png(0), "a.json": metadata, "a.txt": b"other"})
    write_tar(
        tmp_path / "1.tar", {"a.txt": b"a text\n", "b.png": png(1), "a.png": png(2), "._a.png": b""}
    )
    rows = list_images(str(tmp_path))
    assert [row.id for row in rows] == ["0/a", "1/b", "1/a"]
    assert [row.references for row in rows] == [("a red square",), (), ("a text",)]
    from minigpt4_jax.processing.images import open_image

    images = [np.asarray(open_image(row.source)) for row in rows]
    assert all(
        np.array_equal(image, np.asarray(Image.open(io.BytesIO(png(n)))))
        for n, image in enumerate(images)
    )


def test_rows_of_a_jsonl_file_keep_their_fields(tmp_path):
    rows = [
        {"image": "a.png", "caption": "a text", "source": "mine"},
        {"image": "b/c.jpg", "id": 7, "references": ["x", " y "]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    first, second = list_images(str(path))
    assert (first.id, first.references, first.fields) == ("a", ("a text",), {"source": "mine"})
    assert (second.id, second.source) == ("7", str(tmp_path / "b/c.jpg"))
    assert second.references == ("x", "y")
    for wrong, message in (
        ({"image": 3}, '"image" is int 3'),
        ({"image": "a.png", "caption": 3}, "its captions are int 3"),
        ({"image": "a.png", "id": None}, '"id" is null'),
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=message):
            list_images(str(path))
    path.write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[0]))
    with pytest.raises(UserError, match='two images have the id "a"'):
        list_images(str(path))


def test_two_files_with_one_stem_are_two_images(tmp_path):
    for name in ("a.png", "a.jpg", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("")
    assert [row.id for row in list_images(str(tmp_path))] == ["a.jpg", "a.png", "b"]
