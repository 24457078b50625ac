"""Memory of inference at full size, as planned by the TPU compiler; nothing is run.

    python benchmarks/decode_memory.py [--model=7b,13b,v2] [--precision=bfloat16,int8,int4]
        [--batch=1,8,32] [--context=2000] [--topology=v5p:1x1x1] [--jsonl=FILE] [--code]

Compiles the programs of inference with all layers by `python -m minigpt4_jax.compile` (libtpu,
`pip install '.[tpu]'`, compiles without a TPU): the vision encoder for one image, the prefill of one row of
`context` tokens, and the decoding loop over `batch` rows. Prints GB: weights (vision encoder and Q-Former
included); the KV cache of all rows, int8 if the weights are quantized, else bfloat16; the temporaries of each
program; and the peak, the most that a program needs together with what stays in memory meanwhile. During the
prefill of one row among several, the cache of all rows exists, and that of the new row in addition.

Records in --jsonl are not compiled again. Without --code no machine code is generated, which would take
minutes instead of seconds and add its own size.
"""

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

from common import RecordFile, Table, argument_parser, compile_figures

from minigpt4_jax.aot.presets import PRESETS
from minigpt4_jax.aot.programs import parameter_specs
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import UserError, run

MODELS = {"7b": "vicuna7b", "13b": "vicuna13b", "v2": "v2"}
PRECISIONS = {"bfloat16": None, "int8": "int8", "int4": "int4"}
# GB at batch 1
TARGETS = {("7b", "int8"): 9.0, ("13b", "int8"): 15.5, ("7b", "int4"): 5.5, ("13b", "int4"): 9.0}


def weight_bytes(config: ModelConfig) -> int:
    return sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in parameter_specs(config))


def cache_bytes(config: ModelConfig, rows: int, context: int) -> int:
    """int8 has a float32 scale for each vector."""
    c = config.llm
    vector = 2 * c.head_dim if config.quantize is None else c.head_dim + 4
    return 2 * c.layers * rows * c.kv_heads * context * vector


def program_figures(
    records: RecordFile, args: argparse.Namespace, model: str, precision: str, program: str, rows: int
) -> dict[str, Any]:  # fmt: skip
    """The record of one program, compiled if it is new; bytes."""
    scheme = PRECISIONS[precision]
    arguments = [
        f"--size={MODELS[model]}", f"--topology={args.topology}", f"--program={program}",
        f"--batch={rows}", f"--context={args.context}",
    ]  # fmt: skip
    arguments += [f"--quantize={scheme}", "--kv-cache=int8"] if scheme else []
    arguments += ["--code"] if args.code else []
    if (record := records.records.get(" ".join(arguments))) is None:
        record = compile_figures(arguments)
        if "memory" not in record:
            raise UserError(
                f"{' '.join(arguments)}: does not fit; use a larger chip for --topology"
            )
        records.add(record | {"args": arguments})
    return record


def measure(
    records: RecordFile, args: argparse.Namespace, model: str, precision: str, rows: int
) -> list[float]:
    """GB: weights, cache, temporaries of encode, prefill and decode, peak."""
    config = dataclasses.replace(PRESETS[MODELS[model]], quantize=PRECISIONS[precision]).check()
    encode, prefill, decode = (
        program_figures(
            records, args, model, precision, program, rows if program == "decode" else 1
        )
        for program in ("encode", "prefill", "decode")
    )
    cache = cache_bytes(config, rows, args.context)
    other_rows = cache if rows > 1 else 0  # exists while an image is encoded and a prompt is read
    temporaries = [r["memory"]["temporaries"] for r in (encode, prefill, decode)]
    peak = max(encode["peak"] + other_rows, prefill["peak"] + other_rows, decode["peak"])
    return [size / 1e9 for size in (weight_bytes(config), cache, *temporaries, peak)]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--model", default="7b,13b,v2")
    parser.add_argument("--precision", default="bfloat16,int8,int4")
    parser.add_argument("--batch", default="1,8,32")
    parser.add_argument("--context", type=int, default=2000)
    parser.add_argument("--topology", default="v5p:1x1x1")
    parser.add_argument("--jsonl", type=Path, help="records of compiled programs, one per line")
    parser.add_argument("--code", action="store_true", help="generate machine code too")
    args = parser.parse_args()
    models, precisions = args.model.split(","), args.precision.split(",")
    unknown = [m for m in models if m not in MODELS] + [
        p for p in precisions if p not in PRECISIONS
    ]
    if unknown:
        raise UserError(f"{unknown[0]!r}: expected {', '.join(MODELS)}; {', '.join(PRECISIONS)}")
    records = RecordFile(args.jsonl, key=lambda record: " ".join(record["args"]))
    print(f"GB on a chip of {args.topology}, context {args.context}")
    sizes = ("weights", "cache", "encode", "prefill", "decode", "peak", "target")
    table = Table(
        {"model": (6, ""), "precision": (10, ""), "batch": (6, "")}
        | dict.fromkeys(sizes, (9, ".3f"))
    )
    for model in models:
        for precision in precisions:
            for rows in map(int, args.batch.split(",")):
                target = TARGETS.get((model, precision)) if rows == 1 else None
                values = measure(records, args, model, precision, rows)
                table.row(model, precision, rows, *values, f"{target or ''}")


if __name__ == "__main__":
    run(main)
