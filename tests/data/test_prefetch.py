"""Worker processes that die or hang: the same batches follow, or one line says what happened."""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers.prefetching import LAST, reading

from minigpt4_jax.data import prefetch
from minigpt4_jax.errors import UserError


def workers_of_this():
    return [p for p in multiprocessing.active_children() if p.name.startswith("grain")]


def test_a_worker_that_dies_is_replaced(caplog):
    batches = reading(workers=2)
    seen = [int(batches.read(n)) for n in range(3)]
    os.kill(workers_of_this()[0].pid, signal.SIGKILL)
    seen += [int(batches.read(n)) for n in range(3, LAST)]
    assert seen == list(range(LAST))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "a worker process was killed (SIGKILL, as the system does" in record.getMessage()
    assert "started again at batch" in record.getMessage()
    with pytest.raises(StopIteration):
        batches.read(LAST)
    assert not workers_of_this()


def test_a_worker_that_hangs_is_replaced(caplog):
    batches = reading(timeout=4.0)
    seen = [int(batches.read(0))]
    (worker,) = workers_of_this()
    os.kill(worker.pid, signal.SIGSTOP)
    seen += [int(batches.read(n)) for n in range(1, 12)]
    assert seen == list(range(12))
    record = caplog.records[0]  # one, where a worker starts within the timeout
    assert "no batch came for 4 s: the workers are started again at batch" in record.getMessage()
    batches.close()
    assert worker.exitcode == -signal.SIGKILL
    assert not workers_of_this()


def die(number):
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_that_die_again_and_again(caplog, monkeypatch):
    monkeypatch.setattr(prefetch, "_RESTARTS", 1)
    batches = reading(make=die)
    with pytest.raises(UserError, match="at batch 0, 2 times: if memory ran out, lower"):
        batches.read(0)
    assert len(caplog.records) == 1
    assert not workers_of_this()


def refuse(number):
    raise UserError(f"image {number} is broken")


def test_an_error_in_a_worker_is_not_a_death(caplog):
    with pytest.raises(UserError, match="image 0 is broken"):
        reading(make=refuse).read(0)
    assert not caplog.records


def sleep(number):
    time.sleep(1.5)


def test_threads_that_hang():
    batches = reading(timeout=0.3, workers=0, make=sleep)
    assert not batches.ready(0, 0.1)
    with pytest.raises(UserError, match=r"no batch came for 0\.3 s at batch 0: look at the disk"):
        batches.read(0)


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks at Linux processes")
def test_workers_end_with_a_parent_that_is_killed():
    """They wait on queues that they themselves keep open."""
    code = """if True:
        import os, signal, multiprocessing
        from helpers.prefetching import reading
        if __name__ == "__main__":
            batches = reading()
            batches.read(0)
            print(*[p.pid for p in multiprocessing.active_children()], flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in done.stdout.split()]
    assert pids
    end = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(alive, pids))


def alive(pid: int) -> bool:
    """Whether the process runs; one that ended and that nobody waited for does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
