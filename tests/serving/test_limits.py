"""What a server refuses: limits, hostile images and addresses, malformed requests by the thousand."""

import asyncio
import base64
import contextlib
import copy
import dataclasses
import http.server
import io
import json
import random
import threading
import time
import zlib

import pytest
from helpers import tiny
from helpers.asgi import request
from helpers.serving import NAME, data_url, make_service, noise, user_message
from PIL import Image

import minigpt4_jax
from minigpt4_jax.serving import gate, image_urls
from minigpt4_jax.serving.app import create_app
from minigpt4_jax.serving.errors import RequestError
from minigpt4_jax.serving.limits import Limits

CHAT = "/v1/chat/completions"
LIMITS = Limits(
    body_bytes=200_000,
    image_bytes=50_000,
    pixels=10_000,
    images=3,
    body_seconds=0.5,
    open_bytes=400_000,
    open_requests=40,
)


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    folder = tiny.write_random_model(tmp_path_factory.mktemp("limits") / "model", llm_layers=1)
    service = make_service(minigpt4_jax.load(folder, dtype="float32"), limits=LIMITS)
    service.scheduler.start()
    yield service
    service.scheduler.stop(5)


@pytest.fixture(scope="module")
def app(service):
    return create_app(service)


def chat(*messages, **options):
    return {"model": NAME, "messages": list(messages), "max_tokens": 2, "temperature": 0} | options


def ask(app, *args, **options):
    return asyncio.run(request(app, *args, **options))


def with_url(url):
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what"}]
    return chat({"role": "user", "content": parts})


def png_header(width, height):
    """A PNG that claims a size and has hardly any data."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def encoded(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (with_url("http://127.0.0.1/x.png"), 400, "not downloaded by this server"),
        (with_url("file:///etc/passwd"), 400, "no image as a data URL"),
        (with_url("data:image/png,abc"), 400, "no image as a data URL"),
        (with_url("data:image/png;base64,ab!c"), 400, "not base64"),
        (with_url(encoded(b"no image")), 400, "cannot be read"),
        (with_url(encoded(png_header(1, 1)[:40])), 400, "image"),
        (with_url(encoded(png_header(4_000, 4_000))), 400, "at most 10000 are read"),
        (with_url(encoded(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")), 400, "cannot be read"),
        (with_url(encoded(bytes(60_000))), 413, "at most 50000"),
        (chat(user_message("x", *[noise(i) for i in range(4)])), 400, "at most 3"),
        (chat(user_message("<ImageHere> <ImageHere>", noise(1))), 400, "ImageHere"),
        (chat({"role": "assistant", "content": "x"}), 400, "expected 'user'"),
        (chat({"role": "tool", "content": "x"}), 400, "role"),
        (chat(user_message("x"), user_message("y")), 400, "expected 'assistant'"),
        (chat(user_message("x"), {"role": "assistant", "content": "y"}), 400, "no question"),
        (chat(user_message(" ")), 400, "has no text"),
        (chat(user_message("x", noise(1)) | {"role": "system"}), 400, "only the messages of the user"),
        (chat(user_message("x"), stop=[f"s{n}" for n in range(30)]), 400, "expected at most 32"),
        (chat(user_message("x" * 30_000)), 400, "context of 256"),
        (chat(user_message("x"), boxes=True), 400, "there is none"),
        (chat(user_message("x"), stream_options={"include_usage": True}), 400, "needs stream"),
        (chat(user_message("x"), num_beams=3, stream=True), 400, "beam search"),
        (chat(user_message("x"), num_beams=99), 400, "num_beams"),
        (chat(user_message("x"), seed="1"), 400, "seed"),
        (chat(user_message("x \ud83d")), 400, "surrogate"),
        ({"messages": [1] * 20_000}, 400, "more than 10000 values"),
        ({f"a{n}": 1 for n in range(12_000)}, 400, "more than 10000 values"),
        (b"[" * 100_000, 400, ""),
        (b"x" * 300_000, 413, "more than 200000 bytes"),
    ],
)  # fmt: skip
def test_hostile_requests_get_a_clear_error(app, body, status, words):
    reply = ask(app, CHAT, body)
    assert reply.status == status, reply
    assert words in reply.error["message"]
    assert reply.error["type"] and set(reply.error) == {"message", "type", "param", "code"}


def test_bodies_that_are_slow_and_requests_that_are_many(app, service):
    async def main():
        slow = await request(app, CHAT, chat(user_message("x")), delay=1.0)
        # more than may be open at once, all on their way
        flood = [request(app, CHAT, chat(user_message("x")), delay=0.2) for _ in range(60)]
        return slow, await asyncio.gather(*flood)

    slow, flood = asyncio.run(main())
    assert slow.status == 408
    statuses = [reply.status for reply in flood]
    assert set(statuses) == {200, 429} and statuses.count(429) >= 20
    refused = next(reply for reply in flood if reply.status == 429)
    assert int(refused.headers["retry-after"]) >= 1 and refused.error["type"] == "rate_limit_error"
    assert ask(app, CHAT, chat(user_message("x"))).status == 200


def test_the_bodies_of_all_open_requests_have_a_limit(app):
    async def main():
        body = b'{"x": "' + b"x" * 150_000 + b'"}'
        return await asyncio.gather(*(request(app, CHAT, body, delay=0.1) for _ in range(6)))

    statuses = sorted(reply.status for reply in asyncio.run(main()))
    assert statuses == [400] * statuses.count(400) + [429] * statuses.count(429)
    assert 2 <= statuses.count(400) <= 5
    assert ask(app, CHAT, chat(user_message("x" * 150_000))).status == 400  # there is room again


def test_a_client_that_never_reads_ends(service, monkeypatch):
    monkeypatch.setattr(gate, "READING_SECONDS", 0.0)
    app = create_app(service)
    app.user_middleware[0].kwargs["limits"] = dataclasses.replace(LIMITS, seconds=0.5)
    begun = asyncio.Event()

    async def receive():
        if begun.is_set():
            await asyncio.Future()
        begun.set()
        return {"type": "http.request", "body": json.dumps(body).encode()}

    async def send(message):
        if message["type"] == "http.response.body":
            await asyncio.Future()  # the buffers are full

    body = chat(user_message("x"), stream=True)
    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "path": CHAT, "query_string": b"",
        "root_path": "", "scheme": "http", "client": ("test", 1), "server": ("test", 80),
        "headers": [(b"content-type", b"application/json")],
    }  # fmt: skip
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 20))


def test_names_of_a_server_for_this_machine(service):
    """A web page whose name leads here (DNS rebinding) is refused."""
    app = create_app(service, hosts=["proxy.example.org"])
    for host, status in [
        ("localhost:8000", 200), ("127.0.0.1:8000", 200), ("[::1]:8000", 200), ("192.168.1.5", 200),
        ("Proxy.Example.org", 200), ("evil.example.org:8000", 403), ("localhost.evil.org", 403), ("", 403),
    ]:  # fmt: skip
        reply = ask(app, "/v1/models", method="GET", headers={"host": host})
        assert reply.status == status, host
    assert reply.error["code"] == "unknown_host" and "--allowed-host" in reply.error["message"]


def test_keys_are_needed_everywhere_but_for_probes(service):
    app = create_app(service, keys=["one", "two"], unguarded=["/page"])
    paths = ["/v1/models", "/metrics", "/openapi.json", "/nothing", "/page/x", "/health"]
    statuses = [ask(app, path, method="GET").status for path in paths]
    assert statuses == [401, 401, 401, 401, 404, 200]
    for key, status in [("two", 200), ("Two", 401), ("", 401), ("\xe9", 401)]:
        headers = {"authorization": f"Bearer {key}"}
        assert ask(app, "/v1/models", method="GET", headers=headers).status == status


def test_prompts_are_logged_only_when_asked_for(service, caplog):
    for log_prompts in (False, True):
        caplog.clear()
        with caplog.at_level("INFO", "minigpt4_jax"):
            app = create_app(service, log_prompts=log_prompts)
            assert ask(app, CHAT, chat(user_message("confidential"))).status == 200
        assert ("confidential" in caplog.text) == log_prompts
        assert CHAT in caplog.text


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("2606:4700::1111", True), ("127.0.0.1", False), ("10.1.2.3", False),
        ("169.254.169.254", False), ("0.0.0.0", False), ("224.0.0.1", False), ("100.64.0.1", False),
        ("::1", False), ("fe80::1%eth0", False), ("fd00::1", False), ("::ffff:127.0.0.1", False),
        ("64:ff9b::7f00:1", False), ("2002:7f00:1::", False), ("2001:0:7f00:1::", False),
        ("fec0::1", False), ("::127.0.0.1", False), ("64:ff9b:1::1", False),
    ],
)  # fmt: skip
def test_public_addresses(address, public):
    assert image_urls.is_public(address) == public


class _Site(http.server.BaseHTTPRequestHandler):
    """/image, /large, /missing, /slow, and redirects: /to?TARGET."""

    def do_GET(self):
        path, _, target = self.path.partition("?")
        if path == "/slow":  # a byte now and then, so that no single read takes long
            with contextlib.suppress(OSError):
                for byte in b"HTTP/1.0 200 OK\r\nX: " + bytes(100):
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.1)
            return
        status = {"/to": 302, "/missing": 404}.get(path, 200)
        self.send_response(status)
        if status == 302:
            self.send_header("Location", target)
        self.end_headers()
        if status == 200:
            file = io.BytesIO()
            noise(1).save(file, "PNG")
            self.wfile.write(file.getvalue() if path == "/image" else bytes(100_000))

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_addresses_of_this_machine_are_never_asked(service, site, monkeypatch):
    app = create_app(service, allow_image_urls=True)
    for url in (
        f"{site}/image",
        "ftp://example.org/x.png",
        "https://",
        "http://[::1]/",
        "http://a b/",
    ):
        reply = ask(app, CHAT, with_url(url))
        assert reply.status == 400, reply
    # a host that is public when its name is resolved, and redirects to this machine
    checked = []

    def first_is_public(address):
        checked.append(address)
        return len(checked) == 1

    monkeypatch.setattr(image_urls, "is_public", first_is_public)
    reply = ask(app, CHAT, with_url(f"{site}/to?{site}/image"))
    assert reply.status == 400 and "not a public host" in reply.error["message"]
    assert len(checked) == 2


def test_images_of_public_addresses(service, site, monkeypatch):
    app = create_app(service, allow_image_urls=True)
    monkeypatch.setattr(image_urls, "is_public", lambda address: True)
    found = ask(app, CHAT, with_url(f"{site}/to?/image"))
    assert found.status == 200
    same = ask(app, CHAT, with_url(data_url(noise(1))))
    assert json.loads(found.body)["choices"] == json.loads(same.body)["choices"]
    for path, status, words in [
        ("/large", 413, "more than 50000 bytes"),
        ("/missing", 400, "status 404"),
        (f"/to?{site}/to?{site}/to?{site}/image", 200, ""),
        ("/to?/to", 400, "redirects"),
        ("/to?file:///etc/passwd", 400, "expected a data URL"),
    ]:
        reply = ask(app, CHAT, with_url(site + path))
        assert reply.status == status and words in reply.body.decode(), path


def test_a_download_has_a_time_limit(monkeypatch, site):
    monkeypatch.setattr(image_urls, "is_public", lambda address: True)
    begin = time.monotonic()
    with pytest.raises(RequestError, match="too long"):
        image_urls.download(f"{site}/slow", 50_000, 0.5)
    assert time.monotonic() - begin < 3


JUNK = [
    None, True, -1, 0, 1e308, 10**30, "", "x", "\x00", "é" * 50, [], {}, [[]], {"a": {}}, [None], ["x", 1],
    float("nan"), float("inf"), "data:image/png;base64,AAAA", {"type": "text"}, {"url": 5},
]  # fmt: skip


def _mutate(body, rng):
    """A JSON document with a value somewhere replaced by another, dropped, or under another name."""
    body = copy.deepcopy(body)
    place = body
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return body
        key = rng.choice(keys)
        if isinstance(place[key], (dict, list)) and place[key] and rng.random() < 0.7:
            place = place[key]
            continue
        action = rng.randrange(3)
        if action == 0:
            place[key] = rng.choice(JUNK)
        elif action == 1:
            del place[key]
        elif isinstance(place, dict):
            place[rng.choice(["x", "prompt", "n", "stream", "input", "top_k"])] = rng.choice(JUNK)
        else:
            place.append(rng.choice(JUNK))
        return body


def _malformed(rng):
    """(path, body, method, headers) of a request that is almost right."""
    bodies = {
        CHAT: chat(
            {"role": "system", "content": "s"}, user_message("what", noise(1)), n=1, top_p=0.9
        ),
        "/v1/completions": {"prompt": ["a", "b"], "max_tokens": 1, "stop": ["x"], "logprobs": 1},
        "/v1/embeddings": {"input": [data_url(noise(2))], "pooling": "mean"},
        "/v1/rank": {"question": "q", "candidates": ["a", "b"], "images": [data_url(noise(1))]},
    }
    path = rng.choice(list(bodies))
    body = bodies[path]
    for _ in range(rng.randint(1, 3)):
        body = _mutate(body, rng)
    data = json.dumps(body).encode()
    method, headers = "POST", {}
    match rng.randrange(8):
        case 0:
            data = data[: rng.randrange(len(data))]
        case 1:
            data = bytes(rng.randrange(256) for _ in range(rng.randrange(200)))
        case 2:
            at = rng.randrange(len(data))
            data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        case 3:
            method = rng.choice(["GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE"])
        case 4:
            headers = {
                "content-type": rng.choice(["text/plain", "", "multipart/form-data", "\xff"])
            }
        case 5:
            path += rng.choice(["/", "/x", "?a", "\x00", "/../models", "%2e"])
    return path, data, method, headers


def test_malformed_requests_never_break_the_server(app, service):
    rng = random.Random(0)

    async def main():
        statuses = []
        for _ in range(100):
            cases = [_malformed(rng) for _ in range(20)]
            replies = await asyncio.gather(
                *(request(app, p, d, method=m, headers=h) for p, d, m, h in cases)
            )
            for case, reply in zip(cases, replies, strict=True):
                assert reply.status < 500, (case, reply)
                statuses.append(reply.status)
        return statuses

    statuses = asyncio.run(main())
    assert len(statuses) == 2000
    # some changes leave a request valid
    assert sum(400 <= status < 500 for status in statuses) > 1500
    assert ask(app, CHAT, chat(user_message("still there?"))).status == 200
    assert service.scheduler.healthy
