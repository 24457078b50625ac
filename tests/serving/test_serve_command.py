"""The command: start-up, SIGTERM in the middle of an answer, wrong options."""

import os
import re
import signal
import socket
import subprocess
import sys

import openai
import pytest
from helpers import tiny
from helpers.serving import make_service, running_server, user_message

import minigpt4_jax
from minigpt4_jax.cli import serve
from minigpt4_jax.errors import UserError
from minigpt4_jax.serving import connections
from minigpt4_jax.serving.app import create_app
from minigpt4_jax.serving.errors import RequestError
from minigpt4_jax.serving.server import make_server, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_random_model(tmp_path_factory.mktemp("command") / "tiny-model")


def _read_until(process, pattern):
    """The first match in the lines that a process writes to stderr."""
    for line in process.stderr:
        if match := re.search(pattern, line):
            return match
    raise AssertionError(f"the server ended with {process.wait()} before {pattern!r}")


def test_a_server_from_start_to_sigterm(folder, tmp_path):
    (tmp_path / "keys").write_text("from-file\n")
    command = [
        sys.executable, "-m", "minigpt4_jax.serve", f"--model={folder}", "--dtype=float32", "--port=0",
        "--max-batch=1", "--max-context=128", "--max-answer=100", "--prefill-tokens=64",
        f"--api-key-file={tmp_path / 'keys'}", "--temperature=0", "--shutdown-timeout=60",
    ]  # fmt: skip
    environment = os.environ | {"MINIGPT4_JAX_API_KEY": "from-environment"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            (port,) = _read_until(process, r"listening on http://127.0.0.1:(\d+)").groups()
            ready = _read_until(process, r"ready: (\d+) sets of programs in ([\d.]+) s")
            assert int(ready[1]) >= 4
            url = f"http://127.0.0.1:{port}"
            for key in ("from-file", "from-environment"):
                client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
                assert [m.id for m in client.models.list()] == ["tiny-model"]
            assert client._client.get(f"{url}/ready").status_code == 200
            stream = client.chat.completions.create(
                model="tiny-model", messages=[user_message("a story")], max_tokens=80, stream=True,
                stream_options={"include_usage": True}, extra_body={"min_tokens": 80},
            )  # fmt: skip
            next(stream)
            process.send_signal(signal.SIGTERM)
            *_, last = stream
            assert last.usage.completion_tokens == 80
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--port=99999"], "expected 0 to 65535"),
        (["--max-batch=0"], "expected more than 0"),
        (["--top_p=3"], "top_p 3"),
        (["--api-key-file=/nowhere"], "cannot be read"),
        (["--api-key-file=/dev/null"], "has no key"),
        (["--num_beams=3"], "unrecognized"),
        (["--ray-gpus=1"], "--ray-gpus is of --ray"),
        (["--ray=local", "--ray-models=0"], "expected N or MIN:MAX"),
        (["--ray=local", "--ui"], "--ui is of a server without --ray"),
    ],
)
def test_wrong_options_are_told_before_loading(options, words):
    with pytest.raises(UserError, match=words):
        serve.main(["--model=/nowhere/at/all", *options])


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match=r"pip install 'minigpt4_jax\[serve\]'"):
        serve.main(["--model=/nowhere/at/all"])


def test_a_port_in_use(folder):
    service = make_service(minigpt4_jax.load(folder))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        server = make_server(create_app(service), service, "127.0.0.1", port, compiled=False)
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port}"):
            run(server)


def test_headers_have_limits_of_time_and_size(folder, monkeypatch):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.3)
    with running_server(make_service(minigpt4_jax.load(folder))) as server:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        for begins_with_request in (False, True):
            with socket.create_connection(address, timeout=3) as client:
                if begins_with_request:
                    client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                    assert client.recv(1000).startswith(b"HTTP/1.1 200")
                client.sendall(b"GET / HTTP/1.1\r\nX: ")
                assert client.recv(1000) == b""  # the server has closed the connection
        with socket.create_connection(address, timeout=3) as client:
            client.sendall(b"GET / HTTP/1.1\r\nX: " + bytes(100_000))
            assert client.recv(1000).startswith(b"HTTP/1.1 400")


def test_a_program_that_cannot_be_compiled_ends_the_server(folder, monkeypatch):
    model = minigpt4_jax.load(folder)

    def failing(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "encode_pixels", failing)
    service = make_service(model)
    server = make_server(create_app(service), service, "127.0.0.1", 0)
    with pytest.raises(RequestError, match="out of memory"):
        run(server)


def test_the_limits_follow_the_memory(folder, monkeypatch):
    from minigpt4_jax.serving import config

    model = minigpt4_jax.load(folder)
    options = {"max_batch": 4, "max_queue": 9, "context": 100, "max_tokens": 5000}
    plenty = config.scheduler_config(model, **options)
    assert (plenty.context, plenty.max_new_tokens, plenty.cache_tokens) == (100, 100, 4 * 128)
    assert config.free_memory() > 1e6
    monkeypatch.setattr(config, "free_memory", lambda: 1e5)
    per_token = 2 * 2 * 1 * 12 * 4  # keys and values, layers, heads, head dim, bytes
    assert config.cache_bytes_per_token(model) == per_token
    little = config.scheduler_config(model, prefill_tokens=64, **options)
    assert little.cache_tokens == int(0.45 * 1e5 / per_token)
    assert little.context == 100 < little.cache_tokens
    with pytest.raises(UserError, match="a cache of 99 tokens is too small; expected at least 128"):
        config.scheduler_config(model, cache_tokens=99, **options)
