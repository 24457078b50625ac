"""The parts of `batch --shard=I/N`: which rows, and into which file."""

from collections.abc import Sequence
from pathlib import Path

from minigpt4_jax.cli.batch_output import BatchRow
from minigpt4_jax.errors import UserError


def parse_shard(text: str) -> tuple[int, int]:
    """Read "2/8" as (2, 8). UserError: no such shard."""
    index, slash, count = text.partition("/")
    if slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count):
        return int(index), int(count)
    raise UserError(f"--shard={text}: expected I/N with I from 1 to N, as 2/8")


def shard_rows(rows: Sequence[BatchRow], index: int, count: int) -> list[BatchRow]:
    """Shard `index` of `count`, from 1: consecutive rows, with their numbers in the whole file."""
    return list(rows[len(rows) * (index - 1) // count : len(rows) * index // count])


def shard_path(output: Path, index: int, count: int) -> Path:
    """The file of a shard's answers: out.jsonl -> out-00002-of-00008.jsonl."""
    return output.with_name(f"{output.stem}-{index:05}-of-{count:05}{output.suffix}")
