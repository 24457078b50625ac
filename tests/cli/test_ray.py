"""--ray of serve and batch, on a cluster of two nodes of which one is killed."""

import json
import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import numpy as np
import openai
import pytest
from helpers import ray_nodes, tiny
from helpers.serving import noise, user_message
from PIL import Image
from ray import serve

from minigpt4_jax.cli import batch

COUNT, PER_SHARD = 36, 3
OPTIONS = ["--dtype=float32", "--temperature=2", "--seed=7", "--max_new_tokens=60",
           "--min_new_tokens=60", "--batch_size=2"]  # fmt: skip


@pytest.fixture(scope="module")
def cluster():
    with ray_nodes.head() as nodes:
        yield nodes


@pytest.fixture
def second(cluster):
    """A second node, which the test removes."""
    return cluster.add_node(**ray_nodes.NODE)


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


# --- serve --------------------------------------------------------------------------------------------


@pytest.fixture
def server(cluster, second, home, tmp_path):
    """The command with two replicas, one on each node: (process, its address)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # The nodes of a test share an address: without the proxy of the node that is killed.
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    (tmp_path / "keys").write_text("secret\n")
    command = [
        sys.executable, "-m", "minigpt4_jax.serve", f"--model={home / 'model'}", "--dtype=float32",
        f"--ray={cluster.address}", "--ray-models=2", f"--port={port}", f"--api-key-file={tmp_path / 'keys'}",
        "--max-batch=2", "--max-context=256", "--max-answer=100", "--prefill-tokens=64", "--temperature=0",
        "--no-warm-up", "--shutdown-timeout=60",
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            address = None
            for line in process.stderr:
                if match := re.search(r"listening on (http://\S+)", line):
                    address = match[1]
                if "ready in" in line:
                    break
            assert address, f"ended with {process.wait()}"
            yield process, address
        finally:
            process.kill()
            serve.shutdown()


def ask(client, messages, **options):
    return client.chat.completions.create(model="model", messages=messages, **options)


def test_a_served_conversation_stays_on_its_replica_and_survives_a_killed_node(
    cluster, second, server
):
    process, address = server
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0)
    assert httpx.get(f"{address}/v1/models").status_code == 401
    assert httpx.get(f"{address}/ready").status_code == 200

    def metrics():
        return httpx.get(f"{address}/metrics", headers={"authorization": "Bearer secret"}).text

    def values(name):
        """Replica -> the value of a metric."""
        return dict(
            re.findall(rf'^minigpt4_{name}{{replica="(\w+)"}} (\S+)', metrics(), re.MULTILINE)
        )

    first_answers = {}
    # until both replicas have answered
    while "0.0" in values("generated_tokens_total").values():
        question = user_message(f"story {len(first_answers)} of many words", noise(1))
        answer = ask(client, [question], max_tokens=8).choices[0].message.content
        first_answers[len(first_answers)] = [question, {"role": "assistant", "content": answer}]
        assert len(first_answers) < 40
    for dialogue in first_answers.values():
        again = ask(client, [*dialogue, user_message("and then")], max_tokens=4)
        assert again.usage.prompt_tokens_details.cached_tokens > 0
    with pytest.raises(openai.BadRequestError, match="temperature"):
        ask(client, [user_message("a")], temperature=-1)

    def generated():
        return sum(map(float, values("generated_tokens_total").values()))

    before = generated()
    stream = ask(
        client, [user_message("b")], stream=True, max_tokens=100, extra_body={"min_tokens": 100}
    )
    next(stream)
    stream.close()
    while any(value != "0.0" for value in values("running_requests").values()):
        time.sleep(0.01)
    assert generated() < before + 100  # a client that leaves is noticed by the replica

    cluster.remove_node(second, allow_graceful=False)
    for question, answer in first_answers.values():
        response = ask(client, [question], max_tokens=8)
        assert response.choices[0].message.content == answer["content"]

    stream = ask(client, [user_message("last")], max_tokens=80, stream=True,
                 stream_options={"include_usage": True}, extra_body={"min_tokens": 80})  # fmt: skip
    next(stream)
    process.send_signal(signal.SIGTERM)
    *_, last = stream
    assert last.usage.completion_tokens == 80
    assert process.wait(timeout=60) == 0


# --- batch --------------------------------------------------------------------------------------------


def test_rows_survive_a_killed_node_and_a_killed_driver(cluster, second, home, tmp_path, capsys):
    out = tmp_path / "out"
    ray_options = [f"--ray={cluster.address}", f"--rows-per-shard={PER_SHARD}"]
    command = [sys.executable, "-m", "minigpt4_jax.batch", *arguments(home, out, *ray_options)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: ray_nodes.is_busy(second, "Worker)).submit"), process)
        cluster.remove_node(second, allow_graceful=False)
        known = len(list(out.glob("*.stats.json")))
        wait_until(lambda: len(list(out.glob("*.stats.json"))) >= known + 2, process)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    complete = {path: path.stat().st_mtime_ns for path in out.glob("*.stats.json")}
    assert 2 <= len(complete) < COUNT // PER_SHARD
    (out / ".0123abcd.part-00000.jsonl").touch()  # as a killed worker leaves it
    assert batch.main(arguments(home, out, *ray_options)) == 1  # the row without its image
    assert f"{COUNT - PER_SHARD * len(complete)} rows, 1 of them" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == written for path, written in complete.items())

    whole = tmp_path / "whole.jsonl"
    batch.main(arguments(home, whole))
    names = {path.name for path in out.iterdir() if not path.name.startswith("part-")}
    assert names == {"settings.json", "plan.json"}
    parts = sorted(out.glob("part-*.jsonl"))
    assert len(parts) == COUNT // PER_SHARD
    assert b"".join(path.read_bytes() for path in parts) == whole.read_bytes()
