"""python -m minigpt4_jax.batch: each row answered once and in order, also after interruptions."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields

import numpy as np
import pytest
from helpers import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import minigpt4_jax
from minigpt4_jax import errors
from minigpt4_jax.cli import batch, batch_output, common
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.chat_templates import chat_format, with_images

COUNT = 40


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, five images, and rows of zero to two images with questions of several lengths."""
    folder = tmp_path_factory.mktemp("batch")
    tiny.write_random_model(folder / "model", llm_layers=1)
    rng = np.random.default_rng(0)
    for n in range(5):
        pixels = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
    rows = []
    for n in range(COUNT):
        row = {"id": n, "prompt": "what is " * (1 + n % 4) + "it"}
        if n % 5:
            row["image"] = f"{n % 5}.png" if n % 3 else [f"{n % 5}.png", "0.png"]
        rows.append(row)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
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
            errors.run(lambda: batch.main([str(a) for a in arguments]))
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return run


def arguments(home, out, *more, rows="rows.jsonl"):
    files = [f"--input={home / rows}", f"--output={out}"]
    return [f"--model={home / 'model'}", *files, "--max_new_tokens=6", "--batch_size=4", *more]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def expected(model, home, row, **options):
    names = row.get("image", [])
    images = [home / name for name in ([names] if isinstance(names, str) else names)]
    question = with_images(row["prompt"], len(images))
    prompt = chat_format(model.config, model.tokenizer).render([(question, None)])
    return model.generate([images], [prompt], max_new_tokens=6, **options)[0]


def test_every_row_is_answered_as_if_alone(home, model, command, tmp_path):
    out = tmp_path / "out.jsonl"
    code, said, _ = command(*arguments(home, out))
    assert code == 0 and f"{COUNT} rows, 0 of them" in said
    rows, results = read(home / "rows.jsonl"), read(out)
    assert [
        {k: v for k, v in row.items() if k not in batch_output.OUTPUT_KEYS} for row in results
    ] == rows
    for row in results[:: COUNT // 8]:
        assert row["response"] == expected(model, home, row)
    assert {row["finish_reason"] for row in results} <= {"stop", "length"}
    assert all(1 <= row["tokens"] <= 6 for row in results)


def test_sampling_depends_only_on_the_row(home, model, command, tmp_path):
    warm = ["--temperature=2", "--top_k=50", "--seed=7"]
    assert command(*arguments(home, tmp_path / "a", *warm))[0] == 0
    assert command(*arguments(home, tmp_path / "b", *warm, "--batch_size=1"))[0] == 0
    assert read(tmp_path / "a") == read(tmp_path / "b")
    row = read(tmp_path / "a")[11]
    assert row["response"] == expected(model, home, row, temperature=2.0, top_k=50, seed=18)


def test_rotated_photos_follow_the_models_setting(home, model, command, tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 8
    image = Image.open(home / "1.png")
    image.save(home / "photo.png", exif=exif)
    image.transpose(Image.Transpose.ROTATE_90).save(home / "shown.png")
    names = ["photo.png", "shown.png"]
    rows = [json.dumps({"image": name, "prompt": "what is it"}) for name in names]
    (home / "photos.jsonl").write_text("\n".join(rows))
    monkeypatch.setattr(model, "exif", True)
    assert command(*arguments(home, tmp_path / "a", rows="photos.jsonl"))[0] == 0
    first, second = read(tmp_path / "a")
    assert first["response"] == second["response"]
    code, _, err = command(*arguments(home, tmp_path / "a", "--no-exif", rows="photos.jsonl"))
    assert code == 2 and "was started with exif True, now False" in err


def test_beam_search_and_stops_from_the_command_line(home, model, command, tmp_path):
    rows = [{"image": "1.png", "prompt": "what is it"}, {"image": "none.png", "prompt": "x"}]
    (home / "beams.jsonl").write_text("\n".join(map(json.dumps, rows)))
    search = ["--num_beams=3", "--num_return_sequences=2", "--length_penalty=0.5", "--stop=it"]
    code, _, err = command(*arguments(home, tmp_path / "a", *search, rows="beams.jsonl"))
    assert code == 1, err
    first, second = read(tmp_path / "a")
    question = chat_format(model.config, model.tokenizer).render(
        [(with_images("what is it", 1), None)]
    )
    (outputs,) = model.generate_details(
        [home / "1.png"], [question], max_new_tokens=6, num_beams=3, num_return_sequences=2,
        length_penalty=0.5, stop=["it"],
    )  # fmt: skip
    assert first["response"] == [output.text for output in outputs]
    assert first["tokens"] == [len(output.ids) for output in outputs]
    assert "none.png" in second["error"]


def test_every_option_of_generate_is_on_the_command_line():
    names = {field.name: field for field in fields(minigpt4_jax.GenerationConfig)}
    assert {*names} - {*common.GENERATION_OPTIONS} == {"template", "extra_bos"}
    assert {*common.GENERATION_OPTIONS} <= {*names}
    for name, option in common.GENERATION_OPTIONS.items():
        default = names[name].default
        kind = {"context": int, "stop": str, "stop_ids": int}.get(name, type(default))
        assert option.type is kind and option.repeated == isinstance(default, tuple), name


def test_broken_rows_get_an_error(home, command, tmp_path):
    (home / "half.png").write_bytes((home / "1.png").read_bytes()[:200])
    good = {"image": "1.png", "prompt": "what is it"}
    broken = [
        "{not json", "[1]", json.dumps({"image": "1.png"}), json.dumps(good | {"prompt": ""}),
        json.dumps(good | {"prompt": 3}), json.dumps(good | {"image": "none.png"}),
        json.dumps(good | {"image": ["1.png", "half.png"]}), json.dumps(good | {"image": 3}),
        json.dumps(good | {"prompt": "<ImageHere> <ImageHere>"}), "\x00",
        json.dumps(good | {"prompt": "long " * 3000}), json.dumps(good | {"response": "x"}),
        json.dumps(good | {"prompt": "\ud83d"}),
    ]  # fmt: skip
    lines = [line for wrong in broken for line in (wrong, json.dumps(good))]
    (home / "broken.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    code, said, _ = command(*arguments(home, out, rows="broken.jsonl"))
    assert code == 1 and "26 rows, 13 of them with an error" in said and "--retry-errors" in said
    results = read(out)
    assert len({row["response"] for row in results[1::2]}) == 1
    messages = [
        "not JSON", "expected an object", 'has no "prompt"', "prompt is ''", "prompt is 3", "none.png",
        "half.png", "expected a path", "2 <ImageHere> and 1 images", "not JSON", "context", "rename",
        "half of a character",
    ]  # fmt: skip
    for row, message in zip(results[::2], messages, strict=True):
        assert message in row["error"] and (set(row) & {"tokens"}) == set(), row
    code, said, _ = command(*arguments(home, out, rows="broken.jsonl"))
    assert code == 1 and said.startswith(
        "all 26 rows are answered already, 13 of them with an error"
    )


def test_rows_with_an_error_are_answered_again_on_request(home, command, tmp_path):
    """Images that appear later and rows that are mended; answers are kept as they were written."""
    good, late = {"image": "1.png", "prompt": "what is it"}, {"image": "late.png", "prompt": "and"}
    rows = [json.dumps(late), json.dumps(good), "{not json", json.dumps({"image": "2.png"})]
    (home / "mended.jsonl").write_text("\n".join(rows))
    out, complete = tmp_path / "out", tmp_path / "complete"
    code, said, _ = command(*arguments(home, out, rows="mended.jsonl"))
    assert code == 1 and "4 rows, 3 of them with an error" in said
    kept = out.read_text().splitlines()[1].replace('"response": "', '"response": "kept ')
    lines = out.read_text().splitlines()
    out.write_text("\n".join([lines[0], kept, *lines[2:]]) + "\n")

    again = arguments(home, out, "--retry-errors", rows="mended.jsonl")
    code, said, _ = command(*again)  # nothing is mended
    assert code == 1 and "3 rows, 3 of them" in said
    (home / "late.png").write_bytes((home / "3.png").read_bytes())
    rows[2] = json.dumps(good | {"prompt": "mended"})
    (home / "mended.jsonl").write_text("\n".join(rows))
    code, said, _ = command(*again)
    assert code == 1 and "3 rows, 1 of them" in said
    code, said, _ = command(*again, "--prompt=by default")
    assert code == 0 and "1 rows, 0 of them" in said and "--retry-errors" not in said
    assert command(*arguments(home, complete, "--prompt=by default", rows="mended.jsonl"))[0] == 0
    results = out.read_text().splitlines()
    assert results[1] == kept and results[::2] == complete.read_text().splitlines()[::2]
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith((".", "out"))) == [
        "out", "out.settings.json",
    ]  # fmt: skip
    assert command(*again, "--prompt=by default")[1].startswith("all 4 rows are answered already")


def test_an_interrupted_retry_leaves_the_file(home, command, model, tmp_path, monkeypatch):
    rows = [json.dumps({"prompt": "one"}), json.dumps({"image": "gone.png", "prompt": "two"})]
    (home / "gone.jsonl").write_text("\n".join(rows))
    out = tmp_path / "out"
    assert command(*arguments(home, out, rows="gone.jsonl"))[0] == 1
    data = out.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(batch, "answer_all", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert command(*arguments(home, out, "--retry-errors", rows="gone.jsonl"))[0] == 130
    assert out.read_bytes() == data
    assert len(list(tmp_path.iterdir())) == 2


def test_a_retry_where_every_row_failed(home, command, tmp_path):
    rows = [json.dumps({"image": f"new{n}.png", "prompt": "what"}) for n in range(3)]
    (home / "all.jsonl").write_text("\n".join(rows))
    out = tmp_path / "out"
    assert command(*arguments(home, out, rows="all.jsonl"))[0] == 1
    for n in range(3):
        (home / f"new{n}.png").write_bytes((home / f"{n}.png").read_bytes())
    assert command(*arguments(home, out, "--retry-errors", rows="all.jsonl"))[0] == 0
    assert [row["image"] for row in read(out)] == ["new0.png", "new1.png", "new2.png"]
    assert all("response" in row for row in read(out))


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("utf-16", "is UTF-16; expected UTF-8"),
        ("utf-16-be", "is UTF-16; expected UTF-8"),
        ("utf-32", "is UTF-32; expected UTF-8"),
    ],
)
def test_another_encoding_is_refused_once(home, command, tmp_path, encoding, message):
    text = "\n".join(json.dumps({"prompt": f"row {n}"}) for n in range(13))
    (home / "wide.jsonl").write_bytes(text.encode(encoding))
    code, out, err = command(*arguments(home, tmp_path / "out", rows="wide.jsonl"))
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("document", "indent", "message"),
    [
        ([{"prompt": "a"}, {"prompt": "b"}], None, "is one JSON array of 2 rows"),
        ([{"prompt": "a"}] * 3, 1, "is one JSON array of 3 rows"),
        ({"prompt": "a"}, 2, "is one JSON object over 3 lines"),
        ([], None, "has no rows"),
    ],
)
def test_one_json_document_is_named(home, command, tmp_path, document, indent, message):
    (home / "array.jsonl").write_text(json.dumps(document, indent=indent))
    code, out, err = command(*arguments(home, tmp_path / "out", rows="array.jsonl"))
    assert (code, out) == (2, "") and message in err and "a JSON object per line" in err


def test_default_and_raw_prompts(home, model, command, tmp_path):
    rows = [{"image": "1.png"}, {"image": "2.png", "question": "<Img><ImageHere></Img> so?"}]
    (home / "few.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, _, _ = command(
        *arguments(home, tmp_path / "o", "--raw", "--prompt=<ImageHere> is", rows="few.jsonl")
    )
    assert code == 0
    images = [home / "1.png", home / "2.png"]
    prompts = ["<ImageHere> is", rows[1]["question"]]
    results = read(tmp_path / "o")
    assert [r["response"] for r in results] == model.generate(images, prompts, max_new_tokens=6)
    assert results[0]["prompt"] == "<ImageHere> is"


def test_an_interrupted_run_continues_wherever_it_was_cut(home, command, tmp_path):
    complete, out = tmp_path / "complete", tmp_path / "out"
    assert command(*arguments(home, complete))[0] == 0
    data = complete.read_bytes()
    settings_file = (tmp_path / "complete.settings.json").read_bytes()

    @settings(max_examples=8, deadline=None)
    @given(st.integers(0, len(data)))
    def check(cut):
        out.write_bytes(data[:cut])
        (tmp_path / "out.settings.json").write_bytes(settings_file)
        assert command(*arguments(home, out))[0] == 0
        assert out.read_bytes() == data

    check()


def test_killed_while_it_writes(home, tmp_path):
    """A real process gets SIGKILL after its first answers; the next one completes the file."""
    program = [sys.executable, "-m", "minigpt4_jax.batch", *arguments(home, tmp_path / "out")]
    program += ["--dtype=float32", "--batch_size=1"]
    child = subprocess.Popen(program, stderr=subprocess.DEVNULL)
    while child.poll() is None and not read_some(tmp_path / "out"):
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    before = (tmp_path / "out").read_bytes()
    subprocess.run(program, check=True, capture_output=True)
    complete = (tmp_path / "out").read_bytes()
    assert complete.startswith(before[: before.rfind(b"\n") + 1])
    assert [row["id"] for row in read(tmp_path / "out")] == list(range(COUNT))


def test_killed_before_its_first_answer(home, command, tmp_path):
    """The settings are written before the output exists, and an empty output may be used."""
    out = tmp_path / "out"
    out.touch()
    assert command(*arguments(home, out))[0] == 0
    answers = out.read_bytes()
    out.unlink()
    assert command(*arguments(home, out))[0] == 0
    assert out.read_bytes() == answers
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.settings.json"]


def read_some(path):
    return path.exists() and path.stat().st_size > 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--input=none.jsonl"], "none.jsonl: cannot be read"),
        (["--input={home}/empty.jsonl"], "has no rows"),
        (["--output={home}/no/out"], "there is no directory"),
        (["--output={home}/rows.jsonl"], "are the same file"),
        (["--output={home}/1.png"], "was not written by this command"),
        (["--batch_size=0"], "--batch_size=0"),
        (["--temperature=-1"], "temperature -1"),
        (["--template=moon"], "template 'moon' is not known"),
    ],
)
def test_errors_before_anything_is_written(home, command, tmp_path, changed, message):
    (home / "empty.jsonl").write_text("\n \n")
    before = sorted(p.name for p in home.iterdir())
    changes = [text.format(home=home) for text in changed]
    code, out, err = command(*arguments(home, tmp_path / "out"), *changes)
    assert (code, out) == (2, "") and err.startswith("error: ") and message in err, err
    assert sorted(p.name for p in home.iterdir()) == before and not any(tmp_path.iterdir())


def test_an_output_of_other_rows_or_settings_is_refused(home, command, tmp_path):
    out = tmp_path / "out"
    assert command(*arguments(home, out))[0] == 0
    data = out.read_bytes()
    code, _, err = command(*arguments(home, out, "--temperature=1"))
    assert code == 2 and "was started with temperature None, now 1.0" in err
    rows = (home / "rows.jsonl").read_text().splitlines()
    (home / "other.jsonl").write_text("\n".join(rows[1:]))
    code, _, err = command(*arguments(home, out, rows="other.jsonl"))
    assert code == 2 and "line 1 is not the answer to row 1" in err
    assert out.read_bytes() == data


def test_a_full_disk_loses_no_row(home, model, tmp_path, monkeypatch):
    rows = batch.read_rows(home / "rows.jsonl", None)
    output = batch_output.Output(tmp_path / "out", rows, {})

    class Full(io.BytesIO):
        def write(self, data):
            if self.tell() + len(data) > 300:
                raise OSError(28, "No space left on device")
            return super().write(data)

    with output:
        os.close(os.dup(output._file.fileno()))
        output._file = Full()
        with pytest.raises(UserError, match=r"No space left on device; \d+ rows are written"):
            for row in output.remaining:
                output.put(row, {"response": "x"})
