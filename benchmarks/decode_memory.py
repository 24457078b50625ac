"""Memory of answering at full size, as the compiler for TPUs plans it; no weights are made.

    python benchmarks/decode_memory.py [--model=7b,13b,v2] [--precision=bfloat16,int8,int4]
        [--batch=1,8,32] [--context=2000] [--topology=v5p:1x1x1] [--jsonl=FILE] [--code]

compiles the programs that run, all layers of them, with `python -m minigpt4_jax.compile`
(libtpu, `pip install '.[tpu]'`, makes programs for TPUs without one): the vision encoder on one
image, the prefill of one row of `context` tokens, and the decoding loop over `batch` rows. Columns,
in GB: what lies there, weights (visual encoder and Q-Former included) and the cache of all rows, in
int8 where the weights are rounded, else in bfloat16; the temporaries of each program; and peak, the
most that one of the programs and what lies beside it take.
While a row among several is read, the cache of all of them is there, and its own is made beside it.
Figures that are in --jsonl already are not compiled again. Without --code no machine code is made,
which takes minutes instead of seconds and adds its own size.
"""

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from minigpt4_jax.aot.presets import PRESETS
from minigpt4_jax.aot.programs import parameter_specs
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import Parser, UserError, run

MODELS = {"7b": "vicuna7b", "13b": "vicuna13b", "v2": "v2"}
PRECISIONS = {"bfloat16": None, "int8": "int8", "int4": "int4"}
TARGETS = {("7b", "int8"): 9.0, ("13b", "int8"): 15.5, ("7b", "int4"): 5.5, ("13b", "int4"): 9.0}


def weights_of(config: ModelConfig) -> int:
    """Bytes of all parameters."""
    return sum(math.prod(shape) * kind.itemsize for _, shape, kind in parameter_specs(config))


def cache_of(config: ModelConfig, rows: int, context: int) -> int:
    """Bytes; int8 has a float32 scale for each vector."""
    c = config.llm
    vector = 2 * c.head_dim if config.quantize is None else c.head_dim + 4
    return 2 * c.layers * rows * c.kv_heads * context * vector


class Compiler:
    """Programs compiled by a process each, as the compiler works on behind its plan; those of a file
    are not compiled again."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.file = options, options.jsonl
        self.found: dict[str, Any] = {}
        if self.file and self.file.exists():
            records = map(json.loads, self.file.read_text().splitlines())
            self.found = {" ".join(record["args"]): record for record in records}

    def figures(self, model: str, precision: str, program: str, rows: int) -> dict[str, Any]:
        """What the command finds, bytes."""
        scheme, o = PRECISIONS[precision], self.options
        args = [
            f"--size={MODELS[model]}", f"--topology={o.topology}", f"--program={program}",
            f"--batch={rows}", f"--context={o.context}",
        ]  # fmt: skip
        args += [f"--quantize={scheme}", "--kv-cache=int8"] if scheme else []
        args += ["--code"] if o.code else []
        name = " ".join(args)
        if name not in self.found:
            self.found[name] = self._compiled(args)
            if self.file:
                with self.file.open("a") as file:
                    file.write(json.dumps(self.found[name]) + "\n")
        return self.found[name]

    def _compiled(self, args: list[str]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "figures.json"
            command = [sys.executable, "-m", "minigpt4_jax.compile", *args, f"--json={path}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if not path.exists():
                told = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
                raise UserError(f"{' '.join(args)}: {told[-1]}")
            (record,) = json.loads(path.read_text())
        if "memory" not in record:
            raise UserError(f"{' '.join(args)}: does not fit; take a larger chip for --topology")
        return record | {"args": args}


def measure(
    compiler: Compiler, model: str, precision: str, rows: int, context: int
) -> dict[str, float]:
    """GB by column."""
    config = dataclasses.replace(PRESETS[MODELS[model]], quantize=PRECISIONS[precision]).check()
    encode, prefill = (
        compiler.figures(model, precision, program, 1) for program in ("encode", "prefill")
    )
    decode = compiler.figures(model, precision, "decode", rows)
    cache = cache_of(config, rows, context)
    others = cache if rows > 1 else 0  # lies there while an image is encoded and a prompt is read
    columns = {
        "weights": weights_of(config), "cache": cache,
        "encode": encode["memory"]["temporaries"], "prefill": prefill["memory"]["temporaries"],
        "decode": decode["memory"]["temporaries"],
        "peak": max(encode["peak"] + others, prefill["peak"] + others, decode["peak"]),
    }  # fmt: skip
    return {name: value / 1e9 for name, value in columns.items()}


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="7b,13b,v2")
    parser.add_argument("--precision", default="bfloat16,int8,int4")
    parser.add_argument("--batch", default="1,8,32")
    parser.add_argument("--context", type=int, default=2000)
    parser.add_argument("--topology", default="v5p:1x1x1")
    parser.add_argument("--jsonl", type=Path, help="kept figures, a line for each program")
    parser.add_argument("--code", action="store_true")
    a = parser.parse_args()
    names, precisions = a.model.split(","), a.precision.split(",")
    batches = [int(batch) for batch in a.batch.split(",")]
    if unknown := [n for n in names if n not in MODELS] + [
        p for p in precisions if p not in PRECISIONS
    ]:
        raise UserError(f"{unknown[0]!r}: expected {', '.join(MODELS)}; {', '.join(PRECISIONS)}")
    compiler = Compiler(a)
    print(f"GB of a chip of {a.topology}, context {a.context}")
    columns = ("weights", "cache", "encode", "prefill", "decode", "peak", "target")
    print(f"{'model':6}{'precision':10}{'batch':>6}" + "".join(f"{c:>9}" for c in columns))
    for name in names:
        for precision in precisions:
            for rows in batches:
                values = measure(compiler, name, precision, rows, a.context)
                numbers = "".join(f"{v:9.3f}" for v in values.values())
                target = TARGETS.get((name, precision), "") if rows == 1 else ""
                print(f"{name:6}{precision:10}{rows:6}{numbers}{target:>9}", flush=True)


if __name__ == "__main__":
    run(main)
