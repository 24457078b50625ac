"""Line editing of chat in a terminal: history, pasted lines, and completion of commands and file names."""

import contextlib
import glob
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path


@contextlib.contextmanager
def line_editing(commands: Iterable[str], options: Iterable[str]) -> Iterator[None]:
    """`input` with history and completion, where Python has readline (not on Windows).

    commands: names that are completed behind a `/` at the beginning of a line; options: those of /set.
    """
    try:
        import readline
    except ImportError:
        yield
        return

    def complete(_: str, number: int) -> str | None:
        begin, end = readline.get_begidx(), readline.get_endidx()
        matches = completions(readline.get_line_buffer()[:end], begin, [*commands, "quit"], options)
        return matches[number] if number < len(matches) else None

    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    history = Path(state) / "minigpt4_jax" / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    readline.set_completer_delims(" \t")
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")
    readline.parse_and_bind("set enable-bracketed-paste on")  # pasted lines are one question
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(history)


def completions(
    line: str, begin: int, commands: Iterable[str], options: Iterable[str] = ()
) -> list[str]:
    """What the last word of a line may become: a command, an option of /set, or a file name.

    begin: where the word begins; words end at white space, also within a name that has some.
    """
    if begin == 0:
        return [f"/{name} " for name in commands if line and f"/{name}".startswith(line)]
    command, _, rest = line.partition(" ")
    if command == "/set":
        return [f"{name}=" for name in options if name.startswith(line[begin:])]
    last = line[begin:]
    for word, quote in _file_words(rest, last):
        path = os.path.expanduser(word)
        files = sorted(glob.glob(glob.escape(path) + "*")) if word else []
        if files:
            if quote == "\\":
                names = [_escape(file) + "/" * os.path.isdir(file) for file in files]
                behind = len(_escape(path)) - len(last)
                return [name[max(behind, 0) :] for name in names]
            names = [quote + file + ("/" if os.path.isdir(file) else quote) for file in files]
            behind = 0 if quote + word == last else len(quote + path) - len(last)
            return [name[behind:] for name in names]  # what stands before the last word stays
    return []


def _file_words(rest: str, last: str) -> list[tuple[str, str]]:
    """(beginning of a file name, how its spaces are protected) that a line may end with.

    In an open quotation it is what is in it; else all that follows the command, or the last word, with
    the spaces before it that have a backslash as in a shell.
    """
    quotes = [quote for quote in ('"', "'") if rest.count(quote) % 2]
    words = [(rest.rpartition(quote)[2], quote) for quote in quotes]
    if '"' in quotes:
        return words[:1]
    words.append((rest.lstrip(), ""))
    escaped = re.search(r"(?:\\.|[^\s\\])*$", rest)
    if escaped and "\\" in escaped[0]:
        words.append((re.sub(r"\\(.)", r"\1", escaped[0]), "\\"))
    elif not quotes:
        words.append((last, ""))
    return words


def _escape(path: str) -> str:
    """A path with backslashes before what separates words."""
    return re.sub(r"([\s\\\"'])", r"\\\1", path)
