"""Code blocks of Markdown files: found, and how each is meant to be used by a test.

A block may follow an HTML comment `<!-- not run: REASON -->`. A title names the file that the block is.
"""

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from helpers.paths import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(
    r"(?:^ *<!-- not run: (?P<reason>[^\n]+?) -->\n+)?"
    r"^(?P<indent> *)```(?P<language>\w*)(?P<info>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: Path
    line: int  # of its first line of code
    language: str
    text: str
    title: str  # the file that it shows, "" for none
    not_run: str  # why it is not run, "" if it is

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The fenced code blocks of a Markdown file, in order."""
    content = page.read_text()
    found = []
    for m in _FENCE.finditer(content):
        title = re.search(r'title="([^"]+)"', m["info"])
        found.append(
            Block(
                page, content.count("\n", 0, m.start("text")) + 1, m["language"],
                textwrap.dedent(m["text"]), title[1] if title else "", m["reason"] or "",
            )
        )  # fmt: skip
    return found


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a shell block as lists of words; `&&` and `|` separate commands."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        command: list[str] = []
        for word in [*words, "&&"]:
            if word in ("&&", "|"):
                if command:
                    yield command
                command = []
            else:
                command.append(word)
