"""What a run would take on a TPU slice that is not there: `python -m minigpt4_jax.compile ...`.

Compiles the training step and the programs of answering with the real compiler for TPUs, from
shapes alone, and prints memory, operations, traffic and exchanges of a chip, with the time
that the chip's published figures would allow.
"""

import json
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from minigpt4_jax import errors
from minigpt4_jax.errors import Parser, UserError

if TYPE_CHECKING:
    from minigpt4_jax.aot.job import Job

PROGRAMS = ("train", "encode", "prefill", "decode")


def main(args: Sequence[str] | None = None) -> int:
    """The command line; returns 0, or 1 when a program does not fit."""
    options, rest = _parser().parse_known_args(args)
    if unknown := [p for p in options.program.split(",") if p not in PROGRAMS]:
        raise UserError(f"--program={unknown[0]}: expected some of {', '.join(PROGRAMS)}")
    # No TPU is to be looked for: the compiler alone is wanted of libtpu.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from minigpt4_jax.aot import report
    from minigpt4_jax.aot.job import read

    job = read(options, rest)
    _check_outputs(options.json, options.hlo)
    print(job.title(), flush=True)
    records, fits = [], True
    programs = options.program.split(",")
    for where, figures in _filled(job, programs) if options.fill else _each(job, programs):
        print("\n".join(report.lines(figures, where)), flush=True)
        records.append(report.record(figures, where))
        fits = fits and figures.fits(where.chip)
        if options.json:
            Path(options.json).write_text(json.dumps(records, indent=1) + "\n")
    return 0 if fits else 1


def _check_outputs(json_file: str | None, folder: str | None) -> None:
    """UserError where a file could not be written, said before anything is compiled."""
    file = Path(json_file) if json_file else None
    if file and (file.is_dir() or not os.access(file.parent, os.W_OK | os.X_OK)):
        raise UserError(f"--json={file}: expected a file in a folder that is there and writable")
    try:
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--hlo={folder}: cannot make this folder: {e.strerror}") from e


def _each(job: "Job", programs: Sequence[str]) -> Iterator[Any]:
    last = ""
    for program in programs:
        where = job.place(program)
        if where.mesh != last:
            print(f"mesh {where.mesh}, {where.why}", flush=True)
            last = where.mesh
        yield where, job.figures(program)


def _filled(job: "Job", programs: Sequence[str]) -> Iterator[Any]:
    from minigpt4_jax.aot import max_batch

    for program in programs:
        figures, where = max_batch.fullest(job, program, partial(print, flush=True))
        print(f"mesh {where.mesh}, {where.why}", flush=True)
        yield where, figures


def _parser() -> Parser:
    p = Parser(prog="python -m minigpt4_jax.compile", description=__doc__)
    p.add_argument("--topology", required=True, metavar="SLICE", help="v5e:2x4, v5p:2x2x1 ...")
    p.add_argument("--size", help="vicuna7b, vicuna13b, llama2 or v2; by default the config's")
    p.add_argument("--mesh", help="as data:2,fsdp:4; by default what a run would choose")
    p.add_argument("--program", default="train,prefill,decode", help=", ".join(PROGRAMS))
    p.add_argument("--tokens", type=int, help="of a training row; by default of the longest answer")
    p.add_argument("--quantize", choices=("int8", "int4"), help="weights, for answering")
    p.add_argument("--kv-cache", choices=("int8",), help="for answering")
    p.add_argument("--batch", type=int, default=1, help="rows that answer together")
    p.add_argument("--context", type=int, default=2048, help="tokens of a row when answering")
    p.add_argument("--fill", action="store_true", help="as many rows as fit, by powers of two")
    p.add_argument("--json", metavar="FILE", help="write the figures there as well")
    p.add_argument("--code", action="store_true", help="machine code too: minutes, and its size")
    p.add_argument("--hlo", metavar="DIR", help="keep the compiled programs' text there")
    p.epilog = (
        "--config=NAME[:ARG] and --config.KEY=VALUE are those of training, by default stage2; "
        "--config.model=DIR takes the sizes of that model"
    )
    return p


def _leave(code: int) -> NoReturn:
    from minigpt4_jax.aot.compiler import leave

    leave(code)


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and end the process; a UserError is one line on stderr."""
    errors.run(lambda: main(argv), _leave)
