"""Requests to an ASGI application in this process, without a network."""

import asyncio
import json
from typing import Any, NamedTuple


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.body)["error"]


async def request(
    app, path: str, body: bytes | object = b"", *, method="POST", headers=None, delay=0.0
) -> Reply:
    """One request. body: bytes, or an object for JSON. delay: seconds before the body arrives."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {"content-type": "application/json"} | (headers or {})
    scope = {
        "type": "http", "http_version": "1.1", "method": method, "path": path, "query_string": b"",
        "root_path": "", "scheme": "http", "client": ("test", 1), "server": ("test", 80),
        "headers": [(k.encode("latin-1"), v.encode("latin-1")) for k, v in fields.items()],
    }  # fmt: skip
    pieces = [data[: len(data) // 2], data[len(data) // 2 :]]
    status, received, found = 0, [], {}
    finished = asyncio.Event()

    async def receive():
        if not pieces:
            await finished.wait()
            return {"type": "http.disconnect"}
        await asyncio.sleep(delay)
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(message):
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
            found.update((k.decode(), v.decode()) for k, v in message["headers"])
        else:
            received.append(message.get("body", b""))

    await app(scope, receive, send)
    finished.set()
    return Reply(status, found, b"".join(received))
