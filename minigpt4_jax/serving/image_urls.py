"""Download images from http(s) addresses, of public hosts only.

A host name is resolved once, and the connection goes to an address that was checked, so neither DNS nor
a redirect can lead to the machine itself or its network.
"""

import http.client
import ipaddress
import socket
import ssl
import time
from urllib.parse import SplitResult, urljoin, urlsplit

from minigpt4_jax.serving.errors import RequestError, invalid
from minigpt4_jax.utils.text import one_line, shorten

MAX_REDIRECTS = 3
CHUNK = 1 << 16  # bytes
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def download(url: str, max_bytes: int, seconds: float, param: str | None = None) -> bytes:
    """The file at an address, in at most some seconds.

    RequestError: another scheme than http and https, a host that is not public, too many redirects, too
    large, or not to be had.
    """
    end = time.monotonic() + seconds
    try:
        for _ in range(MAX_REDIRECTS + 1):
            parts = _check(url, param)
            response = _get(parts, max(0.1, end - time.monotonic()), param)
            if response.status in (301, 302, 303, 307, 308):
                url = urljoin(url, response.getheader("Location") or "")
                response.close()
                continue
            if response.status != 200:
                raise _failed(url, f"status {response.status}", param)
            return _read(response, url, max_bytes, end, param)
    except (OSError, ValueError, http.client.HTTPException) as e:
        raise _failed(url, one_line(e), param) from None
    raise _failed(url, f"more than {MAX_REDIRECTS} redirects", param)


def _check(url: str, param: str | None) -> SplitResult:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise invalid(
            f"{shorten(url)!r}: expected a data URL, or http or https", param, "invalid_image_url"
        )
    return parts


def _get(parts: SplitResult, seconds: float, param: str | None) -> http.client.HTTPResponse:
    """Send the request to a checked address of the host."""
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    address = public_address(host, port, param)
    connection = http.client.HTTPConnection(host, port, timeout=seconds)
    sock = socket.create_connection((address, port), timeout=seconds)
    try:
        if parts.scheme == "https":
            sock = ssl.create_default_context().wrap_socket(sock, server_hostname=host)
        connection.sock = sock
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"Accept": "image/*", "Connection": "close"})
        return connection.getresponse()
    except BaseException:
        sock.close()
        raise


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
        if ip.teredo is not None:
            return False
    return ip.is_global and not ip.is_multicast


def _read(
    response: http.client.HTTPResponse, url: str, max_bytes: int, end: float, param: str | None
) -> bytes:
    data = b""
    with response:
        while chunk := response.read(CHUNK):
            data += chunk
            if len(data) > max_bytes:
                raise RequestError(
                    413, f"the image at {shorten(url)} has more than {max_bytes} bytes",
                    "image_too_large", param=param,
                )  # fmt: skip
            if time.monotonic() > end:
                raise _failed(url, "it took too long", param)
    return data


def _failed(url: str, reason: str, param: str | None) -> RequestError:
    return invalid(f"cannot get {shorten(url)}: {reason}", param, "image_download_failed")
