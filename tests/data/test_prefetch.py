"""Workers that die or hang: the same batches follow, or an error says what happened."""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers.prefetching import LENGTH, prefetcher

from minigpt4_jax.data import prefetch
from minigpt4_jax.errors import UserError


def grain_workers():
    return [p for p in multiprocessing.active_children() if p.name.startswith("grain")]


def test_dead_worker_is_restarted(caplog):
    batches = prefetcher(workers=2)
    numbers = [int(batches.read(n)) for n in range(3)]
    os.kill(grain_workers()[0].pid, signal.SIGKILL)
    numbers += [int(batches.read(n)) for n in range(3, LENGTH)]
    assert numbers == list(range(LENGTH))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "a worker process was killed (SIGKILL, as the system does" in record.getMessage()
    assert "restarting the workers at batch" in record.getMessage()
    with pytest.raises(StopIteration):
        batches.read(LENGTH)
    assert not grain_workers()


def test_hanging_worker_is_restarted(caplog):
    batches = prefetcher(timeout=4.0)
    numbers = [int(batches.read(0))]
    (worker,) = grain_workers()
    os.kill(worker.pid, signal.SIGSTOP)
    numbers += [int(batches.read(n)) for n in range(1, 12)]
    assert numbers == list(range(12))
    record = caplog.records[0]  # the only one, if a worker starts within the timeout
    assert "no batch came for 4 s: restarting the workers at batch" in record.getMessage()
    batches.close()
    assert worker.exitcode == -signal.SIGKILL
    assert not grain_workers()


def kill_itself(number):
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_that_die_repeatedly(caplog, monkeypatch):
    monkeypatch.setattr(prefetch, "_RESTARTS", 1)
    batches = prefetcher(transform=kill_itself)
    with pytest.raises(UserError, match="at batch 0, 2 times: if memory ran out, lower"):
        batches.read(0)
    assert len(caplog.records) == 1
    assert not grain_workers()


def raise_user_error(number):
    raise UserError(f"image {number} is broken")


def test_error_in_a_worker_is_raised(caplog):
    with pytest.raises(UserError, match="image 0 is broken"):
        prefetcher(transform=raise_user_error).read(0)
    assert not caplog.records


def sleep(number):
    time.sleep(1.5)


def test_hanging_threads():
    batches = prefetcher(timeout=0.3, workers=0, transform=sleep)
    assert not batches.ready(0, 0.1)
    with pytest.raises(UserError, match=r"no batch came for 0\.3 s at batch 0: check the disk"):
        batches.read(0)


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs /proc")
def test_workers_exit_when_their_parent_is_killed():
    """Grain's workers would wait on queues that they keep open themselves."""
    code = """if True:
        import os, signal, multiprocessing
        from helpers.prefetching import prefetcher
        if __name__ == "__main__":
            batches = prefetcher()
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
    """Whether the process runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
