"""Shortening text for messages."""


def one_line(error: BaseException, limit: int = 200) -> str:
    """An exception's message on one line, at most `limit` characters; its type if it has no message."""
    return (" ".join(str(error).split()) or type(error).__name__)[:limit]


def shorten(text: str, limit: int = 80) -> str:
    """text, cut to `limit` characters with "..." at its end if it is longer."""
    return text if len(text) <= limit else text[: limit - 3] + "..."
