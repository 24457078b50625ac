"""storage.atomic: files and directories appear complete or not at all."""

import errno
import os

import pytest

from minigpt4_jax.storage.atomic import (
    atomic_directory,
    atomic_file,
    write_error,
    write_text_atomically,
)

pytestmark = pytest.mark.smoke


def test_file_replaces_an_older_one(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_file(path) as temporary:
        assert temporary.suffix == ".txt" and path.read_text() == "old"
        temporary.write_text("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


def test_failed_write_changes_nothing(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise OSError("full")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_file_permissions_follow_the_umask(tmp_path):
    plain, atomic = tmp_path / "plain", tmp_path / "atomic"
    plain.write_text("x")
    write_text_atomically(atomic, "x")
    assert atomic.stat().st_mode == plain.stat().st_mode


def test_text_is_utf8(tmp_path):
    path = tmp_path / "a.txt"
    write_text_atomically(path, "Füße")
    assert path.read_bytes() == "Füße".encode()
    with pytest.raises(UnicodeEncodeError):
        write_text_atomically(path, "\udcff")
    write_text_atomically(path, "\udcff", errors="backslashreplace")
    assert path.read_bytes() == b"\\udcff"


def test_directory_replaces_an_older_one(tmp_path):
    target = tmp_path / "parent" / "d"
    target.mkdir(parents=True)
    (target / "old").write_text("")
    with atomic_directory(target, "last") as directory:
        (directory.path / "new").write_text("")
        directory.finish_file(directory.path / "new")
        assert os.listdir(target) == ["old"]
    assert os.listdir(target) == ["new"] and os.listdir(target.parent) == ["d"]


def test_failed_directory_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="half"), atomic_directory(tmp_path / "d", "") as directory:
        (directory.path / "file").write_text("")
        raise ValueError("half")
    assert not os.listdir(tmp_path)


def test_write_error_names_path_and_cause():
    full = write_error("x.pth", OSError(errno.ENOSPC, "No space left on device"), "nothing written")
    assert str(full) == "cannot write x.pth: the disk is full; nothing written"
    denied = write_error("x.pth", PermissionError(errno.EACCES, "Permission denied"))
    assert str(denied) == "cannot write x.pth: Permission denied"
    assert str(write_error("x.png", ValueError("no encoder"))) == "cannot write x.png: no encoder"
