"""Run by hosts.py in every one of several processes:
`process_runs.py FOLDER ADDRESS COUNT INDEX`, where the test has put jobs.json, a list of runs, and what
they name. Writes FOLDER/INDEX-of-COUNT.json."""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from minigpt4_jax.parallel import distributed

ROWS: dict[
    str, list[list[str]]
] = {}  # name of a run -> of each step, digests of the rows given here


def note_rows(name: str) -> None:
    """Keep what the loader of the run gives to this process."""
    from minigpt4_jax.data.loader import Loader

    following = Loader.__dict__.get("untouched", Loader.__next__)
    Loader.untouched = following  # type: ignore[attr-defined]

    def noted(loader: Any) -> Any:
        batch = following(loader)
        if loader.steps is None and batch.segments is None:  # no held-out rows, no packed ones
            fields = zip(*(a for a in batch if a is not None), strict=True)
            digests = [hashlib.sha256(b"".join(a.tobytes() for a in row)) for row in fields]
            ROWS.setdefault(name, []).append([d.hexdigest()[:16] for d in digests])
        return batch

    Loader.__next__ = noted  # type: ignore[method-assign]


def train(name: str, values: dict, workdir: str, stop: list[int] | None) -> None:
    """stop: (process, step) of a SIGTERM."""
    import jax

    from minigpt4_jax.training.preemption import Stopped
    from minigpt4_jax.training.trainer import train

    def act(record: dict) -> None:
        if stop and [jax.process_index(), record["step"]] == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    note_rows(name)
    try:
        train(values, workdir, on_metrics=act)
        assert not stop
    except Stopped as e:
        assert stop and e.code == 143


def answers(model: str, mesh: str | None, images: list[str]) -> dict:
    from minigpt4_jax import load

    m = load(model, "float32", mesh=mesh)
    prompts = ["<Img><ImageHere></Img> What is this?"] * len(images)
    nll, _ = m.score(images, prompts, ["red", "green", "blue blue"])
    return {"text": m.generate(images, prompts, max_new_tokens=5), "nll": nll.tolist()}


if __name__ == "__main__":
    folder, address, count, index = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
    if count > 1:
        distributed.initialize(distributed.ProcessOptions(address, count, index, 60), 30)
    jobs = json.loads((folder / "jobs.json").read_text())
    for job in jobs["runs"]:
        train(**job)
    found = answers(**jobs["answers"]) if "answers" in jobs else {}
    (folder / f"{index}-of-{count}.json").write_text(json.dumps({"rows": ROWS, "answers": found}))
