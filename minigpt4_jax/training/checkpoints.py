"""Checkpoints of a run, by Orbax: what is trained, the optimizer's state, and where the data stood.

Orbax writes in the background and renames a finished checkpoint into place, so that a kill at any
moment leaves whole ones only.
"""

import contextlib
import errno
import logging
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from minigpt4_jax.errors import UserError
from minigpt4_jax.training.step import Trainable


class Restored(NamedTuple):
    step: int  # updates done
    trainable: Trainable
    opt_state: Any
    extra: dict[str, Any]  # JSON values given to save


class Checkpoints:
    """The checkpoints in one folder, the latest `keep` of them."""

    def __init__(self, folder: Path, keep: int):
        import orbax.checkpoint as ocp  # heavy: only a run needs it

        self._ocp, self._folder = ocp, folder
        logging.getLogger("absl").addFilter(_not_orbax)  # what goes wrong is said by an error here
        try:
            self._manager = ocp.CheckpointManager(
                folder.resolve(),
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=ocp.checkpoint_managers.LatestN(keep),
                    step_format_fixed_length=8,
                    cleanup_tmp_directories=True,
                ),
            )
        except OSError as e:
            raise self._failed("open", e) from e
        self._saved = self._manager.latest_step()

    @property
    def latest(self) -> int | None:
        """The step of the last checkpoint that was begun or found; None if there is none."""
        return self._saved

    def save(self, step: int, trainable: Trainable, opt_state: Any, extra: dict[str, Any]) -> None:
        """Copy the arrays to the host and write them in the background. Waits for the checkpoint
        before, if that is still being written. UserError if that one failed."""
        self.wait()
        # Orbax may keep references while it writes; the next step donates these very buffers.
        state = jax.tree.map(np.array, {"trainable": trainable, "optimizer": opt_state})
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

    def restore(self, trainable: Trainable, opt_state: Any) -> Restored | None:
        """The latest checkpoint, with arrays like those given; None if there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        like = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype),
            {"trainable": trainable, "optimizer": opt_state},
        )
        args = self._ocp.args
        try:
            found = self._manager.restore(
                step,
                args=args.Composite(state=args.StandardRestore(like), extra=args.JsonRestore()),
            )
        except Exception as e:
            raise UserError(
                f"checkpoint {self._folder / f'{step:08d}'} cannot be read ({_one_line(e)}): "
                "remove that folder to continue from the one before, or choose another --workdir"
            ) from e
        state = found["state"]
        return Restored(step, state["trainable"], state["optimizer"], found["extra"])

    def close(self) -> None:
        """Wait for the last write and end Orbax's threads; never raises."""
        with contextlib.suppress(Exception):  # reported by save or wait already
            self._manager.close()

    def _failed(self, what: str, e: Exception) -> UserError:
        for half_written in self._folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(half_written, ignore_errors=True)
        causes = [e, e.__cause__, e.__context__]
        numbers = {c.errno for c in causes if isinstance(c, OSError)}
        full = numbers & {errno.ENOSPC, errno.EDQUOT} or "No space left" in str(e)
        cause = "the disk is full" if full else _one_line(e)
        kept = "" if self._good is None else f"; the last good checkpoint is step {self._good}"
        return UserError(
            f"cannot {what} checkpoints in {self._folder}: {cause}{kept}. "
            "Make room and start the same command again"
        )

    @property
    def _good(self) -> int | None:
        """The latest step that is on disk, whole."""
        steps = sorted(
            int(p.name) for p in self._folder.glob("*") if p.name.isdigit() and p.is_dir()
        )
        return steps[-1] if steps else None


def _not_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def _one_line(e: Exception) -> str:
    return (" ".join(str(e).split()) or type(e).__name__)[:200]
