"""User errors: one line on stderr and an exit code instead of a traceback."""

import argparse
import difflib
import os
import select
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn


class UserError(Exception):
    """A mistake in the user's input. The message names the thing, its value, what was expected and
    what to do. Entry points print it as one line; library callers can catch it."""

    code = 2  # exit code of an entry point


class DataError(UserError):
    """An error in one image, row or file of a dataset, which training can skip.

    cause: the kind of error in a few words; errors are counted by it.
    """

    def __init__(self, message: str, cause: str):
        super().__init__(message, cause)  # both, for pickling
        self.message, self.cause = message, cause

    def __str__(self) -> str:
        return self.message


def expand_home(arg: str) -> str:
    """`--option=~/path` with the home directory for ~, which shells leave as it is there."""
    name, _, value = arg.partition("=")
    is_home = name.startswith("--") and (value == "~" or value.startswith("~/"))
    return f"{name}={os.path.expanduser(value)}" if is_home else arg


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError: one line without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}{self._hint(message)} (see {self.prog} --help)")

    def _hint(self, message: str) -> str:
        """The nearest option to the first that is not known, also if - and _ are confused."""
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown == message or not unknown.startswith("--"):
            return ""
        known = {name.replace("_", "-"): name for a in self._actions for name in a.option_strings}
        name = unknown.split()[0].partition("=")[0].replace("_", "-")
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
        return f"; did you mean {known[near[0]]}?" if near else ""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse. Options may be spelled with - or _ between their words; see also `expand_home`."""
        given = list(sys.argv[1:] if args is None else args)
        end = given.index("--") if "--" in given else len(given)
        known = [self._known_spelling(arg) for arg in given[:end]]
        return super().parse_known_args(known + given[end:], namespace)

    def _known_spelling(self, arg: str) -> str:
        name, equals, value = arg.partition("=")
        if not name.startswith("--"):
            return arg
        if name not in self._options():
            by_words = {known.replace("_", "-"): known for known in self._options()}
            name = by_words.get(name.replace("_", "-"), name)
        return expand_home(name + equals + value)

    def _options(self) -> list[str]:
        return [name for name in self._option_string_actions if name.startswith("--")]


def run(main: Callable[[], int | None], leave: Callable[[int], NoReturn] = sys.exit) -> NoReturn:
    """Run an entry point and end the process.

    Exit codes: that of main, 2 after a UserError (printed as one line on stderr), 130 after Ctrl-C,
    141 if the reader of stdout exited. leave: ends the process with an exit code; if it is not
    sys.exit, it is called after an unexpected exception too, with code 1.
    """
    try:
        code = main() or 0
        sys.stdout.flush()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        code = e.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        if not _stdout_is_closed():
            raise
        code = 141  # as a shell reports SIGPIPE
    except Exception:
        if leave is sys.exit:
            raise
        traceback.print_exc()
        code = 1
    leave(code)


def _stdout_is_closed() -> bool:
    """Whether the reader of stdout exited, as with `| head`. If so, stdout is redirected to /dev/null."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        if not poll.poll(0):
            return False
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (AttributeError, OSError):  # no poll() on Windows, no file descriptor in a notebook
        return False
    return True
