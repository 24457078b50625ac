"""Which requests belong together: they go to one replica, whose caches know what they have in common."""

import hashlib
import json
from typing import Any


def conversation_key(body: bytes) -> str:
    """A name for the conversation of a request's JSON, or "".

    `prompt_cache_key` if the client sets it, as in OpenAI's API. Otherwise chats with the same beginning, up
    to the first message of the user, are one conversation: every turn repeats it. Other requests belong
    together by their images, which are encoded once.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return ""  # the replica says what is wrong
    if not isinstance(request, dict):
        return ""
    given = request.get("prompt_cache_key")
    if isinstance(given, str) and given:
        return _digest(given)
    beginning = _beginning(request.get("messages")) or request.get("images")
    return _digest(beginning) if beginning else ""


def _beginning(messages: Any) -> list[Any]:
    """The messages up to the first one of the user."""
    if not isinstance(messages, list):
        return []
    for n, message in enumerate(messages):
        if isinstance(message, dict) and message.get("role") == "user":
            return messages[: n + 1]
    return messages


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
