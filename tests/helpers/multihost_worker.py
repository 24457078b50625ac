"""Run by multihost_harness in each of several processes: `multihost_worker.py FOLDER ADDRESS COUNT INDEX`.

Reads the jobs from FOLDER/jobs.json: {"runs": [arguments of `train`], "answers": arguments of
`answer`, "checkpoints": [arguments of `restore`]}. Writes the results to FOLDER/INDEX-of-COUNT.json, and
what Python prints to FOLDER/INDEX-of-COUNT.log: the Gloo library prints to the same file descriptor.
"""

import contextlib
import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from minigpt4_jax.parallel import distributed

ROWS: dict[str, list[list[str]]] = {}  # run -> for each step, digests of this process's rows


def record_rows(name: str) -> None:
    """Record in ROWS what the loader of the run gives to this process."""
    from minigpt4_jax.data.loader import Loader

    original = Loader.__dict__.get("original_next", Loader.__next__)
    Loader.original_next = original  # type: ignore[attr-defined]

    def recorded_next(loader: Any) -> Any:
        batch = original(loader)
        if loader.steps is None and batch.segments is None:  # neither validation nor packed rows
            fields = zip(*(a for a in batch if a is not None), strict=True)
            digests = [hashlib.sha256(b"".join(a.tobytes() for a in row)) for row in fields]
            ROWS.setdefault(name, []).append([d.hexdigest()[:16] for d in digests])
        return batch

    Loader.__next__ = recorded_next  # type: ignore[method-assign]


def train(name: str, values: dict, workdir: str, stop: list[int] | None) -> None:
    """stop: (process, step) at which to send SIGTERM."""
    import jax

    from minigpt4_jax.training.preemption import Stopped
    from minigpt4_jax.training.trainer import train

    def send_signal(record: dict) -> None:
        if stop and [jax.process_index(), record["step"]] == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    record_rows(name)
    try:
        train(values, workdir, on_metrics=send_signal)
        assert not stop
    except Stopped as e:
        assert stop and e.code == 143


def answer(model: str, mesh: str | None, images: list[str]) -> dict:
    from minigpt4_jax import load

    m = load(model, "float32", mesh=mesh)
    prompts = ["<Img><ImageHere></Img> What is this?"] * len(images)
    nll, _ = m.score(images, prompts, ["red", "green", "blue blue"])
    return {"text": m.generate(images, prompts, max_new_tokens=5), "nll": nll.tolist()}


def restore(directory: str, fault: str | None, faulty_process: int) -> dict:
    """Save steps 3, 6 and 9, restore with a fault in one process, and save step 12.

    fault: "stale", the listing lacks the last checkpoint; "ahead", it has one more that is gone;
    "damaged", the arrays of the last one are read wrongly; "fixed", they are, and it cannot be renamed;
    "invisible", the last one does not appear.
    """
    import jax
    import numpy as np
    import pytest

    from minigpt4_jax.errors import UserError
    from minigpt4_jax.training import checkpoints

    def state(step: int) -> tuple:
        return {"projection.weight": np.full((3, 4), step, np.float32)}, {"count": np.int32(step)}

    path = Path(directory)
    c = checkpoints.Checkpoints(path, keep=3)
    for step in (3, 6, 9):
        c.save(step, *state(step), {"step": step})
    c.close()
    with pytest.MonkeyPatch.context() as patch:
        if jax.process_index() == faulty_process:
            inject(patch, fault)
        c = checkpoints.Checkpoints(path, keep=3)
        try:
            restored = c.restore(*state(0))
        except UserError as e:
            c.close()
            return {"error": str(e)}
        assert restored is not None
        result = {
            "step": restored.step,
            "value": float(np.asarray(restored.trainable["projection.weight"])[0, 0]),
            "extra": restored.extra,
            "messages": list(restored.messages),
        }
        c.save(12, *state(12), {"step": 12})
        c.wait()
        c.close()
    return result


def inject(patch: Any, fault: str | None) -> None:
    from orbax.checkpoint._src.path import step as orbax_steps

    from minigpt4_jax.training import checkpoints

    if fault in ("stale", "ahead"):
        name_format = orbax_steps._StandardNameFormat
        listed = name_format._glob_step_paths

        def stale_listing(self: Any, base_path: Any) -> list:
            paths = listed(self, base_path)
            if fault == "stale":
                return [p for p in paths if p.name != "00000009"]
            return [*paths, base_path / "00000013"]

        patch.setattr(name_format, "_glob_step_paths", stale_listing)
    elif fault in ("damaged", "fixed"):
        checksum = checkpoints._array_checksum
        patch.setattr(
            checkpoints,
            "_array_checksum",
            lambda a: "wrong" if np_max(a) == 9 else checksum(a),
        )
        if fault == "fixed":
            patch.setattr(Path, "rename", refuse_rename)
    elif fault == "invisible":
        patch.setattr(checkpoints, "wait_until_visible", lambda path: not path.name.endswith("9"))


def refuse_rename(path: Path, target: Path) -> None:
    raise PermissionError(13, "Permission denied")


def np_max(array: Any) -> float:
    import numpy as np

    return float(np.max(np.asarray(array)))


def main(folder: Path, address: str, count: int, index: int) -> None:
    if count > 1:
        distributed.initialize(distributed.ProcessOptions(address, count, index, 60), 30)
    jobs = json.loads((folder / "jobs.json").read_text())
    for job in jobs.get("runs", []):
        train(**job)
    answers = answer(**jobs["answers"]) if "answers" in jobs else {}
    restored = [restore(**job) for job in jobs.get("checkpoints", [])]
    results = {"rows": ROWS, "answers": answers, "checkpoints": restored}
    (folder / f"{index}-of-{count}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    folder, address, count, index = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
    with (folder / f"{index}-of-{count}.log").open("w") as log, contextlib.redirect_stdout(log):
        main(folder, address, count, index)
