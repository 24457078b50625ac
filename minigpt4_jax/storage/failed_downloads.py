"""Files that are not what their name says, because a download failed."""

WEB_PAGE = "a web page (HTML)"
LFS_POINTER = "a Git LFS pointer"


def failed_download(head: bytes) -> str | None:
    """WEB_PAGE or LFS_POINTER if a file that begins with `head` is one (100 bytes suffice)."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return WEB_PAGE
    return LFS_POINTER if start.startswith(b"version https://git-lfs") else None
