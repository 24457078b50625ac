"""Compile training and inference for a TPU slice or for GPUs you do not have, from shapes alone.

Uses the real compilers (libtpu, JAX's CUDA plugin) and prints, for each chip: memory, FLOPs, memory
traffic, collectives, on a GPU kernels and copies of a step, and a roofline prediction of the time from the
chip's published peaks. Nothing is run.
"""

import json
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from minigpt4_jax import errors
from minigpt4_jax.config import KV_CACHES
from minigpt4_jax.errors import Parser, UserError

if TYPE_CHECKING:
    from minigpt4_jax.aot.job import Job
    from minigpt4_jax.aot.report import Report, Target

PROGRAMS = ("train", "encode", "prefill", "decode")


def main(args: Sequence[str] | None = None) -> int:
    """The command line; returns 0, or 1 if a program does not fit."""
    options, config_args = _parser().parse_known_args(args)
    programs = options.program.split(",")
    if unknown := [p for p in programs if p not in PROGRAMS]:
        raise UserError(f"--program={unknown[0]}: expected some of {', '.join(PROGRAMS)}")
    # Only the compiler is needed: do not look for a TPU or a GPU.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from minigpt4_jax.aot.job import parse_job
    from minigpt4_jax.aot.report import format_report, to_json

    job = parse_job(options, config_args)
    _check_output_paths(options.json, options.hlo)
    print(job.title(), flush=True)
    records, all_fit = [], True
    for report, target in (_find_max_batches if options.fill else _compile)(job, programs):
        print("\n".join(format_report(report, target)), flush=True)
        records.append(to_json(report, target))
        all_fit = all_fit and report.fits(target.chip)
        if options.json:
            Path(options.json).write_text(json.dumps(records, indent=1) + "\n")
    return 0 if all_fit else 1


def _check_output_paths(json_file: str | None, hlo_dir: str | None) -> None:
    """UserError if an output cannot be written, before anything is compiled."""
    file = Path(json_file) if json_file else None
    if file and (file.is_dir() or not os.access(file.parent, os.W_OK | os.X_OK)):
        raise UserError(f"--json={file}: expected a file in an existing, writable folder")
    try:
        if hlo_dir:
            Path(hlo_dir).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--hlo={hlo_dir}: cannot create this folder: {e.strerror}") from e


def _compile(job: "Job", programs: Sequence[str]) -> Iterator[tuple["Report", "Target"]]:
    previous_mesh = ""
    for program in programs:
        target = job.target(program)
        if target.mesh != previous_mesh:
            _print_mesh(target)
            previous_mesh = target.mesh
        yield job.compile(program), target


def _find_max_batches(job: "Job", programs: Sequence[str]) -> Iterator[tuple["Report", "Target"]]:
    from minigpt4_jax.aot.max_batch import find_max_batch

    for program in programs:
        report, target = find_max_batch(job, program, partial(print, flush=True))
        _print_mesh(target)
        yield report, target


def _print_mesh(target: "Target") -> None:
    print(f"mesh {target.mesh}, {target.mesh_reason}", flush=True)


def _parser() -> Parser:
    p = Parser(prog="python -m minigpt4_jax.compile", description=__doc__)
    p.add_argument("--topology", required=True, metavar="SLICE", help="v5e:2x4, h200:1, h100:8 ...")
    p.add_argument("--size", help="vicuna7b, v2, blip2-opt2.7b ... (default: the config's model)")
    p.add_argument("--mesh", help="as data:2,fsdp:4 (default: what a run would choose)")
    p.add_argument("--program", default="train,prefill,decode", help=", ".join(PROGRAMS))
    p.add_argument(
        "--tokens", type=int, help="per training row (default: enough for the longest answer)"
    )
    p.add_argument("--quantize-base", choices=("int8", "int4"), help="frozen weights, for training")
    p.add_argument("--quantize", choices=("int8", "int4"), help="weights, for inference")
    p.add_argument("--kv-cache", choices=KV_CACHES, help="for inference (default: bfloat16)")
    p.add_argument("--batch", type=int, default=1, help="rows, for inference (default: 1)")
    p.add_argument(
        "--context", type=int, default=2048, help="tokens per row, for inference (default: 2048)"
    )
    p.add_argument("--fill", action="store_true", help="find the largest batch, by powers of two")
    p.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    p.add_argument(
        "--code",
        action="store_true",
        help="generate machine code too: takes minutes, adds its size",
    )
    p.add_argument("--hlo", metavar="DIR", help="save the HLO text of the compiled programs here")
    p.epilog = (
        "--config=NAME[:ARG] and --config.KEY=VALUE are those of training (default: stage2); "
        "--config.model=DIR uses the sizes of that model"
    )
    return p


def _exit(code: int) -> NoReturn:
    from minigpt4_jax.aot.compiler import exit_without_waiting

    exit_without_waiting(code)


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and end the process; a UserError is one line on stderr."""
    errors.run(lambda: main(argv), _exit)
