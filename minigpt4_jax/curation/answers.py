"""Answers of a language model, kept on disk by what was asked, so that nothing is asked twice.

An SQLite file. An answer is committed as soon as it is received, so a process may be killed at any moment;
several processes may share the file.
"""

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from minigpt4_jax.errors import UserError

_TABLE = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY,
    text TEXT NOT NULL,
    reply TEXT NOT NULL,
    finish_reason TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    created TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP
)
"""
REFUSED = "refused"  # the finish_reason of a text that the server does not answer; `reply` says why
_TIMEOUT = 60.0  # seconds to wait for another process that is writing


class Answer(NamedTuple):
    """What a language model replied to a text.

    finish_reason: "stop", "length" if the reply was cut at its longest, or another one of the server.
    """

    reply: str
    finish_reason: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


def answer_key(settings: dict[str, Any], text: str) -> str:
    """Equal for the same text asked in the same way. settings: what else a reply depends on."""
    content = json.dumps([settings, text], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()


class AnswerCache:
    """The answers in a file; its methods may be called from any thread."""

    def __init__(self, path: Path):
        """UserError: the file cannot be opened, or is something else."""
        self._path = path
        self._lock = threading.Lock()
        with self._errors():
            self._connection = sqlite3.connect(path, _TIMEOUT, check_same_thread=False)
            self._connection.execute(_TABLE)

    def __enter__(self) -> "AnswerCache":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._connection.close()

    def get(self, key: str) -> Answer | None:
        with self._errors(), self._lock:
            row = self._connection.execute(
                "SELECT reply, finish_reason, prompt_tokens, completion_tokens FROM answers "
                "WHERE key = ?", (key,),
            ).fetchone()  # fmt: skip
        return Answer(*row) if row else None

    def put(self, key: str, text: str, answer: Answer) -> None:
        """Keep an answer; it is on disk when this returns. The first answer of a key stays."""
        with self._errors(), self._lock, self._connection:
            self._connection.execute(
                "INSERT OR IGNORE INTO answers "
                "(key, text, reply, finish_reason, prompt_tokens, completion_tokens) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (key, _storable(text), _storable(answer.reply), *answer[1:]),
            )

    def forget_refusals(self, keys: Iterable[str]) -> None:
        """Delete the answers of these keys that are refusals."""
        with self._errors(), self._lock, self._connection:
            self._connection.executemany(
                "DELETE FROM answers WHERE key = ? AND finish_reason = ?",
                ((key, REFUSED) for key in keys),
            )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as e:
            raise UserError(
                f"--cache={self._path}: {e}; choose another file, or mend the cause"
            ) from None


def _storable(text: str) -> str:
    """Text that UTF-8 can express: half surrogates, which JSON can hold, are replaced."""
    return text.encode("utf-8", "replace").decode()
