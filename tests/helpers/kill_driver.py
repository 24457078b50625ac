"""A driver that kills training processes at random moments and looks at what the runs end with.

A process that imports everything once is forked for each life of a run, and compiled programs come
from JAX's cache, so that a life starts in a second. A life is an ordinary `train` in a process of
its own; SIGKILL ends it, in its start or between two steps as often as in a checkpoint.
"""

import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.numpy import load_file

from helpers import tiny

STEPS = 40
STARTING = 0.2  # share of the lives that are killed so soon that many are only starting
LONGEST = 1.0  # seconds that a life has at most, these from their beginning, others from a step on
IMPORTED = [
    "minigpt4_jax.training.trainer",
    "orbax.checkpoint",
    "tensorboardX",
    "matplotlib.pyplot",
]


class Outcome(NamedTuple):
    """What a finished run left."""

    tensors: dict[str, bytes]
    records: list[dict]  # of metrics.jsonl, without the speed
    batches: dict[int, set[str]]  # number of a batch -> digests of what was given under it


class Count(NamedTuple):
    """Kills, and what they hit."""

    all: int = 0
    starting: int = 0
    writing: int = 0  # while a checkpoint was being written


def values(home: Path) -> dict[str, Any]:
    """A run whose every step is saved, so that much of its time is the writing of checkpoints."""
    prompts = ("<Img><ImageHere></Img> What?", "<Img><ImageHere></Img> Where is it?")
    return {
        "model": str(tiny.write_model(home / "model")),
        "data": {"path": (str(tiny.write_data(home / "data", rows=61)),), "prompts": prompts},
        "steps": STEPS, "batch_size": 2, "init_lr": 0.01, "warmup_steps": 2, "dtype": "float32",
        "freeze_qformer": False, "save_every": 1, "keep": 2, "log_every": 1,
    }  # fmt: skip


def live(given: dict[str, Any], workdir: Path, output: Path) -> None:
    """One life of the run in `workdir`; the process's output goes to a file."""
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import jax

    from minigpt4_jax.data.loader import Loader
    from minigpt4_jax.training import trainer

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    journal = os.open(journal_of(workdir), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    following = Loader.__next__

    def noted(loader: Loader) -> Any:
        number, batch = loader.state()["step"], following(loader)
        digest = hashlib.sha256(b"".join(a.tobytes() for a in batch if a is not None)).hexdigest()[
            :16
        ]
        os.write(journal, f"{number} {digest}\n".encode())
        return batch

    Loader.__next__ = noted
    steps = os.open(steps_of(workdir), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        trainer.train(given, workdir, on_metrics=lambda record: os.write(steps, b"."))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


def journal_of(workdir: Path) -> Path:
    return workdir.with_suffix(".batches")


def steps_of(workdir: Path) -> Path:
    """A file as long as there were steps in all lives."""
    return workdir.with_suffix(".steps")


def outcome(workdir: Path) -> Outcome:
    """What is compared. AssertionError when the run left something that it should not."""
    tensors: dict[str, bytes] = {}
    for path in sorted((workdir / "model").glob("*.safetensors")):
        tensors |= {name: array.tobytes() for name, array in load_file(path).items()}
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("examples_per_second", None)
    batches: dict[int, set[str]] = {}
    for line in journal_of(workdir).read_text().splitlines():
        number, digest = line.split()
        batches.setdefault(int(number), set()).add(digest)
    kept = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    assert kept == [f"{STEPS - 1:08d}", f"{STEPS:08d}"], kept
    return Outcome(tensors, records, batches)


class Driver:
    """Runs with the same configuration in one folder, with and without kills."""

    def __init__(self, home: Path, seed: int = 0):
        self._home, self._values, self._random = home, values(home), random.Random(seed)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(IMPORTED)
        self.count = Count()

    def undisturbed(self) -> Outcome:
        """The run without a kill."""
        workdir = self._home / "undisturbed"
        self._end(self._begin(workdir), workdir)
        return outcome(workdir)

    def killed(self, name: str, kills: int) -> Outcome:
        """A run that is killed so often, if it does not end before, and then left to end."""
        workdir = self._home / name
        last = self.count.all + kills
        while self.count.all < last:
            process = self._begin(workdir)
            if not self._kill(process, workdir):
                return outcome(workdir)
        self._end(self._begin(workdir), workdir)
        return outcome(workdir)

    def _begin(self, workdir: Path) -> Any:
        args = (self._values, workdir, workdir.with_suffix(".log"))
        process = self._context.Process(target=live, args=args)
        process.start()
        return process

    def _end(self, process: Any, workdir: Path) -> None:
        process.join()
        text = workdir.with_suffix(".log").read_text()
        assert process.exitcode == 0, f"exit code {process.exitcode}: {text[-3000:]}"
        assert "damaged" not in text, text[-3000:]

    def _kill(self, process: Any, workdir: Path) -> bool:
        """Kill a life at a random moment; False when it had ended before."""
        seen, unfinished = self._steps(workdir), self._unfinished(workdir)
        if self._random.random() > STARTING:
            while self._steps(workdir) == seen and process.exitcode is None:
                time.sleep(0.01)
        process.join(self._random.uniform(0, LONGEST))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        if process.exitcode != -signal.SIGKILL:
            self._end(process, workdir)
            return False
        begun = self._steps(workdir) > seen
        written = bool(self._unfinished(workdir) - unfinished)
        self.count = Count(
            self.count.all + 1, self.count.starting + (not begun), self.count.writing + written
        )
        return True

    @staticmethod
    def _steps(workdir: Path) -> int:
        path = steps_of(workdir)
        return path.stat().st_size if path.exists() else 0

    @staticmethod
    def _unfinished(workdir: Path) -> set[tuple[str, int]]:
        """Checkpoints that are being written, or were when a process was killed."""
        found = (workdir / "checkpoints").glob("*orbax-checkpoint-tmp*")
        return {(path.name, path.stat().st_ino) for path in found}
