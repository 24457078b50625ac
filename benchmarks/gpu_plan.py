"""What fits on which NVIDIA GPU, for chat and for training; no GPU is needed.

    python benchmarks/gpu_plan.py [--only=REGEX] [--out=gpu_plan.jsonl] [--list]

Compiles full-size programs by `python -m minigpt4_jax.compile --topology=h200:1` (`pip install '.[cuda]'`,
about half a minute each) and prints their memory, kernels and copies, and then a table of the cards that
hold them. From Ampere on the memory of a program hardly depends on the card, so it is compiled for an H200
alone. A T4 converts weights to float32 in memory: it is named only for cells that were compiled for it and
fit. Records are appended to --out and not compiled again, so the table can be made in parts.

Chat: the larger of a prefill of a prompt of 512 tokens a row, and of decoding, with a cache of 2,048 tokens a
row, and all weights. Training: LoRA of rank 16 and the projection, layers recomputed in the backward pass,
rows of 160 tokens (a stage-2 answer of 96).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import RecordFile, Table, argument_parser, compile_figures

from minigpt4_jax.aot import gpus
from minigpt4_jax.errors import run

CARD, T4 = "h200", "t4"
# What is also compiled for a T4: chat, (model, precision, rows).
ON_T4 = (
    ("vicuna7b", "int8", 1),
    ("vicuna7b", "int4", 1),
    ("vicuna7b", "int4", 8),
    ("vicuna13b", "int4", 1),
)
SIMILAR = 1.1  # cards whose memory differs by less are named together
MODELS = {"vicuna7b": "Vicuna 7B", "vicuna13b": "Vicuna 13B", "v2": "MiniGPT-v2"}
PRECISIONS = ("bfloat16", "int8", "int4")
LORA = ("--config.lora.rank=16", "--config.lora.alpha=16")


@dataclass(frozen=True)
class Cell:
    """One program of the table."""

    model: str
    precision: str
    program: str  # train, prefill, decode
    rows: int
    card: str = CARD

    @property
    def name(self) -> str:
        card = "" if self.card == CARD else f" {self.card}"
        return f"{self.model} {self.precision} {self.program} {self.rows}{card}"

    @property
    def arguments(self) -> list[str]:
        quantized = self.precision != "bfloat16"
        common = [f"--topology={self.card}:1", f"--program={self.program}"]
        if self.program == "train":
            lora = () if self.model == "v2" else LORA
            config = {"v2": "v2_stage3"}.get(self.model, f"stage2:{self.model}")
            tokens = "--tokens=416" if self.model == "v2" else "--tokens=160"
            return [
                *common, f"--config={config}", tokens, "--config.remat=true", "--config.accumulate=1",
                f"--config.batch_size={self.rows}", *lora,
                *([f"--quantize-base={self.precision}"] if quantized else []),
            ]  # fmt: skip
        context = 512 if self.program == "prefill" else 2048
        return [
            *common, f"--size={self.model}", f"--batch={self.rows}", f"--context={context}",
            *([f"--quantize={self.precision}"] if quantized else []),
        ]  # fmt: skip


def cells() -> Iterator[Cell]:
    """All programs of the tables."""
    for model in MODELS:
        for precision in PRECISIONS:
            for rows in (1, 8):
                yield Cell(model, precision, "decode", rows)
                yield Cell(model, precision, "prefill", rows)
    for model in MODELS:
        for precision in PRECISIONS:
            for rows in (1, 4, 12):
                yield Cell(model, precision, "train", rows)
    for model, precision, rows in ON_T4:
        for program in ("prefill", "decode"):
            yield Cell(model, precision, program, rows, T4)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--only",
        default="",
        metavar="REGEX",
        help="cells whose name this regular expression matches: 'vicuna7b int4'",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="records, also read by the next run"
    )
    parser.add_argument("--list", action="store_true", help="print the cells, compile nothing")
    options = parser.parse_args()
    chosen = [cell for cell in cells() if re.search(options.only, cell.name)]
    if options.list:
        print("\n".join(cell.name for cell in chosen))
        return
    file = RecordFile(options.out, lambda record: str(record["cell"]))
    table = Table({"cell": (34, ""), "GB": (8, ".2f"), "temporaries MB": (16, ".1f"), "kernels": (9, "d"),
                   "of arguments": (14, "d"), "roofline ms": (13, ".2f"), "XLA s": (7, ".1f")})  # fmt: skip
    for cell in chosen:
        record = file.records.get(cell.name)
        if record is None:
            record = file.add({"cell": cell.name} | compile_figures(cell.arguments))
        table.row(
            cell.name, record["peak"] / 1e9, record["memory"]["temporaries"] / 1e6,
            record["kernels"]["count"], record["kernels"]["argument_copies"],
            record["predicted"]["seconds"] * 1e3, record["xla_seconds"],
        )  # fmt: skip
    _print_cards(file.records)


def _print_cards(records: dict[str, dict[str, Any]]) -> None:
    """Markdown: what each precision and number of rows needs, and the smallest cards that have it."""
    for use, programs in (("chat", ("prefill", "decode")), ("train", ("train",))):
        print(f"\n| {use} | rows | memory | smallest cards |\n|---|---|---|---|")
        for model, title in MODELS.items():
            for precision in PRECISIONS:
                for rows in (1, 4, 8, 12):
                    peak = _peak(records, model, precision, programs, rows, CARD)
                    if peak is None:
                        continue
                    on_t4 = _peak(records, model, precision, programs, rows, T4)
                    cards = _smallest_cards(peak, on_t4)
                    print(f"| {title}, {precision} | {rows} | {peak / 1e9:.1f} GB | {cards} |")


def _peak(
    records: dict[str, dict[str, Any]],
    model: str,
    precision: str,
    programs: Sequence[str],
    rows: int,
    card: str,
) -> float | None:
    """The most that one of the programs needs, bytes; None unless all are compiled."""
    found = {p: records.get(Cell(model, precision, p, rows, card).name) for p in programs}
    peaks = []
    for program, record in found.items():
        if record is None:
            return None
        peaks.append(float(record["peak"]))
        decode = found.get("decode")
        if program == "prefill" and decode:  # a cache of 512 tokens here, of 2,048 while decoding
            peaks[-1] += 0.75 * (decode["memory"]["arguments"] - record["memory"]["arguments"])
    return max(peaks)


def _smallest_cards(peak: float, on_t4: float | None) -> str:
    """The cards with the least memory that hold a program. on_t4: what it needs on a T4, if that is known."""
    needed = {name: on_t4 if name == T4 else peak for name in gpus.CHIPS}
    fitting = [c for name, c in gpus.CHIPS.items() if (n := needed[name]) and n <= c.usable_hbm]
    if not fitting:
        return "none"
    limit = SIMILAR * min(c.hbm_bytes for c in fitting)
    return ", ".join(c.name for c in fitting if c.hbm_bytes <= limit)


if __name__ == "__main__":
    run(main)
