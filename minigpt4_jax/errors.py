"""User-facing errors: one clear line and an exit code instead of a traceback."""

import argparse
import os
import select
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """A mistake in what the user gave: the message names the thing, its value, what was expected
    and what to do. Entry points print it as one line; library callers can catch it."""

    code = 2  # of the exit of an entry point


class DataError(UserError):
    """A fault in one image, row or file of a dataset, which training can go on without.

    cause: the kind of fault in a few words, the same for all of the kind, by which they are counted."""

    def __init__(self, message: str, cause: str):
        super().__init__(message, cause)  # both, so that it can be pickled
        self.message, self.cause = message, cause

    def __str__(self) -> str:
        return self.message


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is a UserError: one line without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def run(main: Callable[[], int | None], leave: Callable[[int], NoReturn] = sys.exit) -> NoReturn:
    """Run an entry point: UserError becomes one line on stderr and its code, Ctrl-C code 130, and code
    141 says that nobody reads stdout any more. leave: ends the process with a code, after a traceback
    too."""
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
    """Whether what reads stdout is gone, as with `| head`; nothing more is written to it then."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        if not poll.poll(0):
            return False
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (AttributeError, OSError):  # no poll() on Windows, no descriptor in a notebook
        return False
    return True
