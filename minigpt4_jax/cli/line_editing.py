"""Line editing of chat in a terminal: history, pasted lines, and completion of commands and file names."""

import contextlib
import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path


@contextlib.contextmanager
def line_editing(commands: Iterable[str]) -> Iterator[None]:
    """`input` with history and completion, where Python has readline (not on Windows).

    commands: names that are completed behind a `/` at the beginning of a line.
    """
    try:
        import readline
    except ImportError:
        yield
        return
    names = [*commands, "quit"]

    def complete(text: str, number: int) -> str | None:
        """The completion with this number: a command at the start of the line, else a file name."""
        if readline.get_begidx() == 0:
            matches = [f"/{name} " for name in names if f"/{name}".startswith(text)]
        else:
            files = sorted(glob.glob(glob.escape(os.path.expanduser(text)) + "*"))
            matches = [file + "/" * os.path.isdir(file) for file in files]
        return matches[number] if text and number < len(matches) else None

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
