"""batch --ray without a cluster: files of rows in pieces, and the output folder of a run."""

import io
import json
import sys
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers import ray_batch, tiny
from PIL import Image

from minigpt4_jax.cli import batch, common
from minigpt4_jax.cli.ray_batch.file_format import results_of
from minigpt4_jax.cli.ray_batch.formats import format_of
from minigpt4_jax.cli.ray_batch.plan import Piece, find_files, make_pieces, open_output
from minigpt4_jax.cli.ray_batch.worker import Worker
from minigpt4_jax.errors import UserError

RESULTS = {"response": "a dog", "finish_reason": "stop", "tokens": 2}
COUNT = 7


@pytest.fixture
def inputs(tmp_path):
    """Seven rows with an image in each format: {format: path}."""
    return ray_batch.write_inputs(tmp_path, COUNT)


@pytest.mark.parametrize("name", ["jsonl", "parquet", "webdataset"])
def test_pieces_are_read_and_written(inputs, tmp_path, name):
    path = inputs[name]
    known = format_of(path)
    assert known.name == name
    pieces = list(make_pieces([path, path], 3))
    assert [piece.rows for piece in pieces] == [3, 3, 1] * 2
    assert [piece.first for piece in pieces] == [0, 3, 6, 7, 10, 13]
    number = 0
    for piece in pieces[:3]:
        rows, source = known.read(path, piece.start, piece.rows, piece.first, "by default")
        assert [row.number for row in rows] == [*range(number, number + piece.rows)]
        for row in rows:
            assert row.error is None and row.fields["id"] == number
            prompt = "by default" if number == 2 else f"question {number}"
            assert row.fields["prompt"] == prompt
            (image,) = row.images
            file = io.BytesIO(image) if isinstance(image, bytes) else image
            assert Image.open(file).size == (8 + number, 8)
            number += 1
        out = tmp_path / f"out{known.suffix}"
        results = [RESULTS, *[{"error": "broken"}] * (piece.rows - 1)]
        known.write(out, rows, results, source)
        assert known.read_results(out) == results
    assert number == COUNT


def test_the_rows_of_jsonl_are_those_of_batch(tmp_path):
    """Line ends of other systems, empty lines, no end of the last line, broken rows."""
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"prompt": "é"}).encode()
    path.write_bytes(
        b"\xef\xbb\xbf" + b"\r\n\n".join([good, b"{broken", b"  ", good, b"[1]\r" + good, good])
    )
    expected = batch.read_rows(path, None)
    known = format_of(path)
    found = []
    for piece in make_pieces([path], 2):
        found += known.read(path, piece.start, piece.rows, piece.first, None)[0]
    assert found == expected and len(found) == 6


def test_outputs_keep_the_columns_and_files_of_the_input(inputs, tmp_path):
    known = format_of(inputs["parquet"])
    rows, table = known.read(inputs["parquet"], 2, 3, 0, None)
    known.write(tmp_path / "out.parquet", rows, [RESULTS] * 3, table)
    written = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert written.select(table.column_names) == table
    assert written["response"].to_pylist() == ["a dog"] * 3 and written["error"].null_count == 3
    known = format_of(inputs["webdataset"])
    rows, samples = known.read(inputs["webdataset"], 0, 2, 0, None)
    known.write(tmp_path / "out.tar", rows, [RESULTS] * 2, samples)
    with (
        tarfile.open(tmp_path / "out.tar") as archive,
        tarfile.open(inputs["webdataset"]) as before,
    ):
        assert sorted(archive.getnames()) == sorted(before.getnames()[:4])
        assert archive.extractfile("0.png").read() == before.extractfile("0.png").read()
        assert json.load(archive.extractfile("0.json")) == {
            "id": 0, "prompt": "question 0", **RESULTS,
        }  # fmt: skip


def test_paths_bytes_and_structs_are_images_of_parquet(tmp_path):
    struct = {"bytes": b"1", "path": "a.png"}
    path = tmp_path / "a.parquet"
    for values, expected in [
        (["a.png", None], [(str(tmp_path / "a.png"),), ()]),
        ([b"1", None], [(b"1",), ()]),
        ([struct, {"bytes": None, "path": "b.png"}], [(b"1",), (str(tmp_path / "b.png"),)]),
        ([[struct, struct], []], [(b"1", b"1"), ()]),
    ]:
        pyarrow.parquet.write_table(pyarrow.table({"image": values}), path)
        rows, _ = format_of(path).read(path, 0, 2, 0, "what")
        assert [row.images for row in rows] == expected
        assert not any(isinstance(row.fields.get("image"), (bytes, dict)) for row in rows)


def test_files_folders_and_patterns(inputs, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for n in range(3):
        (folder / f"{n:02}.jsonl").write_bytes(inputs["jsonl"].read_bytes())
    (folder / ".hidden.jsonl").touch()
    (folder / "readme.txt").touch()
    everything = [folder.resolve() / f"{n:02}.jsonl" for n in range(3)]
    assert find_files(str(folder)) == find_files(f"{folder}/*.jsonl") == everything
    assert find_files(f"{folder}/{{00..01}}.jsonl") == everything[:2]
    (folder / "a.parquet").touch()
    for pattern, words in [
        (str(folder), "has files of jsonl and parquet"),
        (f"{folder}/{{02..03}}.jsonl", "03.jsonl: there is no such file"),
        (f"{folder}/readme.txt", "expected files that end in"),
        (f"{folder}/a.parquet", "cannot be read as Parquet"),
    ]:
        with pytest.raises(UserError, match=words):
            list(make_pieces(find_files(pattern), 3))


def test_damaged_input_is_named(inputs, tmp_path):
    tar = tmp_path / "half.tar"
    tar.write_bytes(inputs["webdataset"].read_bytes()[:2000])
    table = pyarrow.table({"prompt": ["a"], "response": ["b"]})
    pyarrow.parquet.write_table(table, tmp_path / "taken.parquet")
    (tmp_path / "one.json").write_text(json.dumps([{"prompt": "a"}] * 2, indent=1))
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, words in [
        ("half.tar", "is damaged after 1 rows"),
        ("taken.parquet", 'has the column "response"'),
        ("one.json", "is one JSON array of 2 rows"),
        ("empty.jsonl", "has no rows"),
    ]:
        with pytest.raises(UserError, match=words):
            list(make_pieces([tmp_path / name], 3))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_random_model(tmp_path_factory.mktemp("ray") / "model", llm_layers=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ray-models=2"], "--ray-models is of --ray"),
        (["--rows-per-shard=5"], "are of --ray"),
        (["--ray=local", "--ray-models=4:2"], "expected N or MIN:MAX"),
        (["--ray=local", "--ray-gpus=-1"], "expected 0 or more"),
        (["--ray=local", "--ray-resources=TPU"], "expected NAME:N"),
        (["--ray=10.0.0.1"], "expected HOST:PORT"),
        (["--ray=127.0.0.1:1"], "there is no Ray cluster"),
        (["--ray=local", "--rows-per-shard=0"], "expected 1 or more"),
        (["--ray=local", "--shard=1/2"], "choose one of them"),
        (["--ray=local", "--output-format=webdataset"], "the input is jsonl; expected jsonl"),
    ],
)
def test_wrong_options(inputs, model, tmp_path, options, words):
    files = [f"--input={inputs['jsonl']}", f"--output={tmp_path / 'out'}"]
    with pytest.raises(UserError, match=words):
        batch.main([f"--model={model}", *files, *options])
    assert not (tmp_path / "out").exists()


def test_ray_absent_is_told(inputs, model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    files = [f"--input={inputs['jsonl']}", f"--output={tmp_path / 'out'}"]
    with pytest.raises(
        UserError, match=r"needs the package ray: pip install 'minigpt4_jax\[ray\]'"
    ):
        batch.main([f"--model={model}", *files, "--ray=local"])
    assert not (tmp_path / "out").exists()


# --- the worker, without a cluster ------------------------------------------------------------------


@pytest.fixture
def worker(chat_home, tmp_path, monkeypatch, loaded_models):
    """worker(input, *options) -> (output folder, function that answers pieces by their numbers)."""
    load_model = common.load_model

    def load_once(args):
        if "batch" not in loaded_models:
            loaded_models["batch"] = load_model(args)
        return loaded_models["batch"]

    monkeypatch.setattr(common, "load_model", load_once)

    def make(path, *options):
        args = batch.parse([
            f"--model={chat_home / 'model'}", f"--input={path}", f"--output={tmp_path / 'out'}",
            "--max_new_tokens=4", "--temperature=2", "--seed=3", "--rows-per-shard=3", *options,
        ])  # fmt: skip
        pieces, parts, source = open_output(args, batch.settings_of(args))
        made = Worker(args, source, parts)

        def answer(*numbers):
            columns = zip(*[pieces[n] for n in numbers], strict=True)
            return made(dict(zip(Piece._fields, map(np.array, columns), strict=True)))

        return parts, answer

    return make


def results(parts):
    return [r for n in range(3) for r in parts.format.read_results(parts.path(n))]


@pytest.mark.parametrize("name", ["jsonl", "parquet", "webdataset"])
def test_every_format_gets_the_answers_of_batch(worker, inputs, tmp_path, name):
    parts, answer = worker(inputs[name], "--prompt=what")
    done = answer(2, 0, 1)
    assert done["rows"] == [1, 3, 3] and done["errors"] == [0, 0, 0] and not any(done["failure"])
    assert parts.format.name == name
    model = f"--model={tmp_path}"  # loaded already
    options = ["--max_new_tokens=4", "--temperature=2", "--seed=3", "--prompt=what"]
    files = [f"--input={inputs['jsonl']}", f"--output={tmp_path / 'plain'}"]
    assert batch.main([model, *files, *options]) == 0
    plain = [json.loads(line) for line in (tmp_path / "plain").read_text().splitlines()]
    assert results(parts) == [results_of(row) for row in plain]


def test_rows_with_an_error_are_answered_again(worker, inputs):
    """The row without a prompt never is; that without its image is, when the image has come."""
    image = inputs["jsonl"].with_name("4.png")
    image.rename(image.with_suffix(".away"))
    parts, answer = worker(inputs["jsonl"])
    assert answer(0, 1, 2)["errors"] == [1, 1, 0]
    first = results(parts)
    image.with_suffix(".away").rename(image)
    parts, answer = worker(inputs["jsonl"], "--retry-errors")
    assert answer(0, 1)["errors"] == [1, 0]
    second = results(parts)
    assert "4.png" in first[4]["error"] and second[4]["response"]
    assert all(
        before == after
        for n, (before, after) in enumerate(zip(first, second, strict=True))
        if n != 4
    )


def test_failures_are_returned_and_leave_no_part(worker, inputs, monkeypatch):
    parts, answer = worker(inputs["jsonl"])
    lines = inputs["jsonl"].read_text().splitlines()
    inputs["jsonl"].write_text("\n".join(lines[:3]))
    assert "has changed since the run began" in answer(2)["failure"][0]
    parts.stats_path(0).mkdir()
    assert "cannot write" in answer(0)["failure"][0] and parts.stats(0) is None

    def unusable(args):
        raise UserError("no model here")

    monkeypatch.setattr(common, "load_model", unusable)
    assert Worker(batch.parse(["--model=a", "--input=b", "--output=c"]), None, parts)._error


def test_an_output_of_other_rows_or_settings_is_refused(worker, inputs, tmp_path):
    worker(inputs["jsonl"])
    for options, words in [
        (["--seed=4"], "was started with seed 3, now 4"),
        (["--rows-per-shard=4"], "was started with rows_per_shard 3, now 4"),
    ]:
        with pytest.raises(UserError, match=words):
            worker(inputs["jsonl"], *options)
    with pytest.raises(UserError, match="was started with output_format jsonl, now parquet"):
        worker(inputs["parquet"])
    inputs["jsonl"].write_text('{"prompt": "another"}\n')
    with pytest.raises(UserError, match="they have changed since"):
        worker(inputs["jsonl"])
    (tmp_path / "out" / "settings.json").unlink()
    with pytest.raises(UserError, match="was not written by this command"):
        worker(inputs["jsonl"])
