"""Files and directories that appear complete or not at all, on disk or in a bucket.

Everything is written under a temporary name and renamed at the end. The functions raise plain
OSErrors; `write_error` makes the one line for users of them.
"""

import contextlib
import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from minigpt4_jax.errors import UserError
from minigpt4_jax.storage.paths import is_remote, upload, wrap_storage_errors


def write_error(path: Path | str, error: Exception, note: str = "") -> UserError:
    """The UserError for a failed write: "cannot write PATH: CAUSE; NOTE"."""
    cause = str(error)
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        cause = "the disk is full" if full else error.strerror or cause
    return UserError(f"cannot write {path}: {cause}" + (f"; {note}" if note else ""))


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path, with the suffix of `path`, and moves it to `path` when the body ends.

    An existing file is replaced. After an error nothing is left and `path` is unchanged. The
    directory of `path` must exist.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="minigpt4_jax-") as directory:
            temporary = Path(directory) / path.name
            yield temporary
            upload(temporary, path)
        return
    temporary = path.with_name(f".{secrets.token_hex(4)}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str, *, errors: str = "strict") -> None:
    """Write a small UTF-8 file that is never seen half-written. errors: as for `str.encode`."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=errors)


class AtomicDirectory:
    """A directory under construction: write files into `path`, call `finish_file` after each."""

    def __init__(self, path: Path, target: Path, last_file: str):
        self.path, self._target, self._last_file = path, target, last_file
        self._uploaded: set[str] = set()

    def finish_file(self, file: Path) -> None:
        """Upload a complete file at once where the target is in a bucket, and delete it here, so that
        the local disk need not hold the whole directory. Optional: the rest is uploaded at the end."""
        if not is_remote(self._target):
            return
        with wrap_storage_errors(self._target):
            if not self._uploaded:
                (self._target / self._last_file).unlink(missing_ok=True)
            name = file.relative_to(self.path).as_posix()
            upload(file, self._target / name)
        self._uploaded.add(name)
        file.unlink()

    def publish(self) -> None:
        """Replace the target by what was written."""
        if is_remote(self._target):
            self._publish_to_bucket()
        elif self._target.exists():
            old = self._target.with_name(f".{self._target.name}.old-{os.getpid()}")
            self._target.rename(old)
            self.path.rename(self._target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            self.path.rename(self._target)

    def _publish_to_bucket(self) -> None:
        """A bucket has no rename: objects appear one by one, `last_file` after all others."""
        files = sorted(f for f in self.path.rglob("*") if f.is_file())
        for file in sorted(files, key=lambda f: f.name == self._last_file):
            if file.name == self._last_file:
                self._remove_stale_objects()
            self.finish_file(file)

    def _remove_stale_objects(self) -> None:
        """Delete what an earlier directory left at the target."""
        uploaded = {name.partition("/")[0] for name in self._uploaded}
        with wrap_storage_errors(self._target):
            for path in self._target.glob("*"):
                if path.name not in uploaded:
                    path.rmtree() if path.is_dir() else path.unlink()  # type: ignore[attr-defined]


@contextlib.contextmanager
def atomic_directory(target: Path, last_file: str) -> Iterator[AtomicDirectory]:
    """A directory that replaces `target` when the body ends; parents are created.

    last_file: the file that marks the directory as complete. In a bucket it is deleted first and
    uploaded last. On disk, after an error, nothing is left and `target` is unchanged.
    """
    temporary = None
    try:
        if is_remote(target):
            temporary = Path(tempfile.mkdtemp(prefix="minigpt4_jax-"))
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        temporary.chmod(0o755)
        directory = AtomicDirectory(temporary, target, last_file)
        yield directory
        directory.publish()
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
