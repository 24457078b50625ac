"""Kills training processes at random moments, restarts them, and compares what the runs leave.

A fork server imports everything once, and compiled programs come from JAX's cache, so a process starts
in seconds. Each process is an ordinary `train`. SIGKILL ends it before its first step, between two
steps, or while it writes a checkpoint.
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
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.numpy import load_file

from helpers import tiny

STEPS = 20
EARLY = 4  # every fourth process is killed before its first step
MAX_SECONDS = 1.0  # until a kill: from the start of the process, or else from its first step
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
    batches: dict[int, set[str]]  # number of a batch -> digests of all batches with that number


class KillCount(NamedTuple):
    """Kills so far, and what they hit."""

    all: int = 0
    starting: int = 0  # before the first step of a process
    writing: int = 0  # while a checkpoint was being written


def config_values(home: Path) -> dict[str, Any]:
    """A run that saves after every step, so that it spends much of its time writing checkpoints."""
    prompts = ("<Img><ImageHere></Img> What?", "<Img><ImageHere></Img> Where is it?")
    return {
        "model": str(tiny.write_model(home / "model")),
        "data": {"path": (str(tiny.write_data(home / "data", rows=31)),), "prompts": prompts},
        "steps": STEPS, "batch_size": 2, "init_lr": 0.01, "warmup_steps": 2, "dtype": "float32",
        "freeze_qformer": False, "save_every": 1, "keep": 2, "log_every": 1,
    }  # fmt: skip


def train_in_process(values: dict[str, Any], workdir: Path, output: Path) -> None:
    """Start or continue the run in `workdir`. The output of this process goes to a file."""
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import jax

    from minigpt4_jax.data.loader import Loader
    from minigpt4_jax.training import trainer

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    journal = os.open(journal_of(workdir), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    original_next = Loader.__next__

    def recorded_next(loader: Loader) -> Any:
        number, batch = loader.state()["step"], original_next(loader)
        data = b"".join(array.tobytes() for array in batch if array is not None)
        os.write(journal, f"{number} {hashlib.sha256(data).hexdigest()[:16]}\n".encode())
        return batch

    Loader.__next__ = recorded_next
    steps = os.open(steps_of(workdir), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        trainer.train(values, workdir, on_metrics=lambda record: os.write(steps, b"."))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


def journal_of(workdir: Path) -> Path:
    """A file with a line for each batch that any process of the run read."""
    return workdir.with_suffix(".batches")


def steps_of(workdir: Path) -> Path:
    """A file with a byte for each step that any process of the run did."""
    return workdir.with_suffix(".steps")


def outcome(workdir: Path) -> Outcome:
    """What a finished run left. AssertionError: there are other checkpoints than the last two."""
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
        self._home, self._values, self._random = home, config_values(home), random.Random(seed)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(IMPORTED)
        self.count = KillCount()

    def undisturbed(self) -> Outcome:
        """The run without a kill."""
        workdir = self._home / "undisturbed"
        self._wait(self._start(workdir), workdir)
        return outcome(workdir)

    def killed(self, name: str, kills: int) -> Outcome:
        """A run whose processes are killed up to `kills` times before it is left to finish."""
        workdir = self._home / name
        last = self.count.all + kills
        while self.count.all < last:
            process = self._start(workdir)
            if not self._kill(process, workdir):
                return outcome(workdir)
        self._wait(self._start(workdir), workdir)
        return outcome(workdir)

    def _start(self, workdir: Path) -> BaseProcess:
        args = (self._values, workdir, workdir.with_suffix(".log"))
        process = self._context.Process(target=train_in_process, args=args)
        process.start()
        return process

    def _wait(self, process: BaseProcess, workdir: Path) -> None:
        """Wait for a process that finishes the run."""
        process.join()
        text = workdir.with_suffix(".log").read_text()
        assert process.exitcode == 0, f"exit code {process.exitcode}: {text[-3000:]}"
        assert "damaged" not in text, text[-3000:]

    def _kill(self, process: BaseProcess, workdir: Path) -> bool:
        """Kill a process at a random moment; False if it finished the run before."""
        steps, unfinished = self._num_steps(workdir), self._unfinished(workdir)
        if self.count.all % EARLY:
            while self._num_steps(workdir) == steps and process.exitcode is None:
                time.sleep(0.01)
        process.join(self._random.uniform(0, MAX_SECONDS))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        if process.exitcode != -signal.SIGKILL:
            self._wait(process, workdir)
            return False
        starting = self._num_steps(workdir) == steps
        writing = bool(self._unfinished(workdir) - unfinished)
        count = self.count
        self.count = KillCount(count.all + 1, count.starting + starting, count.writing + writing)
        return True

    @staticmethod
    def _num_steps(workdir: Path) -> int:
        path = steps_of(workdir)
        return path.stat().st_size if path.exists() else 0

    @staticmethod
    def _unfinished(workdir: Path) -> set[tuple[str, int]]:
        """Checkpoints that are being written, or were when a process was killed."""
        found = (workdir / "checkpoints").glob("*orbax-checkpoint-tmp*")
        return {(path.name, path.stat().st_ino) for path in found}
