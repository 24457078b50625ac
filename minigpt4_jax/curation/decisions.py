"""Decisions about rows, made by a person: accept, edit or reject.

A JSONL file that only grows: a decision is on disk when it is taken, and the last one about a row counts.
"""

import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minigpt4_jax.curation.rows import Row, json_line
from minigpt4_jax.errors import UserError

KINDS = ("accept", "edit", "reject", "none")  # "none" takes a decision back


class Decision(NamedTuple):
    """caption: the text of an edit, else ""."""

    kind: str
    caption: str = ""


def row_key(row: Row) -> str:
    """What a decision is about: a row with this very caption."""
    content = json.dumps([row["id"], row.get("sample", 0), row.get("caption", "")])
    return f"{row['id']} {hashlib.sha256(content.encode()).hexdigest()[:16]}"


class Decisions:
    """The decisions in a file; `put` may be called from any thread."""

    def __init__(self, path: Path):
        """UserError: the file cannot be read, or is something else."""
        self._path = path
        self._lock = threading.Lock()
        self._by_key, self._size = _read(path)

    def get(self, row: Row) -> Decision | None:
        return self._by_key.get(row_key(row))

    def put(self, row: Row, decision: Decision) -> None:
        """Write a decision; it is on disk when this returns. OSError: it cannot be written."""
        key = row_key(row)
        fields: dict[str, Any] = {"row": key, "id": row["id"], "decision": decision.kind}
        if decision.kind == "edit":
            fields["caption"] = decision.caption
        line = json_line(fields).encode()
        with self._lock:
            with self._path.open("ab") as file:
                file.truncate(self._size)  # without a line that an interruption cut
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            self._size += len(line)
            _apply(self._by_key, key, decision)

    def counts(self, rows: Sequence[Row]) -> Counter[str]:
        """How many of the rows have which kind of decision, "open" without one."""
        decisions = [self.get(row) for row in rows]
        return Counter("open" if decision is None else decision.kind for decision in decisions)

    def apply(
        self, rows: Sequence[Row], *, only_accepted: bool = False
    ) -> tuple[list[Row], list[Row]]:
        """(rows that stay, with their edits; rows that are rejected).

        only_accepted: rows without a decision do not stay either.
        """
        kept: list[Row] = []
        removed: list[Row] = []
        for row in rows:
            decision = self.get(row)
            if decision is None:
                if only_accepted:
                    removed.append({**row, "cause": "not reviewed"})
                else:
                    kept.append(row)
            elif decision.kind == "reject":
                removed.append({**row, "cause": "rejected"})
            elif decision.kind == "edit":
                original = row.get("original", row["caption"])
                kept.append({**row, "caption": decision.caption, "original": original})
            else:
                kept.append(row)
        return kept, removed


def _apply(by_key: dict[str, Decision], key: str, decision: Decision) -> None:
    if decision.kind == "none":
        by_key.pop(key, None)
    else:
        by_key[key] = decision


def _read(path: Path) -> tuple[dict[str, Decision], int]:
    """(decisions by the key of their row, bytes of complete lines)"""
    by_key: dict[str, Decision] = {}
    try:
        data = path.read_bytes() if path.exists() else b""
    except OSError as e:
        raise UserError(f"decisions {path}: cannot be read ({e.strerror})") from None
    size = data.rfind(b"\n") + 1
    for number, line in enumerate(data[:size].splitlines(), 1):
        try:
            fields = json.loads(line)
            decision = Decision(fields["decision"], fields.get("caption", ""))
            if decision.kind not in KINDS:
                raise ValueError(decision.kind)
            _apply(by_key, fields["row"], decision)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"decisions {path}, line {number}: is no decision of curate review"
            ) from None
    return by_key, size
