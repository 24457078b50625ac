"""What fits on which TPU slice, at which share of its peak, and how that scales; no TPU is needed.

    python benchmarks/scale.py [--only=REGEX] [--out=scale.jsonl] [--list] [--no-checkpoints]

compiles the training step of each cell of the table for its slice with the real compiler (libtpu,
`pip install '.[tpu]'`), full size, from shapes, and prints what `python -m minigpt4_jax.compile` finds:
HBM of a chip, and the time and share of peak that published figures of the chip would allow. A cell
takes some ten seconds of one core: no machine code is made. Each is added to --out when it is done and
is not compiled again, so the table can be made in parts. At the end comes the cost of checkpointing on
this machine (benchmarks/checkpointing.py).

For every model and kind of chip: the smallest slice that holds a step, one of eight chips and one of 256,
each on the mesh that a run would choose. Layers are computed again in the backward pass (config.remat);
"kept" is a step on eight chips that keeps the results of their products instead, "most" one with as many
rows as fit there, by powers of two. A step is one batch. Rows are as long as the longest answer of their
stage. "rows": a chip's.
"""

import argparse
import contextlib
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt4_jax.errors import Parser, UserError, run

# name -> (configuration, rows of a chip)
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


@dataclass(frozen=True)
class Cell:
    """One program of the table."""

    model: str
    slice: str
    rows: int  # of a chip
    remat: bool = True
    mesh: str = "auto"
    fill: bool = False  # with as many rows as fit

    @property
    def name(self) -> str:
        kept = "" if self.remat else " kept"
        most = " most" if self.fill else ""
        return f"{self.model} {self.slice} {self.mesh} rows:{self.rows}{kept}{most}"

    @property
    def kind(self) -> tuple[str, str]:
        """Model and chip."""
        return self.model, self.slice.partition(":")[0]

    @property
    def chips(self) -> int:
        return math.prod(map(int, self.slice.partition(":")[2].split("x")))

    def command(self) -> list[str]:
        return [
            f"--config={MODELS[self.model][0]}", f"--topology={self.slice}", f"--mesh={self.mesh}",
            f"--config.batch_size={self.rows * self.chips}", "--config.accumulate=1",
            f"--config.remat={str(self.remat).lower()}", "--program=train", *["--fill"] * self.fill,
        ]  # fmt: skip


def cells(rows: int | None = None) -> Iterator[Cell]:
    for model, (_, usual) in MODELS.items():
        for chip, (few, eight, many) in SLICES.items():
            for shape in (*few, eight, many):
                yield Cell(model, f"{chip}:{shape}", rows or usual)
            yield Cell(model, f"{chip}:{eight}", rows or usual, remat=False)
            yield Cell(model, f"{chip}:{eight}", rows or usual, fill=True)


def is_wanted(cell: Cell, found: dict[str, dict[str, Any]]) -> bool:
    """Whether no smaller slice of the same kind holds it, or it is one of 8 chips or more."""
    smaller = (c for c in cells(cell.rows) if c.kind == cell.kind and c.chips < cell.chips)
    return cell.chips >= 8 or not any(found.get(c.name, {}).get("fits") for c in smaller)


def compiled(cell: Cell) -> dict[str, Any]:
    """The figures of a cell, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "minigpt4_jax.compile", *cell.command(), f"--json={path}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if not path.exists():
            raise UserError(f"{cell.name}: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
        found = json.loads(path.read_text())[0]
        return found | {"cell": cell.name, "chip_rows": found["rows"] / found["chips"]}


def kept(path: Path) -> dict[str, dict[str, Any]]:
    """What was compiled before, by the cell's name."""
    if not path.exists():
        return {}
    records = map(json.loads, path.read_text().splitlines())
    return {record["cell"]: record for record in records}


# --- the table --------------------------------------------------------------------------------


def row(r: dict[str, Any]) -> str:
    model, where, _, _, *kept = r["cell"].split()
    mesh = r["mesh"] if r["chips"] > 1 else ""
    memory = _memory(r)
    rows = ", ".join([f"{r['chip_rows']:g}", *kept])
    head = f"| {model} | {where} | {mesh} | {rows} | {memory} |"
    if not r["fits"]:
        return f"{head} does not fit | | | | |"
    p = r["predicted"]
    rate = r["rows"] / r["chips"] / p["seconds"]
    return (
        f"{head} {p['seconds'] * 1e3:.0f} | {rate:.1f} | {p['share']:.0%} | {p['limit']} | "
        f"{r['sent'] / 1e9:.2f} |"
    )


HEAD = (
    "| | slice | mesh | rows | HBM, GB | ms a step | rows/s of a chip | of peak | limited by | sent, GB |\n"
    "|---|---|---|---:|---:|---:|---:|---:|---|---:|"
)


def scaling(records: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Time of a step on 8 chips / on 256, with as many rows a chip and weights split alike."""
    fitting = [r for r in records.values() if "predicted" in r]
    for r in fitting:
        for other in fitting:
            (model, where, *how), same = r["cell"].split(), other["cell"].split()
            alike = (model, where.partition(":")[0], how) == (
                same[0], same[1].partition(":")[0], same[2:]
            )  # fmt: skip
            if alike and (r["chips"], other["chips"]) == (8, 256):
                share = r["predicted"]["seconds"] / other["predicted"]["seconds"]
                yield f"{model} {where} {r['mesh']} -> {same[1]} {other['mesh']}: {share:.1%}"


SUMMARY = (
    "| | chip | smallest slice, GB of a chip | eight chips | ms, of peak | the same, products kept "
    "| most rows of a chip | 256 chips | 8 to 256 |\n|---|---|---|---|---|---|---|---|---:|"
)


def summary(found: dict[str, dict[str, Any]], rows: int | None = None) -> Iterator[str]:
    """A line for each model and kind of chip of which all is known."""
    for model, (_, usual) in MODELS.items():
        for chip in SLICES:
            with contextlib.suppress(KeyError):
                yield _line(model, chip, rows or usual, found)


def _line(model: str, chip: str, rows: int, found: dict[str, dict[str, Any]]) -> str:
    few, eight, many = SLICES[chip]

    def of(shape: str, **how: bool) -> dict[str, Any]:
        return found[Cell(model, f"{chip}:{shape}", rows, **how).name]

    small = next((shape for shape in few if of(shape)["fits"]), few[-1])
    usual, kept, most, large = of(eight), of(eight, remat=False), of(eight, fill=True), of(many)
    other_mesh = f"{kept['mesh']}: " if kept["fits"] and kept["mesh"] != usual["mesh"] else ""
    share = usual["predicted"]["seconds"] / large["predicted"]["seconds"]
    return (
        f"| {model}, {rows} | {chip} | {small}: {_memory(of(small))} | {usual['mesh']} | {_time(usual)} | "
        f"{other_mesh}{_time(kept)} | {most['chip_rows']:g}: {_memory(most)} | "
        f"{large['mesh']}: {_time(large)} | {share:.1%} |"
    )


def _memory(r: dict[str, Any]) -> str:
    return f"{r['peak'] / 1e9:.1f} of {r['hbm'] / 1e9:.1f}"


def _time(r: dict[str, Any]) -> str:
    if not r["fits"]:
        return "does not fit"
    return f"{r['predicted']['seconds'] * 1e3:.0f} ms, {r['predicted']['share']:.0%}"


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="cells whose name this is found in")
    parser.add_argument("--out", type=Path, default=Path("scale.jsonl"))
    parser.add_argument("--rows", type=int, help="of a chip, instead of those of the table")
    parser.add_argument("--list", action="store_true", help="name the cells and stop")
    parser.add_argument("--no-checkpoints", action="store_true")
    args = parser.parse_args()
    chosen = [cell for cell in cells(args.rows) if re.search(args.only, cell.name)]
    if args.list:
        print("\n".join(cell.name for cell in chosen))
        return
    found = kept(args.out)
    for cell in chosen:
        if cell.name not in found and is_wanted(cell, found):
            found[cell.name] = compiled(cell)
            with args.out.open("a") as file:
                file.write(json.dumps(found[cell.name]) + "\n")
            print(row(found[cell.name]), flush=True)
    print("\n" + HEAD)
    print("\n".join(row(found[cell.name]) for cell in chosen if cell.name in found))
    print("\n".join(["", SUMMARY, *summary(found, args.rows)]))
    print("\nWeak scaling, 8 to 256 chips, predicted:")
    print("\n".join(scaling(found)) or "(no two cells to compare)")
    if not args.no_checkpoints:
        print("\nA checkpoint:", flush=True)
        subprocess.run(
            [sys.executable, str(Path(__file__).with_name("checkpointing.py"))], check=True
        )


if __name__ == "__main__":
    run(main)
