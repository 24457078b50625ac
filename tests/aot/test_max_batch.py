"""The search for the most rows that fit, with a chip that is pretended to take so much a row."""

import argparse

import pytest

from minigpt4_jax.aot import max_batch, report
from minigpt4_jax.aot.compiler import Memory
from minigpt4_jax.aot.job import Job, read
from minigpt4_jax.aot.topology import CHIPS
from minigpt4_jax.errors import UserError

ROOM = CHIPS["v5e"].usable
EIGHT = report.Slice("v5e:2x4", 8, "data:8", "")


@pytest.fixture
def tried(monkeypatch):
    """Rows of what was compiled, by which a chip would be filled: a 40th of its memory a row of its own."""
    rows: list[int] = []
    monkeypatch.setattr(Job, "devices", list(range(8)))

    def figures(job, program):
        n = job.run.batch_size // job.run.accumulate if program == "train" else job.batch
        rows.append(n)
        memory = Memory(0, 0, round(n / 8 * ROOM / 40), 0)
        return report.Figures(program, "", n, memory, 0, None, None, 1.0, None, 0.0), EIGHT

    monkeypatch.setattr(max_batch, "_apart", figures)
    return rows


def job(*args, topology="v5e:2x4", mesh=None, batch=1):
    options = argparse.Namespace(
        topology=topology, size="vicuna7b", mesh=mesh, tokens=None, quantize=None, kv_cache=None,
        batch=batch, context=64, hlo=None, code=False,
    )  # fmt: skip
    return read(options, ["--config=stage2", *args])


def fullest(job, program="train"):
    lines = []
    found, _ = max_batch.fullest(job, program, lines.append)
    return found.rows, lines


def test_rows_are_doubled_while_they_fit(tried):
    # 12 rows of the recipe in two parts, six at once: one for every chip at least
    rows, lines = fullest(job("--config.accumulate=2"))
    assert rows == 256 and tried == [8, 16, 32, 64, 128, 256, 512]
    assert lines[-2].endswith("mesh data:8: 13.53 of 16.91 GB, fits")
    assert lines[-1].endswith("27.06 of 16.91 GB, does not fit")
    tried.clear()
    assert fullest(job(batch=9), "decode")[0] == 256 and tried == [16, 32, 64, 128, 256, 512]


def test_rows_are_halved_until_they_fit(tried):
    many = ["--config.batch_size=2048", "--config.accumulate=1"]
    assert fullest(job(*many))[0] == 256 and tried == [2048, 1024, 512, 256]
    # a mesh that was asked for is not given fewer rows than it divides
    assert job(*many, mesh="data:4,model:2").least_rows("train") == 4


def test_room_is_left_for_machine_code(tried, monkeypatch):
    """40 rows of a chip would fill it to the last byte."""
    monkeypatch.setattr(Job, "first_rows", lambda self, program: 320)
    rows, lines = fullest(job())
    assert rows == 160 and lines[0].endswith("leaves no room for machine code (0.15 GB)")


def test_a_mistake_in_the_process_apart_is_told_here():
    with pytest.raises(UserError, match="'v9:2x4': expected one of v4"):
        max_batch._apart(job(topology="v9:2x4"), "train")
