"""A Hugging Face hub on this machine: the parts of its protocol that huggingface_hub uses to download."""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

_LFS = (".safetensors", ".bin", ".gguf", ".pth")  # stored elsewhere: the hub redirects to them
_RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_INFO = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+?)(?:/revision/(?P<revision>[^/]+))?")
_TREE = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)")

Files = Mapping[str, bytes]


def files_in(folder: Path) -> dict[str, bytes]:
    """Relative path -> content of every file below a folder."""
    paths = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


@dataclass
class HubServer:
    """What is served, how it fails, and what was requested."""

    endpoint: str
    storage: str  # another host name, as redirects to the hub's own are followed at once
    commits: dict[str, dict[str, Files]] = field(
        default_factory=dict
    )  # repository -> commit -> files
    refs: dict[str, dict[str, str]] = field(default_factory=dict)  # repository -> branch -> commit
    gated: set[str] = field(default_factory=set)
    sizes: dict[str, int] = field(default_factory=dict)  # file -> another size in the listing
    cut_after: dict[str, int] = field(
        default_factory=dict
    )  # file -> bytes until the connection breaks
    failing: set[str] = field(
        default_factory=set
    )  # files answered with status 400, which is not retried
    token: str | None = None  # needed for every repository
    requests: list[tuple[str, str]] = field(default_factory=list)  # method, path
    downloads: list[tuple[str, str | None]] = field(default_factory=list)  # file, Range

    def publish(self, repo: str, files: Files, branch: str = "main") -> str:
        """Make files the head of a branch; returns the commit."""
        digest = hashlib.sha1(repo.encode())
        for name, content in sorted(files.items()):
            digest.update(name.encode() + content)
        commit = digest.hexdigest()
        self.commits.setdefault(repo, {})[commit] = dict(files)
        self.refs.setdefault(repo, {})[branch] = commit
        return commit

    def downloaded(self) -> list[str]:
        """Names of the files that were downloaded, in alphabetical order."""
        return sorted(file for file, _ in self.downloads)

    def blob(self, digest: str) -> tuple[str, bytes]:
        every = (item for commits in self.commits.values() for files in commits.values()
                 for item in files.items())  # fmt: skip
        return next((name, c) for name, c in every if hashlib.sha256(c).hexdigest() == digest)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, unquote(path)))
        if path.startswith("/cdn/"):
            return self._send_file(*self.hub.blob(path.removeprefix("/cdn/")))
        for pattern, answer in ((_RESOLVE, self._file), (_TREE, self._tree), (_INFO, self._info)):
            if match := pattern.fullmatch(path):
                values = {k: unquote(v) for k, v in match.groupdict().items() if v}
                return self._with_commit(answer, **values)
        return self._fail(404, None)

    def _with_commit(self, answer, repo: str, revision: str = "main", file: str = "") -> None:
        authorization = self.headers.get("Authorization")
        if self.hub.token and authorization != f"Bearer {self.hub.token}":
            return self._fail(401, None)
        if repo not in self.hub.commits:  # as the hub, which tells nobody what is private
            return self._fail(404, "RepoNotFound") if authorization else self._fail(401, None)
        commit = self.hub.refs[repo].get(revision, revision)
        if commit not in self.hub.commits[repo]:
            return self._fail(404, "RevisionNotFound")
        return answer(repo, commit, file)

    def _info(self, repo: str, commit: str, _: str) -> None:
        siblings = [
            {"rfilename": f["path"], "size": f["size"]} for f in self._listing(repo, commit)
        ]
        self._send_json({"id": repo, "sha": commit, "siblings": siblings})

    def _tree(self, repo: str, commit: str, _: str) -> None:
        self._send_json(self._listing(repo, commit))

    def _listing(self, repo: str, commit: str) -> list[dict]:
        return [
            {
                "type": "file",
                "path": name,
                "size": self.hub.sizes.get(name, len(content)),
                "oid": hashlib.sha1(content).hexdigest(),
            }
            for name, content in self.hub.commits[repo][commit].items()
        ]

    def _file(self, repo: str, commit: str, file: str) -> None:
        content = self.hub.commits[repo][commit].get(file)
        if content is None:
            return self._fail(404, "EntryNotFound", {"X-Repo-Commit": commit})
        if repo in self.hub.gated:
            return self._fail(403, "GatedRepo")
        if file in self.hub.failing:
            return self._fail(400, None)
        headers = {"X-Repo-Commit": commit}
        if not file.endswith(_LFS):
            return self._send_file(file, content, headers)
        digest = hashlib.sha256(content).hexdigest()
        headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        return self._send(302, b"", headers | {"Location": f"{self.hub.storage}/cdn/{digest}"})

    def _send_file(
        self, name: str, content: bytes, headers: Mapping[str, str] | None = None
    ) -> None:
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', **(headers or {})}
        if self.command == "HEAD":
            return self._send(200, content, headers)
        requested = self.headers.get("Range")
        self.hub.downloads.append((name, requested))
        if requested is None:
            return self._send(200, content, headers, self.hub.cut_after.pop(name, None))
        start = int(requested.removeprefix("bytes=").rstrip("-"))
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self._send(206, content[start:], headers)

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(
        self, status: int, code: str | None, headers: Mapping[str, str] | None = None
    ) -> None:
        self._send(status, b"{}", {**(headers or {}), **({"X-Error-Code": code} if code else {})})

    def _send(
        self, status: int, body: bytes, headers: Mapping[str, str], cut_after: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut_after])
        if cut_after is not None:
            self.close_connection = True


@contextlib.contextmanager
def hub_server(cache: Path) -> Iterator[HubServer]:
    """Serve a hub, which huggingface_hub uses in this process instead of the public one."""
    from huggingface_hub import constants

    from minigpt4_jax.storage import hub as module

    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub = HubServer(
        f"http://127.0.0.1:{server.server_port}", f"http://localhost:{server.server_port}"
    )
    handler.hub = hub
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            patch.delenv(name, raising=False)
        use_endpoint(patch, hub.endpoint)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        module._model_directory.cache_clear()
        yield hub
        module._model_directory.cache_clear()
    server.shutdown()
    server.server_close()
    thread.join()


def use_endpoint(patch: pytest.MonkeyPatch, endpoint: str) -> None:
    """What HF_ENDPOINT does to a new process."""
    from huggingface_hub import constants

    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "ENDPOINT", endpoint)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
