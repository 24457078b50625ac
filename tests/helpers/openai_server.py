"""A local OpenAI-compatible server that counts what it is asked, and can be told to fail."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "counting-model"
Reply = Callable[[str], str]


def polite(text: str) -> str:
    """A reply that changes every text."""
    return text.strip().capitalize().rstrip(".") + ", as anyone can see."


class CountingServer:
    """The server on a free port of this machine.

    asked: how often each text was asked. charged: the same without requests that repeat an
    Idempotency-Key. most: requests at a time. failures: what the next requests get instead of a reply:
    (status, headers, body). page: sent instead of everything, as content of type `kind`.
    """

    def __init__(self, reply: Reply = polite, *, key: str = "", delay: float = 0.0):
        self.reply, self.key, self.delay = reply, key, delay
        self.asked: Counter[str] = Counter()
        self.charged: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.failures: list[tuple[int, dict[str, str], dict[str, Any]]] = []
        self.times: list[float] = []
        self.models = [MODEL]
        self.page, self.kind = b"", "text/html"
        self.most = self.running = 0
        self._seen: set[str | None] = set()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> "CountingServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(
        self, headers: Any, body: dict[str, Any]
    ) -> tuple[int, dict[str, str], dict[str, Any]]:
        text = body["messages"][-1]["content"]
        with self._lock:
            self.times.append(time.monotonic())
            if self.key and headers["Authorization"] != f"Bearer {self.key}":
                return 401, {}, {"error": {"message": "wrong key", "code": "invalid_api_key"}}
            if self.failures:
                return self.failures.pop(0)
            self.running += 1
            self.most = max(self.most, self.running)
            self.asked[text] += 1
            self.bodies.append(body)
            key = headers["Idempotency-Key"]
            self.charged[text] += key is None or key not in self._seen
            self._seen.add(key)
        time.sleep(self.delay)
        reply = self.reply(text)
        with self._lock:
            self.running -= 1
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        message = {"role": "assistant", "content": reply}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return 200, {}, {
            "id": "x", "object": "chat.completion", "created": 0, "model": MODEL, "choices": [choice],
            "usage": usage,
        }  # fmt: skip

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                self._send(*outer.answer(self.headers, json.loads(self.rfile.read(length))))

            def do_GET(self) -> None:
                models = [{"id": name, "object": "model"} for name in outer.models]
                self._send(200, {}, {"object": "list", "data": models})

            def _send(self, status: int, headers: dict[str, str], content: dict[str, Any]) -> None:
                data = outer.page or json.dumps(content).encode()
                kind = outer.kind if outer.page else "application/json"
                self.send_response(status)
                for name, value in {"Content-Type": kind, **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        return Handler
