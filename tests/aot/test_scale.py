"""benchmarks/scale.py: which slices it compiles for, and its tables. Compilation is replaced by a fake."""

import importlib
import sys
from pathlib import Path

import pytest
from helpers.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def scale(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.delitem(sys.modules, "scale", raising=False)
    return importlib.import_module("scale")


def fake_record(cell) -> dict:
    """One v5e chip is too small; on 256 chips a step takes a tenth longer; four times the rows fit."""
    rows = cell.rows * (4 if cell.max_rows else 1)
    record = {
        "cell": cell.name, "chip_rows": rows, "chips": cell.chips, "rows": rows * cell.chips,
        "mesh": "fsdp:8", "peak": 15e9, "hbm": 16.9e9, "sent": 24.9e9, "fits": cell.slice != "v5e:1x1",
    }  # fmt: skip
    predicted = {"seconds": 0.55 if cell.chips == 256 else 0.5, "share": 0.5, "limit": "compute"}
    return record | ({"predicted": predicted} if record["fits"] else {})


def test_tables(scale, tmp_path, monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(
        scale, "compile_cell", lambda cell: compiled.append(cell.slice) or fake_record(cell)
    )
    out = f"--out={tmp_path / 'scale.jsonl'}"
    monkeypatch.setattr(sys, "argv", ["scale", "--only=7b-stage2 v(4|5e)", "--no-checkpoints", out])
    scale.main()
    # One v4 chip holds a step, so four are not compiled. 8 and 256 always are; 8 also with products
    # kept and with the largest batch.
    assert compiled == [
        "v4:1x1x1", "v4:2x2x2", "v4:4x8x8", "v4:2x2x2", "v4:2x2x2",
        "v5e:1x1", "v5e:2x2", "v5e:2x4", "v5e:16x16", "v5e:2x4", "v5e:2x4",
    ]  # fmt: skip
    table = capsys.readouterr().out.partition(scale.TABLE_HEAD)[2]
    assert "| 7b-stage2 | v5e:1x1 |  | 16 | 15.0 of 16.9 | does not fit |" in table
    eight = (
        "| 7b-stage2 | v5e:2x4 | fsdp:8 | 16 | 15.0 of 16.9 | 500 | 32.0 | 50% | compute | 24.90 |"
    )
    assert eight in table and eight.replace("| 16 |", "| 16, kept |") in table
    assert "7b-stage2 v5e:2x4 fsdp:8 -> v5e:16x16 fsdp:8: 90.9%" in table
    assert eight.replace("| 16 |", "| 64, most |").replace("32.0", "128.0") in table
    short = (
        "| 7b-stage2, 16 | v5e | 2x2: 15.0 of 16.9 | fsdp:8 | 500 ms, 50% | 500 ms, 50% "
        "| 64: 15.0 of 16.9 | fsdp:8: 550 ms, 50% | 90.9% |"
    )
    assert short in table and "| 7b-stage2, 16 | v4 | 1x1x1: 15.0" in table
    compiled.clear()
    scale.main()  # nothing is compiled again
    assert not compiled
    assert capsys.readouterr().out.partition(scale.TABLE_HEAD)[2] == table


def test_checkpoints_are_measured_at_the_end(scale, tmp_path, monkeypatch):
    scripts = []
    monkeypatch.setattr(
        scale.subprocess, "run", lambda command, **_: scripts.append(Path(command[1]))
    )
    out = f"--out={tmp_path / 'scale.jsonl'}"
    monkeypatch.setattr(sys, "argv", ["scale", "--only=no cell", out])
    scale.main()
    assert scripts == [BENCHMARKS / "checkpointing.py"] and scripts[0].is_file()
