"""Checkpoints of a run, by Orbax: what is trained, the optimizer's state, and where the data stood.

Orbax writes in the background and renames a finished checkpoint into place, so that a kill at any
moment leaves whole ones only. What a disk does to them later is found by the digests saved with
them: a damaged checkpoint is set aside, and the one before is used.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from minigpt4_jax.errors import UserError
from minigpt4_jax.parallel.multihost import is_connection_error
from minigpt4_jax.storage.paths import absolute_path, is_remote, wrap_storage_errors
from minigpt4_jax.training.train_step import Trainable


class Restored(NamedTuple):
    step: int  # updates done
    trainable: Trainable
    opt_state: Any
    extra: dict[str, Any]  # JSON values given to save
    damaged: tuple[str, ...]  # a line on each later checkpoint that was set aside


class Checkpoints:
    """The checkpoints in one folder, the latest `keep` of them."""

    def __init__(self, folder: Path, keep: int):
        import orbax.checkpoint as ocp  # heavy: only a run needs it

        self._ocp, self._folder, self._keep = ocp, folder, keep
        self._whole: int | None = None  # the last step that is known to be written
        logging.getLogger("absl").addFilter(_not_orbax)  # what goes wrong is said by an error here
        try:
            self._manager = ocp.CheckpointManager(
                absolute_path(folder),
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=ocp.checkpoint_managers.LatestN(keep),
                    step_format_fixed_length=8,
                    cleanup_tmp_directories=True,
                    # where a folder cannot be made, threads wait twenty minutes to hear that it is
                    async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
                    lightweight_initialize=True,  # reads none of them: a damaged one may be there
                ),
            )
            self._saved = self._manager.latest_step()
        except Exception as e:
            if not isinstance(e, OSError) and not is_remote(folder):
                raise
            raise self._failed("open", e) from e

    @property
    def latest(self) -> int | None:
        """The step of the last checkpoint that was begun or found; None if there is none."""
        return self._saved

    @property
    def kept(self) -> str:
        """What is left where the run cannot go on, as far as is known without looking."""
        if self._whole is None:
            return "no checkpoint was written yet"
        return f"the last good checkpoint, of step {self._whole}, is kept in {self._folder}"

    def save(self, step: int, trainable: Trainable, opt_state: Any, extra: dict[str, Any]) -> None:
        """Copy the arrays to the host and write them in the background. Waits for the checkpoint
        before, if that is still being written. UserError if that one failed."""
        self.wait()
        # Orbax may keep references while it writes; the next step donates these very buffers.
        state = jax.tree.map(np.array, {"trainable": trainable, "optimizer": opt_state})
        extra = _sealed({**extra, "digests": _digests(state)})
        args = self._ocp.args
        try:
            self._manager.save(
                step,
                args=args.Composite(state=args.StandardSave(state), extra=args.JsonSave(extra)),
            )
        except Exception as e:
            raise self._failed("write", e) from e
        self._saved = step

    def wait(self) -> None:
        """Return when nothing is being written any more. UserError if the writing failed."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as e:
            raise self._failed("write", e) from e
        self._whole = self._saved

    def restore(self, trainable: Trainable, opt_state: Any) -> Restored | None:
        """The latest whole checkpoint, with arrays like those given; None if there is none at all.
        Damaged ones behind it are renamed. UserError: none is whole, or they may not be read."""
        like = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype),
            {"trainable": trainable, "optimizer": opt_state},
        )
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state, extra = self._read(step, like)
            except _Damaged as e:
                damaged[step] = str(e)
                continue
            lines = tuple(self._set_aside(*found, step) for found in damaged.items())
            if damaged and jax.process_count() > 1:  # all must see the same steps from here on
                multihost_utils.sync_global_devices("damaged checkpoints are set aside")
            self._manager.reload()
            for old in sorted(self._manager.all_steps())[: -self._keep]:
                self._manager.delete(
                    old
                )  # which a kill has prevented, and no later save may follow
            self._saved = self._whole = step
            return Restored(step, state["trainable"], state["optimizer"], extra, lines)
        if not damaged:
            return None
        each = "; ".join(f"{_name(step)}: {why}" for step, why in damaged.items())
        raise UserError(
            f"every checkpoint in {self._folder} is damaged ({each}): remove that folder to begin "
            "the run anew, or choose another --workdir"
        )

    def _read(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        args = self._ocp.args
        try:
            found = self._manager.restore(
                step,
                args=args.Composite(state=args.StandardRestore(like), extra=args.JsonRestore()),
            )
            extra = _unsealed(found["extra"])
            expected = extra.pop("digests")
        except Exception as e:
            if isinstance(e, PermissionError) or "PERMISSION_DENIED" in str(e):
                path = self._folder / _name(step)
                raise UserError(f"checkpoint {path} may not be read: {_one_line(e)}") from e
            raise _Damaged(_one_line(e)) from e
        digests = _digests(found["state"])
        changed = sorted(
            n for n in digests.keys() | expected.keys() if digests.get(n) != expected.get(n)
        )
        if changed:
            raise _Damaged(f"{len(changed)} arrays are not as saved, {changed[0]} first")
        return found["state"], extra

    def _set_aside(self, step: int, why: str, used: int) -> str:
        """Rename a damaged checkpoint; the line that says so."""
        path = self._folder / _name(step)
        aside = path.with_name(f"damaged-{path.name}")
        for n in itertools.count(2):
            if not aside.exists():
                break
            aside = path.with_name(f"damaged-{path.name}-{n}")
        try:
            with wrap_storage_errors(path):
                if jax.process_index() == 0:
                    path.rename(aside)
        except OSError as e:
            raise self._failed("rename", e) from e
        return (
            f"checkpoint {path} is damaged ({why}): kept as {aside.name}; continuing from the one "
            f"before, of step {used}"
        )

    def close(self) -> None:
        """Wait for the last write and end Orbax's threads; never raises."""
        with contextlib.suppress(Exception):  # reported by save or wait already
            self._manager.close()

    def _failed(self, what: str, e: Exception) -> Exception:
        if is_connection_error(e):  # it is not the disk that failed
            return RuntimeError(str(e))
        if jax.process_index() == 0 and not is_remote(self._folder):
            for half_written in self._folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(half_written, ignore_errors=True)
        causes = [e, e.__cause__, e.__context__]
        numbers = {c.errno for c in causes if isinstance(c, OSError)}
        full = numbers & {errno.ENOSPC, errno.EDQUOT} or "No space left" in str(e)
        cause = "the disk is full" if full else _one_line(e)
        good = self._good()
        kept = "" if good is None else f"; the last good checkpoint is step {good}"
        do = "Make room" if full else "See that the folder can be reached and written"
        return UserError(
            f"cannot {what} checkpoints in {self._folder}: {cause}{kept}. {do} and start the same "
            "command again"
        )

    def _good(self) -> int | None:
        """The latest step that is there, whole."""
        try:
            with wrap_storage_errors(self._folder):
                return max(saved_steps(self._folder), default=None)
        except OSError:
            return self._whole


def saved_steps(folder: Path) -> list[int]:
    """The steps of the whole checkpoints; those in a bucket, where nothing can be renamed at once,
    have a file that says so. OSError where that cannot be seen."""
    found = [p for p in folder.glob("*") if p.name.isdigit()]
    if is_remote(folder):
        return [int(p.name) for p in found if (p / "commit_success.txt").exists()]
    return [int(p.name) for p in found if p.is_dir()]


class _Damaged(Exception):
    """Why a checkpoint cannot be used."""


def _name(step: int) -> str:
    return f"{step:08d}"


def _digests(state: Any) -> dict[str, str]:
    """Name of every array -> digest of its type, shape and bytes."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    with ThreadPoolExecutor() as pool:  # hashing leaves Python's lock alone
        return dict(zip(names, pool.map(_digest, [leaf for _, leaf in leaves]), strict=True))


def _digest(leaf: Any) -> str:
    array = np.ascontiguousarray(leaf)
    digest = hashlib.blake2b(f"{array.dtype} {np.shape(leaf)}".encode(), digest_size=16)
    digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _sealed(values: dict[str, Any]) -> dict[str, Any]:
    """JSON values with a digest of themselves."""
    return {"values": values, "digest": _json_digest(values)}


def _unsealed(sealed: dict[str, Any]) -> dict[str, Any]:
    if _json_digest(sealed["values"]) != sealed["digest"]:
        raise _Damaged("its JSON part is not as saved")
    return dict(sealed["values"])


def _json_digest(values: Any) -> str:
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()


def _not_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def _one_line(e: Exception) -> str:
    return (" ".join(str(e).split()) or type(e).__name__)[:200]
