"""Rows with the replies of a language model that polished their descriptions: kept or removed, and why.

The rules about replies are those of MiniGPT-4's authors (their script for the second stage's data).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources

from minigpt4_jax.curation.answers import REFUSED, Answer
from minigpt4_jax.curation.filters import FilterLimits, find_fault
from minigpt4_jax.curation.rows import Row

# Causes of removal besides the names of the filters
NOT_DESCRIBED = "not described"
NOT_ANSWERED = "not answered"
REFUSED_BY_SERVER = "refused by the server"
CUT = "cut"  # the reply was longer than allowed
INCOMPLETE = "incomplete"
REPETITION = "repetition"
EMPTY = "empty reply"

# The most that is asked of the language model, as in the authors' script
TEMPERATURE = 0.7
MAX_TOKENS = 200


@dataclass
class Polished:
    """Rows after polishing. removed: rows with a "cause"."""

    kept: list[Row] = field(default_factory=list)
    removed: list[Row] = field(default_factory=list)
    unchanged: int = 0

    @property
    def causes(self) -> Counter[str]:
        return Counter(row["cause"] for row in self.removed)


def default_instruction() -> str:
    """The instruction that is used without another one."""
    assets = resources.files("minigpt4_jax") / "assets"
    return (assets / "polish_instruction.txt").read_text(encoding="utf-8")


def judge_reply(text: str, answer: Answer) -> tuple[str, str | None]:
    """(the polished text, the cause to remove it or None).

    "already correct" keeps the text as it was, unless the reply also speaks of repetition; "incomplete"
    removes it.
    """
    if answer.finish_reason in (REFUSED, "content_filter"):
        return text, REFUSED_BY_SERVER
    reply = answer.reply.strip()
    lower = reply.lower()
    if "already correct" in lower:
        return text, REPETITION if "repetition" in lower else None
    if "incomplete" in lower:
        return reply, INCOMPLETE
    if answer.finish_reason == "length":
        return reply, CUT
    return reply, None if reply else EMPTY


def polish_rows(
    rows: Sequence[Row],
    answer_of: Callable[[str], Answer | None] | None,
    limits: FilterLimits,
    without: frozenset[str] = frozenset(),
) -> Polished:
    """Apply replies, rules and filters to rows.

    answer_of: caption -> the language model's answer; None: there is no language model, only the filters
    are applied. without: names of filters that are not used.
    """
    polished = Polished()
    for row in rows:
        new, cause = _polish(row, answer_of)
        cause = cause or find_fault(new["caption"], limits, without)
        if cause is None:
            polished.kept.append(new)
            polished.unchanged += "original" not in new
        else:
            polished.removed.append({**new, "cause": cause})
    return polished


def _polish(row: Row, answer_of: Callable[[str], Answer | None] | None) -> tuple[Row, str | None]:
    if "caption" not in row:
        return row, NOT_DESCRIBED
    text = row["caption"]
    if answer_of is None or not text.strip():
        return row, None
    answer = answer_of(text)
    if answer is None:
        return row, NOT_ANSWERED
    polished, cause = judge_reply(text, answer)
    new = row if polished == text else {**row, "caption": polished, "original": text}
    return ({**new, "reply": answer.reply} if cause else new), cause
