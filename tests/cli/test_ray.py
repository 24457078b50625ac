"""--ray of batch, on a cluster of two nodes of which one is killed."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ray_nodes, tiny
from PIL import Image

from minigpt4_jax.cli import batch

COUNT, PER_SHARD = 36, 3
OPTIONS = ["--dtype=float32", "--temperature=2", "--seed=7", "--max_new_tokens=60",
           "--min_new_tokens=60", "--batch_size=2"]  # fmt: skip


@pytest.fixture(scope="module")
def cluster():
    with ray_nodes.two_nodes() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, and rows.jsonl with images and questions; one image is missing."""
    folder = tmp_path_factory.mktemp("ray")
    tiny.write_random_model(folder / "model")
    rng = np.random.default_rng(0)
    for n in range(4):
        pixels = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
    rows = [{"id": n, "image": f"{n % 4}.png", "prompt": f"what is {n}"} for n in range(COUNT)]
    rows[20]["image"] = "missing.png"
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments(home, out, *more):
    files = [f"--model={home / 'model'}", f"--input={home / 'rows.jsonl'}", f"--output={out}"]
    return [*files, *OPTIONS, *more]


def wait_until(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.02)


def test_rows_survive_a_killed_node_and_a_killed_driver(
    cluster, home, tmp_path, monkeypatch, capsys
):
    nodes, second = cluster
    out = tmp_path / "out"
    ray_options = [f"--ray={nodes.address}", f"--rows-per-shard={PER_SHARD}"]
    command = [sys.executable, "-m", "minigpt4_jax.batch", *arguments(home, out, *ray_options)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: ray_nodes.is_busy(second, "Worker)).submit"), process)
        nodes.remove_node(second, allow_graceful=False)
        known = len(list(out.glob("*.stats.json")))
        wait_until(lambda: len(list(out.glob("*.stats.json"))) >= known + 2, process)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    complete = {path: path.stat().st_mtime_ns for path in out.glob("*.stats.json")}
    assert 2 <= len(complete) < COUNT // PER_SHARD
    assert batch.main(arguments(home, out, *ray_options)) == 1  # the row without its image
    assert f"{COUNT - PER_SHARD * len(complete)} rows, 1 of them" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == written for path, written in complete.items())

    whole = tmp_path / "whole.jsonl"
    batch.main(arguments(home, whole))
    parts = sorted(out.glob("part-*.jsonl"))
    assert len(parts) == COUNT // PER_SHARD
    assert b"".join(path.read_bytes() for path in parts) == whole.read_bytes()
