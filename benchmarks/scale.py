"""What fits on which TPU slice, at which share of its peak, and how that scales; no TPU is needed.

    python benchmarks/scale.py [--only=REGEX] [--out=scale.jsonl] [--list] [--no-checkpoints]

compiles the training step of each cell of the table for its slice with the real compiler (libtpu,
`pip install '.[tpu]'`), full size, from shapes, and prints what `python -m minigpt4_jax.compile` finds:
HBM of a chip, and the time and share of peak that published figures of the chip would allow. A cell
takes two to seven minutes of one core. Each is added to --out when it is done and is not compiled
again, so the table can be made in parts. At the end comes the cost of checkpointing on this machine
(benchmarks/checkpointing.py).

Every layer is computed again in the backward pass (config.remat), and a step is one batch. Rows are as
long as the longest answer of their stage. "rows": a chip's.
"""

import argparse
import json
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
# slice -> mesh; weights lie whole on a chip ("data") where they leave room, else on every eight
SLICES = {
    "v4:1x1x1": "data:1", "v4:2x2x2": "data:8", "v4:4x8x8": "data:256",
    "v5e:2x4": "fsdp:8", "v5e:16x16": "data:32,fsdp:8",
    "v5p:1x1x1": "data:1", "v5p:2x2x2": "data:8", "v5p:4x8x8": "data:256",
    "v6e:1x1": "data:1", "v6e:2x4": "data:8", "v6e:16x16": "data:256",
}  # fmt: skip
SPLIT = {"data:8": "fsdp:8", "data:256": "data:32,fsdp:8"}  # the same where they do not


@dataclass(frozen=True)
class Cell:
    """One program of the table."""

    model: str
    slice: str
    mesh: str
    rows: int  # of a chip

    @property
    def name(self) -> str:
        return f"{self.model} {self.slice} {self.mesh} rows:{self.rows}"

    @property
    def chips(self) -> int:
        sides = map(int, self.slice.partition(":")[2].split("x"))
        count = 1
        for side in sides:
            count *= side
        return count

    def command(self) -> list[str]:
        return [
            f"--config={MODELS[self.model][0]}", f"--topology={self.slice}", f"--mesh={self.mesh}",
            f"--config.batch_size={self.rows * self.chips}", "--config.accumulate=1",
            "--config.remat=true", "--program=train",
        ]  # fmt: skip


def cells(rows: int | None = None) -> Iterator[Cell]:
    for model, (_, usual) in MODELS.items():
        for where, mesh in SLICES.items():
            small = where[:3] in ("v4:", "v6e") and model.startswith("13b")
            if small and mesh == "data:1":
                continue  # weights of 28 GB on a chip of 32
            yield Cell(model, where, SPLIT.get(mesh, mesh) if small else mesh, rows or usual)
            if mesh in SPLIT and not small:
                yield Cell(model, where, SPLIT[mesh], rows or usual)


def compiled(cell: Cell) -> dict[str, Any]:
    """The figures of a cell, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "minigpt4_jax.compile", *cell.command(), f"--json={path}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if not path.exists():
            raise UserError(f"{cell.name}: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
        return json.loads(path.read_text())[0] | {"cell": cell.name, "chip_rows": cell.rows}


def kept(path: Path) -> dict[str, dict[str, Any]]:
    """What was compiled before, by the cell's name."""
    if not path.exists():
        return {}
    records = map(json.loads, path.read_text().splitlines())
    return {record["cell"]: record for record in records}


# --- the table --------------------------------------------------------------------------------


def row(r: dict[str, Any]) -> str:
    model, where, mesh, _ = r["cell"].split()
    memory = f"{r['peak'] / 1e9:.1f} of {r['hbm'] / 1e9:.1f}"
    head = f"| {model} | {where} | {mesh} | {r['chip_rows']} | {memory} |"
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
    for r in records.values():
        model, where, mesh, rows = r["cell"].split()
        many = {"data:8": "data:256", "fsdp:8": "data:32,fsdp:8"}.get(mesh)
        for other in records.values():
            same = other["cell"].split()
            alike = same[0] == model and same[2] == many and same[3] == rows
            if alike and same[1][:3] == where[:3] and "predicted" in r and "predicted" in other:
                share = r["predicted"]["seconds"] / other["predicted"]["seconds"]
                yield f"{model} {where[: where.index(':')]} {mesh} -> {many}: {share:.1%}"


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
        if cell.name not in found:
            found[cell.name] = compiled(cell)
            with args.out.open("a") as file:
                file.write(json.dumps(found[cell.name]) + "\n")
            print(row(found[cell.name]), flush=True)
    print("\n" + HEAD)
    print("\n".join(row(found[cell.name]) for cell in chosen))
    print("\nWeak scaling, 8 to 256 chips, predicted:")
    print("\n".join(scaling(found)) or "(no two cells to compare)")
    if not args.no_checkpoints:
        print("\nA checkpoint:", flush=True)
        subprocess.run(
            [sys.executable, str(Path(__file__).with_name("checkpointing.py"))], check=True
        )


if __name__ == "__main__":
    run(main)
