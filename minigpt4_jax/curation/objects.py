"""Objects that a description names and that nothing else confirms, as CHAIR counts them.

CHAIR is by Rohrbach et al., 2018. An object is confirmed by a caption that came with the image, or by a
detector's list. The default vocabulary is COCO's classes with everyday words for them, without "orange",
which is mostly a colour; a file of another one has an object on each line, its names separated by commas.
"""

import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from minigpt4_jax.data.annotations import read_text
from minigpt4_jax.errors import UserError

_WORD = re.compile(r"[^\W\d_]+")


class Vocabulary:
    """Names of objects; a name is found in its singular and plural, longer names first."""

    def __init__(self, lines: Iterable[str], where: str = "objects"):
        """UserError: no name, or a name on two lines."""
        self._names: dict[tuple[str, ...], str] = {}
        for number, line in enumerate(lines, 1):
            names = [name.strip().lower() for name in line.split(",") if name.strip()]
            if not names or line.lstrip().startswith("#"):
                continue
            for name in names:
                words = tuple(_WORD.findall(name))
                for form in {words, (*words[:-1], _plural(words[-1]))} if words else set():
                    other = self._names.setdefault(form, names[0])
                    if other != names[0]:
                        raise UserError(f'{where}, line {number}: "{name}" also names "{other}"')
        if not self._names:
            raise UserError(f"{where}: names no object; expected one on each line")
        self._longest = max(map(len, self._names))

    def find(self, text: str) -> set[str]:
        """The objects that a text names."""
        words = [word.lower() for word in _WORD.findall(text)]
        found, i = set(), 0
        while i < len(words):
            for length in range(min(self._longest, len(words) - i), 0, -1):
                name = self._names.get(tuple(words[i : i + length]))
                if name is not None:
                    found.add(name)
                    i += length - 1
                    break
            i += 1
        return found


def read_vocabulary(path: Path | None) -> Vocabulary:
    """The vocabulary of a file, by default COCO's. UserError: it cannot be read, or is empty."""
    if path is None:
        asset = resources.files("minigpt4_jax") / "assets/objects.txt"
        return Vocabulary(asset.read_text(encoding="utf-8").splitlines())
    return Vocabulary(read_text(path).splitlines(), f"--objects={path}")


def _plural(word: str) -> str:
    if re.search(r"(s|x|z|ch|sh)$", word):
        return word + "es"
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + "s"


def unconfirmed(
    text: str, references: Iterable[str], detected: Iterable[str], vocabulary: Vocabulary
) -> tuple[int, list[str]]:
    """(number of objects that a text names, those that neither captions nor a detector confirm)."""
    named = vocabulary.find(text)
    confirmed = set().union(*map(vocabulary.find, [*references, *detected]))
    return len(named), sorted(named - confirmed)
