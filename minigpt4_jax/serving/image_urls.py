"""Download images from http(s) addresses, of public hosts only.

A host name is resolved once, and the connection goes to an address that was checked, so neither DNS nor
a redirect can lead to the machine itself or its network.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from urllib.parse import SplitResult, urljoin, urlsplit

from minigpt4_jax.serving.errors import RequestError, invalid
from minigpt4_jax.utils.text import one_line, shorten

MAX_REDIRECTS = 3
CHUNK = 1 << 16  # bytes
_LATE = "it took too long"
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_GLOBAL_V6 = ipaddress.ip_network("2000::/3")  # all that IANA has made public


def download(url: str, max_bytes: int, seconds: float, param: str | None = None) -> bytes:
    """The file at an address, in at most some seconds.

    RequestError: another scheme than http and https, a host that is not public, too many redirects, too
    large, or not to be had.
    """
    end = time.monotonic() + seconds
    try:
        for _ in range(MAX_REDIRECTS + 1):
            parts = _check(url, param)
            with _response(parts, end, param) as response:
                if response.status == 200:
                    return _read(response, url, max_bytes, end, param)
                if response.status not in (301, 302, 303, 307, 308):
                    raise _failed(url, f"status {response.status}", param)
                url = urljoin(url, response.getheader("Location") or "")
    except (OSError, ValueError, http.client.HTTPException) as e:
        late = time.monotonic() > end
        raise _failed(url, _LATE if late else one_line(e), param) from None
    raise _failed(url, f"more than {MAX_REDIRECTS} redirects", param)


def _check(url: str, param: str | None) -> SplitResult:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise invalid(
            f"{shorten(url)!r}: expected a data URL, or http or https", param, "invalid_image_url"
        )
    return parts


@contextlib.contextmanager
def _response(
    parts: SplitResult, end: float, param: str | None
) -> Iterator[http.client.HTTPResponse]:
    """The response of a checked address of the host. The connection is cut at the time `end`."""
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    address = public_address(host, port, param)
    seconds = max(0.1, end - time.monotonic())
    sock = socket.create_connection((address, port), timeout=seconds)
    # A timeout of a socket is for one call: a host that sends a byte now and then never reaches it.
    timer = threading.Timer(seconds, lambda: _cut(sock))
    timer.daemon = True
    timer.start()
    try:
        if parts.scheme == "https":
            context = ssl.create_default_context()
            sock = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
            sock.do_handshake()
        connection = http.client.HTTPConnection(host, port)
        connection.sock = sock
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"Accept": "image/*", "Connection": "close"})
        with connection.getresponse() as response:
            yield response
    finally:
        timer.cancel()
        sock.close()


def _cut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed already
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # not SSLSocket's, which says goodbye first


def public_address(host: str, port: int, param: str | None = None) -> str:
    """The first address of a host. RequestError: one of its addresses is not public."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(map(is_public, addresses)):
        raise invalid(f"{shorten(host)!r} is not a public host", param, "invalid_image_url")
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an address belongs to the public internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip.teredo is not None or ip not in _GLOBAL_V6:
            return False
    return ip.is_global and not ip.is_multicast


def _read(
    response: http.client.HTTPResponse, url: str, max_bytes: int, end: float, param: str | None
) -> bytes:
    data = b""
    while chunk := response.read(CHUNK):
        data += chunk
        if len(data) > max_bytes:
            raise RequestError(
                413, f"the image at {shorten(url)} has more than {max_bytes} bytes",
                "image_too_large", param=param,
            )  # fmt: skip
    if time.monotonic() > end:  # the connection was cut, which looks like the end of the file
        raise _failed(url, _LATE, param)
    return data


def _failed(url: str, reason: str, param: str | None) -> RequestError:
    return invalid(f"cannot get {shorten(url)}: {reason}", param, "image_download_failed")
