"""Checkpoints of a run, written by Orbax: trainable parameters, optimizer state, position in the data.

Orbax writes in the background and renames a finished checkpoint into place, so a kill at any moment
leaves only complete ones. Checksums saved with them detect what happens to them later: a damaged
checkpoint is renamed, and the one before it is used.

With several processes, all of them read the checkpoint that process 0 chooses, because directory listings
of a network file system may be out of date; a checkpoint is damaged if it is for one of them.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from minigpt4_jax.errors import UserError
from minigpt4_jax.parallel.multihost import (
    all_gather_json,
    is_connection_error,
    is_main_process,
    is_multiprocess,
    raise_together,
)
from minigpt4_jax.storage.paths import (
    absolute_path,
    is_remote,
    make_directory,
    wait_until_visible,
    wrap_storage_errors,
)
from minigpt4_jax.training.train_step import Trainable
from minigpt4_jax.utils.text import one_line


class Restored(NamedTuple):
    """A checkpoint that was read."""

    step: int  # updates done
    trainable: Trainable
    opt_state: Any
    extra: dict[str, Any]  # the JSON values given to save
    messages: tuple[str, ...]  # one for each later checkpoint that was found damaged


class Checkpoints:
    """The checkpoints in one directory, of which the latest `keep` are kept."""

    def __init__(self, directory: Path, keep: int):
        import orbax.checkpoint as ocp  # slow to import, and only a run needs it

        self._ocp, self._directory, self._keep = ocp, directory, keep
        self._last_complete: int | None = None  # the last step known to be written
        # Orbax logs failures that are reported as errors here
        logging.getLogger("absl").addFilter(_is_not_from_orbax)
        self._manager = self._open_manager()
        self._last_started: int | None = max(self._steps(), default=None)

    def _steps(self) -> list[int]:
        """The steps that Orbax counts, in order."""
        return sorted(int(step) for step in self._manager.all_steps())

    def _open_manager(self) -> Any:
        """Orbax's manager, whose steps are those that process 0 finds. Collective."""
        ocp = self._ocp
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(self._keep),
            step_format_fixed_length=8,
            cleanup_tmp_directories=True,
            # otherwise threads wait twenty minutes for a directory that cannot be created
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            lightweight_initialize=True,  # reads no checkpoint: one may be damaged
            single_host_load_and_broadcast=is_multiprocess(),
        )
        try:
            self._make_directory()
            return ocp.CheckpointManager(absolute_path(self._directory), options=options)
        except Exception as e:
            if not isinstance(e, OSError) and not is_remote(self._directory):
                raise
            raise self._error("open", e) from e

    def _make_directory(self) -> None:
        """Create the directory before Orbax looks for it in every process. Collective."""
        if is_multiprocess() and not is_remote(self._directory):
            with raise_together():
                if is_main_process():
                    try:
                        make_directory(self._directory)
                    except OSError as e:
                        raise self._error("open", e) from e
            with raise_together():
                if not wait_until_visible(self._directory):
                    raise UserError(f"{self._directory} is not visible, though process 0 made it")

    @property
    def latest_step(self) -> int | None:
        """The step of the last checkpoint that was started or found; None if there is none."""
        return self._last_started

    def describe_saved_state(self) -> str:
        """What remains if the run cannot go on, as far as known without reading the directory."""
        return describe_checkpoint(self._last_complete, self._directory)

    def save(self, step: int, trainable: Trainable, opt_state: Any, extra: dict[str, Any]) -> None:
        """Copy the arrays to the host and write them in the background. Waits for the checkpoint
        before, if it is still being written. UserError: that one failed.

        extra: JSON values.
        """
        self.wait()
        # A copy, since Orbax may keep references while it writes and the next step donates these buffers.
        state = jax.tree.map(np.array, {"trainable": trainable, "optimizer": opt_state})
        extra = _add_checksum({**extra, "digests": _array_checksums(state)})
        args = self._ocp.args
        try:
            self._manager.save(
                step,
                args=args.Composite(state=args.StandardSave(state), extra=args.JsonSave(extra)),
            )
        except Exception as e:
            raise self._error("write", e) from e
        self._last_started = step

    def wait(self) -> None:
        """Wait until nothing is being written. UserError: the writing failed."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as e:
            raise self._error("write", e) from e
        self._last_complete = self._last_started

    def restore(
        self, trainable: Trainable, opt_state: Any, advice: str = "remove that directory"
    ) -> Restored | None:
        """Read the latest undamaged checkpoint; None if there is no checkpoint at all. Later, damaged
        ones are renamed. Collective with several processes.

        trainable, opt_state: arrays of the expected shapes and types.
        advice: what to do if all checkpoints are damaged.
        UserError: all checkpoints are damaged, or they cannot be read (permissions).
        """
        target = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype),
            {"trainable": trainable, "optimizer": opt_state},
        )
        damage: dict[int, str] = {}  # step -> what is wrong with its checkpoint
        steps: list[int] = all_gather_json(self._steps())[0]
        for step in reversed(steps):
            try:
                state, extra = self._read_together(step, target)
            except _DamagedError as e:
                damage[step] = str(e)
                continue
            messages = tuple(self._rename_damaged(*item, step) for item in damage.items())
            if damage:  # Orbax must no longer count them
                if is_multiprocess():
                    multihost_utils.sync_global_devices("damaged checkpoints are renamed")
                self._manager.close()
                self._manager = self._open_manager()
            # a kill may have prevented these deletions, and there may be no later save to do them
            for old_step in self._steps()[: -self._keep]:
                self._manager.delete(old_step)
            self._last_started = self._last_complete = step
            return Restored(step, state["trainable"], state["optimizer"], extra, messages)
        if not damage:
            return None
        details = "; ".join(f"{_directory_name(step)}: {why}" for step, why in damage.items())
        raise UserError(f"every checkpoint in {self._directory} is damaged ({details}): {advice}")

    def _read_together(self, step: int, target: Any) -> tuple[Any, dict[str, Any]]:
        """`_read` in every process. _DamagedError: in one of them it failed, or what was read differs."""
        result, problem = None, None
        with raise_together():
            path = self._directory / _directory_name(step)
            if is_multiprocess() and not wait_until_visible(path):
                raise UserError(
                    f"checkpoint {path} is not visible, though process 0 finds it: check that all hosts "
                    "share this directory"
                )
            try:
                result = self._read(step, target)
            except _DamagedError as e:
                problem = str(e)
        checksum = result and _json_checksum(result[1])
        reports: list[dict[str, Any]] = all_gather_json({"problem": problem, "checksum": checksum})
        for process, report in enumerate(reports):
            if report["problem"] is not None:
                where = f"process {process}: " if is_multiprocess() else ""
                raise _DamagedError(where + report["problem"])
            if report["checksum"] != reports[0]["checksum"]:
                raise _DamagedError(f"process {process} reads another content than process 0")
        assert result is not None
        state, extra = result
        return state, {name: value for name, value in extra.items() if name != "digests"}

    def _read(self, step: int, target: Any) -> tuple[Any, dict[str, Any]]:
        """-> (state, extra with the checksums of the arrays). _DamagedError: it cannot be read or differs
        from what was saved. Not collective."""
        args = self._ocp.args
        try:
            with self._open_reader() as reader:
                restored = reader.restore(
                    step,
                    args=args.Composite(
                        state=args.StandardRestore(target), extra=args.JsonRestore()
                    ),
                )
            extra = _verify_checksum(restored["extra"])
            expected: dict[str, str] = extra["digests"]
        except Exception as e:
            if isinstance(e, PermissionError) or "PERMISSION_DENIED" in str(e):
                path = self._directory / _directory_name(step)
                raise UserError(f"checkpoint {path} cannot be read: {one_line(e)}") from e
            raise _DamagedError(one_line(e)) from e
        actual = _array_checksums(restored["state"])
        changed = sorted(
            name
            for name in actual.keys() | expected.keys()
            if actual.get(name) != expected.get(name)
        )
        if changed:
            raise _DamagedError(f"{len(changed)} arrays are not as saved, {changed[0]} first")
        return restored["state"], extra

    @contextlib.contextmanager
    def _open_reader(self) -> Iterator[Any]:
        """A manager that reads without waiting for other processes: reading may fail in one of them."""
        if not is_multiprocess():
            yield self._manager
            return
        ocp, process = self._ocp, jax.process_index()
        options = ocp.CheckpointManagerOptions(
            read_only=True,
            step_format_fixed_length=8,
            lightweight_initialize=True,
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=process,
                active_processes={process},
                barrier_sync_key_prefix=f"reader{process}",
            ),
        )
        with ocp.CheckpointManager(absolute_path(self._directory), options=options) as reader:
            yield reader

    def _rename_damaged(self, step: int, why: str, restored_step: int) -> str:
        """Rename a damaged checkpoint; returns the message about it. Collective."""
        path = self._directory / _directory_name(step)
        new_path = path.with_name(f"damaged-{path.name}")
        for number in itertools.count(2):
            if not new_path.exists():
                break
            new_path = path.with_name(f"damaged-{path.name}-{number}")
        # Process 0's name is everybody's: it may rename before another process has looked.
        new_path = path.with_name(all_gather_json(new_path.name)[0])
        with raise_together():  # the others must not wait for a process 0 that has ended
            try:
                with wrap_storage_errors(path):
                    if is_main_process():
                        path.rename(new_path)
            except OSError as e:
                raise self._error("rename", e) from e
        return (
            f"checkpoint {path} is damaged ({why}): kept as {new_path.name}; continuing from the one "
            f"before, of step {restored_step}"
        )

    def close(self) -> None:
        """Wait for the last write and end Orbax's threads. Never raises."""
        with contextlib.suppress(Exception):  # save or wait has reported it
            self._manager.close()

    def _error(self, action: str, e: Exception) -> Exception:
        """The error to raise for one of Orbax's."""
        if is_connection_error(e):  # not the disk's fault: handled by detect_lost_peer
            return RuntimeError(str(e))
        if is_main_process() and not is_remote(self._directory):
            for incomplete in self._directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(incomplete, ignore_errors=True)
        disk_full = _is_disk_full(e)
        cause = "the disk is full" if disk_full else one_line(e)
        last = self._find_last_complete()
        saved = "" if last is None else f"; the last good checkpoint is step {last}"
        advice = "Make room" if disk_full else "Check that the directory can be reached and written"
        return UserError(
            f"cannot {action} checkpoints in {self._directory}: {cause}{saved}. {advice} and start the "
            "same command again"
        )

    def _find_last_complete(self) -> int | None:
        try:
            with wrap_storage_errors(self._directory):
                return max(saved_steps(self._directory), default=None)
        except OSError:
            return self._last_complete


def saved_steps(directory: Path) -> list[int]:
    """The steps of the complete checkpoints. OSError: the directory cannot be read.

    In a bucket, where nothing can be renamed atomically, a complete checkpoint has a marker file.
    """
    paths = [p for p in directory.glob("*") if p.name.isdigit()]
    if is_remote(directory):
        return [int(p.name) for p in paths if (p / "commit_success.txt").exists()]
    return [int(p.name) for p in paths if p.is_dir()]


def describe_checkpoint(step: int | None, directory: Path) -> str:
    """What a run has saved, for messages. step: of the last good checkpoint."""
    if step is None:
        return "no checkpoint was written yet"
    return f"the last good checkpoint, of step {step}, is kept in {directory}"


class _DamagedError(Exception):
    """Why a checkpoint cannot be used."""


def _directory_name(step: int) -> str:
    return f"{step:08d}"


def _is_disk_full(e: Exception) -> bool:
    causes = (e, e.__cause__, e.__context__)
    numbers = {cause.errno for cause in causes if isinstance(cause, OSError)}
    return bool(numbers & {errno.ENOSPC, errno.EDQUOT}) or "No space left" in str(e)


def _array_checksums(state: Any) -> dict[str, str]:
    """Dotted path of every array -> checksum of its type, shape and bytes."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    arrays = [array for _, array in leaves]
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        return dict(zip(names, pool.map(_array_checksum, arrays), strict=True))


def _array_checksum(leaf: Any) -> str:
    array = np.ascontiguousarray(leaf)
    digest = hashlib.blake2b(f"{array.dtype} {np.shape(leaf)}".encode(), digest_size=16)
    digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _add_checksum(values: dict[str, Any]) -> dict[str, Any]:
    """JSON values with their own checksum."""
    return {"values": values, "digest": _json_checksum(values)}


def _verify_checksum(document: dict[str, Any]) -> dict[str, Any]:
    """The values of `_add_checksum`. _DamagedError: they have changed."""
    if _json_checksum(document["values"]) != document["digest"]:
        raise _DamagedError("its JSON part is not as saved")
    return dict(document["values"])


def _json_checksum(values: Any) -> str:
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()


def _is_not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname
