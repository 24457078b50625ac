"""Runs and models in a bucket, gs://, by the real libraries against a server on this machine."""

import asyncio
import dataclasses
import json
import os
import socket
import time
import types
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny
from helpers.multihost_harness import run_jobs

from convert.build import build
from convert.build_plan import BuildRequest
from minigpt4_jax import errors
from minigpt4_jax.checkpoint import model_directory
from minigpt4_jax.data.config import DataConfig
from minigpt4_jax.training import checkpoints
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.config_values import to_dict
from minigpt4_jax.training.trainer import train

os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # asks of Google, not of the server here
pytest.importorskip("gcsfs")
server = pytest.importorskip("gcp_storage_emulator.server")


class Bucket:
    """gs://bucket, kept in a folder and served while `start`ed."""

    def __init__(self, folder: Path):
        self._folder, self._server = folder, None
        with socket.socket() as s:
            s.bind(("localhost", 0))
            self.port = s.getsockname()[1]

    def start(self) -> None:
        self._server = server.create_server(
            "localhost", self.port, data_dir=str(self._folder), default_bucket="bucket"
        )
        self._server.start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
        self._server = None


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    made = Bucket(tmp_path_factory.mktemp("bucket"))
    at = f"http://localhost:{made.port}"
    variables = {
        "STORAGE_EMULATOR_HOST": at, "TENSORSTORE_GCS_HTTP_URL": at, "NO_GCE_CHECK": "true",
        "GCE_METADATA_ROOT": "localhost:1", "GOOGLE_CLOUD_PROJECT": "test",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        made.start()
        yield made
        made.stop()


@pytest.fixture(scope="module")
def home(tmp_path_factory, bucket):
    folder = tmp_path_factory.mktemp("home")
    # without a Q-Former, which is frozen here: programs compile in less time
    tiny.write_model(folder / "model", qformer=False)
    tiny.write_model("gs://bucket/models/tiny", qformer=False)
    tiny.write_data(folder / "data", rows=8)
    return folder


def config(home: Path, model: str) -> TrainConfig:
    rows = (str(home / "data" / "rows.jsonl"),)
    data = DataConfig(path=rows, val_path=rows, prompts=("<Img><ImageHere></Img> ?",))
    return TrainConfig(
        model=model, data=data, steps=6, batch_size=2, init_lr=0.01, warmup_steps=1,
        dtype="float32", save_every=2, log_every=1, eval_every=3, sample_every=0,
    )  # fmt: skip


class Crash(Exception):
    pass


def at_step(step: int, act):
    def look(record):
        if record["step"] == step and "loss" in record:
            act()

    return look


def crash():
    raise Crash


def records(text: str) -> list[dict]:
    found = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in r.items() if k != "examples_per_second"} for r in found]


def trained(model) -> dict[str, bytes]:
    tensors = model_directory.Tensors(model)
    return {n: tensors[n].tobytes() for n in tensors if n.startswith("projection")}


def put(path: str):
    from etils import epath

    return epath.Path(path)


@pytest.fixture
def soon(monkeypatch):
    """gcsfs tries as often as ever, but waits a twentieth of the half minute in between."""
    sleeping = types.SimpleNamespace(sleep=lambda seconds: asyncio.sleep(seconds / 20))
    monkeypatch.setattr("gcsfs.retry.asyncio", sleeping)


@pytest.fixture(scope="module")
def on_disk(home, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    result = train(config(home, str(home / "model")), workdir)
    return trained(result.model), records((workdir / "metrics.jsonl").read_text())


@pytest.mark.slow
def test_a_run_in_a_bucket_is_the_run_on_disk(home, bucket, soon, on_disk, tmp_path, monkeypatch):
    """Also when it dies and its last checkpoint is damaged meanwhile; nothing of it is left here."""
    monkeypatch.chdir(tmp_path)
    c, run = config(home, "gs://bucket/models/tiny"), put("gs://bucket/runs/a")
    with pytest.raises(Crash):
        train(c, str(run), on_metrics=at_step(5, crash))
    last = max((run / "checkpoints").iterdir(), key=lambda p: p.name)
    assert last.name == "00000004"
    some = sorted((last / "state" / "d").iterdir())
    some[0].write_bytes(b"?")
    seen = []
    result = train(c, str(run), on_metrics=lambda r: seen.append(r["step"]))
    assert seen[0] == 3
    assert str(result.model) == "gs://bucket/runs/a/model"
    assert trained(result.model) == on_disk[0]
    assert records((run / "metrics.jsonl").read_text()) == on_disk[1]
    names = {p.name for p in run.iterdir()}
    assert names >= {
        "config.json",
        "checkpoints",
        "loss.png",
        "metrics.jsonl",
        "model",
        "tensorboard",
    }
    assert any(p.name == "damaged-00000004" for p in (run / "checkpoints").iterdir())
    assert not list(tmp_path.iterdir())
    assert train(c, str(run)).steps == 6  # done already
    document = model_directory.read_model_json(result.model)
    assert document["base"] == "../../../models/tiny"


@pytest.mark.slow
def test_two_processes_in_a_bucket(home, bucket, on_disk, tmp_path):
    """Begun by one, continued by two until they are stopped, and ended by one."""
    c, run = config(home, "gs://bucket/models/tiny"), put("gs://bucket/runs/two")
    c = dataclasses.replace(c, eval_every=0, save_every=1)  # one program less, and told at once
    life = {"name": "two", "workdir": str(run), "values": to_dict(c)}
    with pytest.raises(Crash):
        train(c, str(run), on_metrics=at_step(2, crash))
    run_jobs(tmp_path, 2, 1, {"runs": [life | {"stop": [1, 4]}]})
    said = (tmp_path / "0-of-2.log").read_text()
    assert said.count("start the same command again to continue") == 1
    assert "continuing at step " in said and "fsdp:2" in said
    done, seen = max(int(p.name) for p in (run / "checkpoints").iterdir()), []
    result = train(c, str(run), on_metrics=lambda r: seen.append(r["step"]))
    assert seen == [6] and done == 5
    for name, content in on_disk[0].items():
        array = np.frombuffer(trained(result.model)[name], np.float32)
        np.testing.assert_allclose(array, np.frombuffer(content, np.float32), 1e-5, 1e-5)
    found = records((run / "metrics.jsonl").read_text())
    for a, b in zip(found, (r for r in on_disk[1] if "loss" in r), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_a_bucket_that_is_gone_ends_the_run_and_it_goes_on_later(
    home, bucket, soon, on_disk, monkeypatch
):
    c, run = config(home, str(home / "model")), "gs://bucket/runs/b"

    def stop():  # once step 2 is written: what is being written is tried for a quarter of an hour
        until = time.monotonic() + 60
        while not put(f"{run}/checkpoints/00000002/commit_success.txt").exists():
            assert time.monotonic() < until
            time.sleep(0.05)
        bucket.stop()

    with pytest.raises(errors.UserError) as e:
        train(c, run, on_metrics=at_step(3, stop))
    assert "cannot write gs://bucket/runs/b: " in str(e.value) and "\n" not in str(e.value)
    assert "the last good checkpoint, of step 2, is kept in gs://bucket/runs/b/checkpoints" in str(
        e.value
    )
    with pytest.raises(errors.UserError, match="gs://bucket/runs/b: "):
        train(c, run)
    with pytest.raises(
        errors.UserError, match=r"cannot read gs://bucket/models/tiny/model\.json: "
    ):
        model_directory.read_config("gs://bucket/models/tiny")
    with monkeypatch.context() as patch:  # where that can be read, and the folder not be listed
        patch.setattr(model_directory, "read_model_json", lambda folder: {})
        with pytest.raises(errors.UserError, match="cannot read gs://bucket/models/tiny: "):
            model_directory.Tensors("gs://bucket/models/tiny")
    with pytest.raises(errors.UserError, match="cannot read gs://bucket/models/new: "):
        build(BuildRequest("minigpt-v2", llm=home, out="gs://bucket/models/new"))
    bucket.start()
    seen = []
    result = train(c, run, on_metrics=lambda r: seen.append(r["step"]))
    assert seen[0] == 3 and trained(result.model) == on_disk[0]


@pytest.mark.slow
def test_a_bucket_that_is_gone_while_a_checkpoint_is_written(home, bucket, monkeypatch):
    """Where TensorStore alone cannot reach it, once Orbax has begun. It tries 32 times, in 15 minutes, and
    Orbax has no option for that."""
    from orbax.checkpoint._src.serialization import tensorstore_utils

    for table in ("_BASE_TS_CONTEXT", "_DEFAULT_OCDBT_TS_CONTEXT"):
        once = {"max_retries": 1}
        monkeypatch.setitem(getattr(tensorstore_utils, table), "gcs_request_retries", once)
    made = checkpoints.Checkpoints(put("gs://bucket/runs/c/checkpoints"), 2)
    made.save(1, {"a": np.ones(3)}, (), {})
    made.wait()
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", "http://localhost:1")
    begun = time.monotonic()
    made.save(2, {"a": np.ones(3)}, (), {})
    with pytest.raises(errors.UserError) as e:
        made.wait()
    assert time.monotonic() - begun < 30
    made.close()
    assert "cannot write checkpoints in gs://bucket/runs/c/checkpoints: " in str(e.value)
    assert "the last good checkpoint is step 1. Check that the directory can be reached" in str(
        e.value
    )


def test_a_model_in_a_bucket_is_read_by_ranges(home, bucket):
    here, there = (
        model_directory.Tensors(home / "model"),
        model_directory.Tensors("gs://bucket/models/tiny"),
    )
    assert set(here) == set(there)
    for name in here:
        assert here.shape(name) == there.shape(name) and here.dtype(name) == there.dtype(name)
        np.testing.assert_array_equal(here[name], there[name])
    index = (slice(3, 9), slice(4, 7))
    for name in ("llm.embed", "llm.blocks.1.attn.q.weight"):
        np.testing.assert_array_equal(here.part(name, index), there.part(name, index))


def test_converted_to_a_bucket_and_from_it(bucket, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from helpers.released_files import make_files

    from convert.cli import main

    files, out = make_files(tmp_path), "gs://bucket/models/built"
    main(files.arguments("minigpt-v2"))
    main(files.arguments("minigpt-v2", out=out))
    here, there = model_directory.Tensors(tmp_path / "model_c"), model_directory.Tensors(out)
    assert dict(here).keys() == dict(there).keys()
    assert all(here[name].tobytes() == there[name].tobytes() for name in here)
    capsys.readouterr()
    main(["inspect", str(tmp_path / "model_c")])
    expected = capsys.readouterr().out.replace(str(tmp_path / "model_c"), out)
    main(["inspect", out])
    assert capsys.readouterr().out == expected and f"{out}: minigpt-v2" in expected
    for model, folder in ((tmp_path / "model_c", "a"), (out, "b")):
        (tmp_path / folder).mkdir()
        main(["export", f"--model={model}", f"--out={tmp_path / folder / 'c.pth'}"])
    assert (tmp_path / "a" / "c.pth").read_bytes() == (tmp_path / "b" / "c.pth").read_bytes()
    for arguments, message in (
        (files.arguments("minigpt-v2", out=out), "built exists and is not empty"),
        (
            files.arguments("minigpt-v2", out="gs://nowhere/model"),
            "cannot write gs://nowhere/model",
        ),
        (["export", f"--model={out}", "--out=gs://bucket/c.pth"], "only local paths work"),
    ):
        with pytest.raises(errors.UserError, match=message):
            main(arguments)
    assert not (tmp_path / "gs:").exists()


def test_what_a_bucket_cannot_be(home, bucket):
    c = config(home, str(home / "model"))
    with pytest.raises(errors.UserError, match="cannot write gs://nowhere/run: "):
        train(c, "gs://nowhere/run")
    with pytest.raises(errors.UserError, match="is not a model directory"):
        model_directory.read_config("gs://bucket/models/none")
    with pytest.raises(errors.UserError, match="exists and is not empty"):
        tiny.write_model("gs://bucket/models/tiny", qformer=False)
    with pytest.raises(errors.UserError, match=r"only local paths and gs://bucket/\.\.\. work"):
        train(c, "s3://bucket/run")
