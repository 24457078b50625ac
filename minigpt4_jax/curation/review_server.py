"""A local web page on which a person accepts, edits or rejects rows by keyboard.

It listens on the loopback interface only, and needs nothing from the network. Requests of other sites' pages
are refused: the Host header must be this server's, and what changes something must be JSON.
"""

import io
import json
import mimetypes
import os
import re
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from minigpt4_jax import __version__
from minigpt4_jax.curation.decisions import KINDS, Decision, Decisions
from minigpt4_jax.curation.rows import Row, image_of
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.images import FilePart, ImageSource, open_image

HOST = "127.0.0.1"
MAX_BODY = 1 << 20  # bytes of a decision
PAGE_ROWS = 200  # rows in one answer
# The page has its script and its style inside; nothing comes from elsewhere.
_POLICY = (
    "default-src 'self'; img-src 'self' data:; script-src 'self' 'unsafe-inline'; "
    "style-src 'self' 'unsafe-inline'"
)
_SHOWN = ("id", "sample", "caption", "original", "references", "unconfirmed")


class ReviewServer(ThreadingHTTPServer):
    """The server; `serve_forever` runs it."""

    daemon_threads = True

    def __init__(
        self, rows: Sequence[Row], folder: Path, decisions: Decisions, port: int, title: str
    ):
        """rows: of a file in `folder`. port: 0 takes a free one. UserError: the port is taken."""
        self.rows, self.decisions, self.title = rows, decisions, title
        self.images = [image_of(row, folder, f"row {i + 1}") for i, row in enumerate(rows)]
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as e:
            raise UserError(f"--port={port}: {e}; choose another, or 0 for a free one") from None

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    server: ReviewServer
    server_version = f"minigpt4_jax/{__version__}"

    def do_GET(self) -> None:
        if not self._is_local():
            return
        url = urlsplit(self.path)
        if url.path == "/":
            page = (resources.files("minigpt4_jax") / "assets/review.html").read_bytes()
            self._send(HTTPStatus.OK, page, "text/html; charset=utf-8")
        elif url.path == "/rows":
            first = int(
                "".join(re.findall(r"^\d+$", parse_qs(url.query).get("first", ["0"])[0])) or 0
            )
            self._send_json(HTTPStatus.OK, self._rows(first))
        elif match := re.fullmatch(r"/images/(\d+)", url.path):
            self._send_image(int(match[1]))
        else:
            self._send_json(HTTPStatus.NOT_FOUND, {"error": f"there is no {url.path}"})

    def do_POST(self) -> None:
        if not self._is_local():
            return
        # A form of another site cannot send JSON.
        if self.headers.get_content_type() != "application/json":
            self._send_json(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, {"error": "expected JSON"})
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > MAX_BODY:
            self.close_connection = True
            self._send_json(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, {"error": "the request is too large"}
            )
            return
        body = self.rfile.read(int(length))
        if self.path != "/decisions":
            self._send_json(HTTPStatus.NOT_FOUND, {"error": f"there is no {self.path}"})
            return
        try:
            number, decision = self._parse(body)
            self.server.decisions.put(self.server.rows[number], decision)
        except ValueError as e:
            self._send_json(HTTPStatus.BAD_REQUEST, {"error": str(e)})
        except OSError as e:
            self._send_json(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": f"not saved: {e.strerror}"})
        else:
            self._send_json(HTTPStatus.OK, {"counts": self._counts()})

    # --- content ----------------------------------------------------------------------------------

    def _rows(self, first: int) -> dict[str, Any]:
        rows = self.server.rows[first : first + PAGE_ROWS]
        shown = []
        for number, row in enumerate(rows, first):
            decision = self.server.decisions.get(row)
            fields = {name: row[name] for name in _SHOWN if name in row}
            fields |= {"number": number, "decision": decision.kind if decision else "none"}
            shown.append(fields | {"edited": decision.caption if decision else ""})
        total = len(self.server.rows)
        return {"rows": shown, "total": total, "title": self.server.title, "counts": self._counts()}

    def _counts(self) -> dict[str, int]:
        return dict(self.server.decisions.counts(self.server.rows))

    def _parse(self, body: bytes) -> tuple[int, Decision]:
        """(number of a row, decision about it) ValueError: the request is wrong."""
        fields = json.loads(body)
        if not isinstance(fields, dict):
            raise ValueError("expected an object")
        number, kind, caption = (fields.get(name) for name in ("number", "decision", "caption"))
        if not isinstance(number, int) or not 0 <= number < len(self.server.rows):
            raise ValueError(f"there is no row {number!r}")
        if kind not in KINDS:
            raise ValueError(f"decision {kind!r}: expected one of {', '.join(KINDS)}")
        if kind != "edit":
            return number, Decision(kind)
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError("the caption is empty")
        return number, Decision("edit", caption.strip())

    def _send_image(self, number: int) -> None:
        try:
            source = self.server.images[number]
            data, kind = _image_file(source)
        except (IndexError, OSError, UserError) as e:
            self._send_json(HTTPStatus.NOT_FOUND, {"error": str(e)})
            return
        self._send(HTTPStatus.OK, data, kind)

    # --- answers ----------------------------------------------------------------------------------

    def _is_local(self) -> bool:
        """Whether a request is for this server by its own name; if not, it is refused."""
        port = self.server.server_address[1]
        if self.headers.get("Host") in (f"{HOST}:{port}", f"localhost:{port}"):
            return True
        self.close_connection = True
        self._send_json(HTTPStatus.FORBIDDEN, {"error": f"open {self.server.url}"})
        return False

    def _send_json(self, status: HTTPStatus, content: dict[str, Any]) -> None:
        self._send(status, json.dumps(content).encode(), "application/json")

    def _send(self, status: HTTPStatus, data: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", _POLICY)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is logged."""


def _image_file(source: ImageSource) -> tuple[bytes, str]:
    """An image as a browser shows it: (bytes of the file, media type)."""
    if isinstance(source, FilePart):
        data, kind = None, ""
    else:
        kind = mimetypes.guess_type(os.fspath(source))[0] or ""  # type: ignore[arg-type]
        shown = ("image/jpeg", "image/png", "image/webp", "image/gif")
        data = Path(os.fspath(source)).read_bytes() if kind in shown else None  # type: ignore[arg-type]
    if data is not None:
        return data, kind
    buffer = io.BytesIO()
    open_image(source, exif=True).save(buffer, "PNG")
    return buffer.getvalue(), "image/png"
