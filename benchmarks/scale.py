"""What fits on which TPU slice, at which share of its peak, and how that scales; no TPU is needed.

    python benchmarks/scale.py [--only=REGEX] [--out=scale.jsonl] [--list] [--no-checkpoints]

Compiles the full-size training step of each table cell for its slice by `python -m minigpt4_jax.compile`
(libtpu, `pip install '.[tpu]'`) and prints HBM per chip, and the time and share of peak that the chip's
published figures allow. A cell takes about ten seconds of one core, as no machine code is generated. Results
are appended to --out and not compiled again, so the table can be made in parts. At the end the cost of
checkpoints on this machine is measured (benchmarks/checkpointing.py).

For every model and chip: the smallest slice that holds a step, one of eight chips and one of 256, each on the
mesh that a run would choose. Layers are recomputed in the backward pass (config.remat); "kept" is a step on
eight chips that stores the results of matrix products instead, "most" one with the largest batch that fits,
by powers of two. A step is one batch. Rows have the length of the longest answer of their stage. The column
"rows" is per chip.
"""

import contextlib
import math
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import RecordFile, argument_parser, compile_figures

from minigpt4_jax.errors import run

# name -> (configuration, rows per chip)
MODELS = {
    "7b-stage1": ("stage1", 32),
    "7b-stage2": ("stage2", 16),
    "13b-stage1": ("stage1:vicuna13b", 32),
    "13b-stage2": ("stage2:vicuna13b", 16),
    "v2-stage3": ("v2_stage3", 2),
}
# chip -> slices that are tried until one holds a step; one of 8 chips; one of 256
SLICES = {
    "v4": (("1x1x1", "2x2x1"), "2x2x2", "4x8x8"),
    "v5e": (("1x1", "2x2"), "2x4", "16x16"),
    "v5p": (("1x1x1",), "2x2x2", "4x8x8"),
    "v6e": (("1x1", "2x2"), "2x4", "16x16"),
}

Records = Mapping[str, dict[str, Any]]  # by the name of the cell


@dataclass(frozen=True)
class Cell:
    """One program of the table."""

    model: str
    slice: str
    rows: int  # per chip
    remat: bool = True
    mesh: str = "auto"
    max_rows: bool = False  # search for the largest batch

    @property
    def name(self) -> str:
        kept = "" if self.remat else " kept"
        most = " most" if self.max_rows else ""
        return f"{self.model} {self.slice} {self.mesh} rows:{self.rows}{kept}{most}"

    @property
    def model_and_chip(self) -> tuple[str, str]:
        return self.model, self.slice.partition(":")[0]

    @property
    def chips(self) -> int:
        return math.prod(map(int, self.slice.partition(":")[2].split("x")))

    def arguments(self) -> list[str]:
        return [
            f"--config={MODELS[self.model][0]}", f"--topology={self.slice}", f"--mesh={self.mesh}",
            f"--config.batch_size={self.rows * self.chips}", "--config.accumulate=1",
            f"--config.remat={str(self.remat).lower()}", "--program=train",
            *["--fill"] * self.max_rows,
        ]  # fmt: skip


def all_cells(rows: int | None = None) -> Iterator[Cell]:
    for model, (_, default_rows) in MODELS.items():
        for chip, (small, eight, large) in SLICES.items():
            for shape in (*small, eight, large):
                yield Cell(model, f"{chip}:{shape}", rows or default_rows)
            yield Cell(model, f"{chip}:{eight}", rows or default_rows, remat=False)
            yield Cell(model, f"{chip}:{eight}", rows or default_rows, max_rows=True)


def is_needed(cell: Cell, records: Records) -> bool:
    """Whether the slice has at least 8 chips, or no smaller slice of the same chip holds the step."""
    smaller = (
        c
        for c in all_cells(cell.rows)
        if c.model_and_chip == cell.model_and_chip and c.chips < cell.chips
    )
    return cell.chips >= 8 or not any(records.get(c.name, {}).get("fits") for c in smaller)


def compile_cell(cell: Cell) -> dict[str, Any]:
    record = compile_figures(cell.arguments())
    return record | {"cell": cell.name, "chip_rows": record["rows"] / record["chips"]}


# --- tables -----------------------------------------------------------------------------------


TABLE_HEAD = (
    "| | slice | mesh | rows | HBM, GB | ms a step | rows/s of a chip | of peak | limited by | sent, GB |\n"
    "|---|---|---|---:|---:|---:|---:|---:|---|---:|"
)


def table_row(record: dict[str, Any]) -> str:
    model, topology, _, _, *variant = record["cell"].split()
    mesh = record["mesh"] if record["chips"] > 1 else ""
    rows = ", ".join([f"{record['chip_rows']:g}", *variant])
    head = f"| {model} | {topology} | {mesh} | {rows} | {_memory(record)} |"
    if not record["fits"]:
        return f"{head} does not fit | | | | |"
    p = record["predicted"]
    rate = record["rows"] / record["chips"] / p["seconds"]
    return (
        f"{head} {p['seconds'] * 1e3:.0f} | {rate:.1f} | {p['share']:.0%} | {p['limit']} | "
        f"{record['sent'] / 1e9:.2f} |"
    )


def weak_scaling(records: Records) -> Iterator[str]:
    """Time of a step on 8 chips / time on 256, for cells that differ only in the slice."""

    def variant(record: dict[str, Any]) -> tuple[str, ...]:
        model, topology, *rest = record["cell"].split()
        return (model, topology.partition(":")[0], *rest)

    fitting = [r for r in records.values() if "predicted" in r]
    for small in (r for r in fitting if r["chips"] == 8):
        for large in (r for r in fitting if r["chips"] == 256 and variant(r) == variant(small)):
            share = small["predicted"]["seconds"] / large["predicted"]["seconds"]
            model, topology = small["cell"].split()[:2]
            large_topology = large["cell"].split()[1]
            yield (
                f"{model} {topology} {small['mesh']} -> {large_topology} {large['mesh']}: {share:.1%}"
            )


SUMMARY_HEAD = (
    "| | chip | smallest slice, GB of a chip | eight chips | ms, of peak | the same, products kept "
    "| most rows of a chip | 256 chips | 8 to 256 |\n|---|---|---|---|---|---|---|---|---:|"
)


def summary(records: Records, rows: int | None = None) -> Iterator[str]:
    """A row for each model and chip whose cells are all compiled."""
    for model, (_, default_rows) in MODELS.items():
        for chip in SLICES:
            with contextlib.suppress(KeyError):
                yield _summary_row(model, chip, rows or default_rows, records)


def _summary_row(model: str, chip: str, rows: int, records: Records) -> str:
    small, eight, large = SLICES[chip]

    def record_of(shape: str, **variant: Any) -> dict[str, Any]:
        return records[Cell(model, f"{chip}:{shape}", rows, **variant).name]

    smallest = next((shape for shape in small if record_of(shape)["fits"]), small[-1])
    default, most = record_of(eight), record_of(eight, max_rows=True)
    kept, largest = record_of(eight, remat=False), record_of(large)
    other_mesh = f"{kept['mesh']}: " if kept["fits"] and kept["mesh"] != default["mesh"] else ""
    share = default["predicted"]["seconds"] / largest["predicted"]["seconds"]
    return (
        f"| {model}, {rows} | {chip} | {smallest}: {_memory(record_of(smallest))} | {default['mesh']} "
        f"| {_time(default)} | {other_mesh}{_time(kept)} | {most['chip_rows']:g}: {_memory(most)} "
        f"| {largest['mesh']}: {_time(largest)} | {share:.1%} |"
    )


def _memory(record: dict[str, Any]) -> str:
    return f"{record['peak'] / 1e9:.1f} of {record['hbm'] / 1e9:.1f}"


def _time(record: dict[str, Any]) -> str:
    if not record["fits"]:
        return "does not fit"
    return f"{record['predicted']['seconds'] * 1e3:.0f} ms, {record['predicted']['share']:.0%}"


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--only", default="", help="regular expression: only cells whose name matches"
    )
    parser.add_argument("--out", type=Path, default=Path("scale.jsonl"))
    parser.add_argument("--rows", type=int, help="per chip, instead of those of the table")
    parser.add_argument("--list", action="store_true", help="print the names of the cells and stop")
    parser.add_argument("--no-checkpoints", action="store_true")
    args = parser.parse_args()
    cells = [cell for cell in all_cells(args.rows) if re.search(args.only, cell.name)]
    if args.list:
        print("\n".join(cell.name for cell in cells))
        return
    file = RecordFile(args.out, key=lambda record: record["cell"])
    records = file.records
    for cell in cells:
        if cell.name not in records and is_needed(cell, records):
            print(table_row(file.add(compile_cell(cell))), flush=True)
    print("\n" + TABLE_HEAD)
    print("\n".join(table_row(records[cell.name]) for cell in cells if cell.name in records))
    print("\n".join(["", SUMMARY_HEAD, *summary(records, args.rows)]))
    print("\nWeak scaling, 8 to 256 chips, predicted:")
    print("\n".join(weak_scaling(records)) or "(no two cells to compare)")
    if not args.no_checkpoints:
        print("\nA checkpoint:", flush=True)
        script = Path(__file__).with_name("checkpointing.py")
        subprocess.run([sys.executable, str(script)], check=True)


if __name__ == "__main__":
    run(main)
