"""Search for the largest batch, with a fake compiler whose memory grows linearly with the rows."""

import argparse

import pytest

from minigpt4_jax.aot import max_batch, report
from minigpt4_jax.aot.compiler import Memory
from minigpt4_jax.aot.job import Job, parse_job
from minigpt4_jax.aot.topology import CHIPS
from minigpt4_jax.errors import UserError

USABLE_HBM = CHIPS["v5e"].usable_hbm
EIGHT_CHIPS = report.Target("v5e:2x4", 8, "data:8", "")


@pytest.fixture
def attempts(monkeypatch):
    """Rows of each attempt. Each row of a chip takes 1/40 of its memory."""
    attempts: list[int] = []
    monkeypatch.setattr(Job, "devices", list(range(8)))

    def compile_fake(job, program):
        c = job.train_config
        rows = c.batch_size // c.accumulate if program == "train" else job.batch_size
        attempts.append(rows)
        memory = Memory(0, 0, round(rows / 8 * USABLE_HBM / 40), 0)
        return report.Report(program, "", rows, memory, 0, None, None, 1.0, None, 0.0), EIGHT_CHIPS

    monkeypatch.setattr(max_batch, "_compile_in_subprocess", compile_fake)
    return attempts


def make_job(*config_args, topology="v5e:2x4", mesh=None, batch=1):
    options = argparse.Namespace(
        topology=topology, size="vicuna7b", mesh=mesh, tokens=None, quantize=None, kv_cache=None,
        quantize_base=None, batch=batch, context=64, hlo=None, code=False,
    )  # fmt: skip
    return parse_job(options, ["--config=stage2", *config_args])


def max_rows(job, program="train"):
    lines = []
    found, _ = max_batch.find_max_batch(job, program, lines.append)
    return found.rows, lines


def test_rows_double_while_they_fit(attempts):
    # 12 rows in two accumulation steps are 6 at once: at least one per chip
    rows, lines = max_rows(make_job("--config.accumulate=2"))
    assert rows == 256 and attempts == [8, 16, 32, 64, 128, 256, 512]
    assert lines[-2].endswith("mesh data:8: 13.53 of 16.91 GB, fits")
    assert lines[-1].endswith("27.06 of 16.91 GB, does not fit")
    attempts.clear()
    assert max_rows(make_job(batch=9), "decode")[0] == 256
    assert attempts == [16, 32, 64, 128, 256, 512]


def test_rows_halve_until_they_fit(attempts):
    large = ["--config.batch_size=2048", "--config.accumulate=1"]
    assert max_rows(make_job(*large))[0] == 256 and attempts == [2048, 1024, 512, 256]
    # a requested mesh gets no fewer rows than it divides
    assert make_job(*large, mesh="data:4,model:2").min_rows("train") == 4


def test_space_is_reserved_for_machine_code(attempts, monkeypatch):
    """40 rows per chip would fill it to the last byte."""
    monkeypatch.setattr(Job, "initial_rows", lambda self, program: 320)
    rows, lines = max_rows(make_job())
    assert rows == 160 and lines[0].endswith("leaves no room for machine code (0.15 GB)")


def test_errors_of_the_subprocess_are_raised_here():
    with pytest.raises(UserError, match="'v9:2x4': expected one of v4"):
        max_batch._compile_in_subprocess(make_job(topology="v9:2x4"), "train")
