"""Text of messages: one line, shortened, spelling hints."""

import difflib
from collections.abc import Iterable


def one_line(error: BaseException, limit: int = 200) -> str:
    """An exception's message on one line, at most `limit` characters; its type if it has no message."""
    return (" ".join(str(error).split()) or type(error).__name__)[:limit]


def shorten(text: str, limit: int = 80) -> str:
    """text, cut to `limit` characters with "..." at its end if it is longer."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def spelling_hint(name: str, known: Iterable[str]) -> str:
    """What to say about an unknown name: "did you mean NEAREST?", or "known are A, B, ..."."""
    known = list(known)
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}"


def format_bytes(count: float) -> str:
    """A number of bytes for a reader, for instance "13.2 GB"."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
