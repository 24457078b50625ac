"""What a file is by its first bytes, for messages about a file of another format than expected."""

HEAD_BYTES = 200  # that `describe_format` looks at

_STARTS = (
    (b"\x1f\x8b", "compressed by gzip", "unpack it (gzip -d)"),
    (b"PK\x03\x04", "a ZIP archive or an Excel file", "unpack it, or save it as CSV"),
    (b"PAR1", "Parquet", "give it a name that ends in .parquet"),
    (b"\xff\xfe", "UTF-16", "save it as UTF-8, for instance with iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16", "save it as UTF-8, for instance with iconv -f UTF-16 -t UTF-8"),
    (b"%PDF", "a PDF document", "save the page as PNG"),
    (b"\x93NUMPY", "a NumPy array", "load it with numpy.load and pass the array"),
)
_HEIC = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")


def describe_format(head: bytes) -> tuple[str, str] | None:
    """(what it is, what to do) for the first HEAD_BYTES of a file; None if that is not known."""
    for start, what, advice in _STARTS:
        if head.startswith(start):
            return what, advice
    if b"<svg" in head[:HEAD_BYTES].lower():
        return "an SVG drawing", "save it as PNG"
    if head[4:8] == b"ftyp":
        if head[8:12] in _HEIC:
            return "a HEIC photo", "save it as JPEG"
        return "a video or another file of the MP4 family", "save a frame as PNG"
    return None
