"""A folder that appears whole or not at all, on disk or in a bucket."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from minigpt4_jax.errors import UserError
from minigpt4_jax.storage.paths import is_remote, reaching, send


class NewFolder:
    """Files are written into `here` and, each when it is done, told of by `done`."""

    def __init__(self, here: Path, out: Path, last: str):
        self.here, self._out, self._last = here, out, last
        self._sent: set[str] = set()

    def done(self, file: Path) -> None:
        """A file is whole: to a bucket it goes at once, so that a disk need not hold all of them."""
        if is_remote(self._out):
            with reaching(self._out):
                if not self._sent:
                    (self._out / self._last).unlink(missing_ok=True)
                name = file.relative_to(self.here).as_posix()
                send(file, self._out / name)
            self._sent.add(name)
            file.unlink()

    def appear(self) -> None:
        if is_remote(self._out):
            self._appear_in_bucket()
        elif self._out.exists():
            old = self._out.with_name(f".{self._out.name}.old-{os.getpid()}")
            self._out.rename(old)
            self.here.rename(self._out)
            shutil.rmtree(old, ignore_errors=True)
        else:
            self.here.rename(self._out)

    def _appear_in_bucket(self) -> None:
        """Objects appear one by one, and `last` makes a folder of them."""
        rest = sorted(f for f in self.here.rglob("*") if f.is_file())
        for file in sorted(rest, key=lambda f: f.name == self._last):
            if file.name == self._last:
                self._remove_others()
            self.done(file)

    def _remove_others(self) -> None:
        """What another folder left here."""
        with reaching(self._out):
            for path in self._out.glob("*"):
                if path.name not in {name.partition("/")[0] for name in self._sent}:
                    path.rmtree() if path.is_dir() else path.unlink()  # type: ignore[attr-defined]


@contextlib.contextmanager
def new_folder(out: Path, last: str) -> Iterator[NewFolder]:
    """A folder that appears at `out` when the body ends, in place of what is there.

    last: the file without which it is none of its kind: a bucket cannot make many objects appear at
    once. UserError when `out` cannot be written.
    """
    here = None
    try:
        if is_remote(out):
            here = Path(tempfile.mkdtemp(prefix="minigpt4_jax-"))
        else:
            out.parent.mkdir(parents=True, exist_ok=True)
            here = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        here.chmod(0o755)
        made = NewFolder(here, out, last)
        yield made
        made.appear()
    except OSError as e:
        cause = "the disk is full" if e.errno == errno.ENOSPC else e.strerror or str(e)
        left = f"without {last} it is no model" if is_remote(out) else "nothing was written"
        raise UserError(f"cannot write {out}: {cause}; {left}") from e
    except SafetensorError as e:
        raise UserError(f"cannot write {out}: {e}; nothing was written") from e
    finally:
        if here is not None:
            shutil.rmtree(here, ignore_errors=True)
