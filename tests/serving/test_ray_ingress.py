"""The ingress of `serve --ray`, over replicas that fail: what clients see."""

import asyncio
import json

import httpx
import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from minigpt4_jax.serving.limits import Limits
from minigpt4_jax.serving.ray import ingress
from minigpt4_jax.serving.ray.conversations import conversation_key
from minigpt4_jax.serving.ray.ingress import Ingress

CHAT = "/v1/chat/completions"
QUESTION = {"messages": [{"role": "user", "content": "a"}]}


def start(kind: str = "application/json") -> dict:
    headers = [(b"content-type", kind.encode()), (b"x-request-id", b"of the replica")]
    return {"type": "http.response.start", "status": 200, "headers": headers}


def part(data: bytes, more: bool = False) -> dict:
    return {"type": "http.response.body", "body": data, "more_body": more}


class Replicas:
    """Ray's handle of replicas: each call does the next of some things, the last one for ever.

    A thing is a list of messages to send and exceptions to raise."""

    def __init__(self, *things):
        self.things, self.calls = list(things), []
        self.probes = {"accepting": [True], "metrics": []}

    def options(self, **options):
        self.calls.append(options)
        return self

    def remote(self, scope, body):
        self.scope, self.body = scope, body
        thing = self.things.pop(0) if len(self.things) > 1 else self.things[0]
        return self._messages(thing)

    async def _messages(self, thing):
        for one in thing:
            if isinstance(one, Exception):
                raise one
            await asyncio.sleep(0)
            yield one

    def broadcast(self, method):
        if not self.probes[method]:
            raise DeploymentUnavailableError("none")
        return Answers(self.probes[method])


class Answers(list):
    async def results_async(self, **_):
        return list(self)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(ingress, "PAUSE", 0)


def request(
    replicas, method="POST", path=CHAT, *, keys=(), limits=None, hosts=None, headers=None, **options
):
    app = Ingress(replicas, limits or Limits(), list(keys), hosts).__serve_build_asgi_app__()

    async def send():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, headers=headers, **options)

    return asyncio.run(send())


def test_requests_are_passed_on_with_their_conversation():
    replicas = Replicas([start(), part(b"{", True), part(b"}")])
    response = request(replicas, json=QUESTION, headers={"x-other": "1"})
    assert (response.status_code, response.content) == (200, b"{}")
    assert response.headers.get_list("x-request-id") != ["of the replica"]
    assert len(response.headers.get_list("x-request-id")) == 1
    assert json.loads(replicas.body) == QUESTION and replicas.scope["path"] == CHAT
    (options,) = replicas.calls
    assert options["session_id"] == conversation_key(replicas.body) != ""


def test_keys_and_limits_are_checked_before_a_replica_is_asked():
    replicas = Replicas([start(), part(b"")])
    assert request(replicas, json=QUESTION, keys=["a"]).status_code == 401
    assert request(replicas, json=QUESTION, limits=Limits(body_bytes=10)).status_code == 413
    assert request(replicas, "GET", "/metrics", keys=["a"]).status_code == 401
    assert request(replicas, json=QUESTION, hosts=[]).status_code == 403  # it is named "test"
    assert not replicas.calls
    headers = {"authorization": "Bearer b"}
    assert request(replicas, json=QUESTION, keys=["a", "b"], headers=headers).status_code == 200
    assert replicas.scope["state"] == {"key": 1}  # for the fair order


def test_a_request_goes_to_another_replica_if_its_own_is_lost():
    replicas = Replicas([RayActorError()], [start(), part(b"{}")])
    assert request(replicas, json=QUESTION).content == b"{}" and len(replicas.calls) == 2
    gone = Replicas([DeploymentUnavailableError("none")])
    response = request(gone, json=QUESTION)
    assert response.status_code == 503 and response.json()["error"]["code"] == "unavailable"
    assert response.headers["retry-after"] and len(gone.calls) == ingress.ATTEMPTS


def test_a_stream_that_is_lost_ends_with_an_error():
    replicas = Replicas([start("text/event-stream"), part(b"data: 1\n\n", True), RayActorError()])
    response = request(replicas, json=QUESTION | {"stream": True})
    *_, last = response.text.strip().split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_lost"
    assert len(replicas.calls) == 1  # what has been sent cannot be sent anew


def test_full_replicas_are_status_429():
    response = request(Replicas([BackPressureError(5, 5)]), json=QUESTION)
    assert response.status_code == 429 and response.headers["retry-after"]


def test_probes_and_metrics():
    replicas = Replicas([start(), part(b"")])
    assert request(replicas, "GET", "/health").status_code == 200
    assert request(replicas, "GET", "/ready").status_code == 200
    replicas.probes["accepting"] = [False, RayActorError()]
    assert request(replicas, "GET", "/ready").status_code == 503
    replicas.probes["accepting"] = []
    assert request(replicas, "GET", "/ready").status_code == 503
    text = b"# TYPE minigpt4_images_total counter\nminigpt4_images_total 3.0\n"
    replicas.probes["metrics"] = [("one", text), RayActorError(), ("two", text)]
    found = request(replicas, "GET", "/metrics").text
    assert 'minigpt4_images_total{replica="one"} 3.0' in found
    assert 'minigpt4_images_total{replica="two"} 3.0' in found
    assert found.count("# TYPE minigpt4_images_total counter") == 1


def test_draining_refuses_new_requests_and_waits_for_the_others():
    async def check():
        answer = asyncio.Event()

        class Slow(Replicas):
            async def _messages(self, thing):
                await answer.wait()
                for one in thing:
                    yield one

        made = Ingress(Slow([start(), part(b"{}")]), Limits(), [])
        transport = httpx.ASGITransport(made.__serve_build_asgi_app__())
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            running = asyncio.create_task(client.post(CHAT, json=QUESTION))
            await asyncio.sleep(0.05)
            assert await made.drain(0.01) == 1
            assert (await client.post(CHAT, json=QUESTION)).status_code == 503
            assert (await client.get("/ready")).status_code == 503
            answer.set()
            assert await made.drain(5) == 0
            assert (await running).content == b"{}"

    asyncio.run(check())


def test_turns_of_a_conversation_have_one_key():
    def key(*messages, **fields):
        return conversation_key(json.dumps({"messages": messages, **fields}).encode())

    system = {"role": "system", "content": "be brief"}
    first, other = {"role": "user", "content": "a"}, {"role": "user", "content": "b"}
    answer = {"role": "assistant", "content": "c"}
    assert key(first) == key(first, answer, other, temperature=1) != key(other)
    assert key(system, first) == key(system, first, answer, other) != key(first)
    assert key(first, prompt_cache_key="x") == key(other, prompt_cache_key="x") != key(first)
    assert conversation_key(b'{"images": ["data:"]}') == conversation_key(
        b'{"images": ["data:"], "n": 2}'
    )
    for body in (
        b"",
        b"{",
        b"[]",
        b'{"prompt": "a"}',
        b'{"messages": 3}',
        b'{"messages": []}',
        b"\xff",
    ):
        assert conversation_key(body) == ""
