"""Measures this machine's GPU within six minutes, the most wanted figures first.

    python benchmarks/gpu.py [--size=vicuna7b] [--out=gpu.json] [--parts=REGEX] [--minutes=6] [--slow=1]

Every part runs in a process of its own with a time limit, and prints its figures line by line as they are
measured; --out holds them too, after every line. Weights are random and made on the device. The ceilings
(a matrix product, reading and copying memory, copying to the device) are measured in the same run, and
figures are followed by their share of them. Whatever happens, the command ends after --minutes: parts that
take too long are ended, those that are left are named. PyTorch runs the same step and `generate` of
transformers, if torch is installed.

On a machine without a GPU use --size=tiny; the figures then only say that it works.
"""

import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import argument_parser

from minigpt4_jax.errors import UserError, run
from minigpt4_jax.storage.atomic import write_text_atomically
from minigpt4_jax.utils.text import shorten

# name -> seconds at most. Most wanted first; "second start" uses the programs of "decode bfloat16".
PARTS = {
    "ceilings": 40,
    "decode bfloat16": 75,
    "decode int8": 60,
    "decode int4": 60,
    "step": 80,
    "second start": 45,
    "prefill": 50,
    "encode": 45,
    "step float8": 60,
    "step packed": 60,
    "step remat": 60,
    "answers": 60,
    "torch generate": 60,
    "torch step": 60,
    "torch compiled": 75,
}
MARK = "figure "  # begins the lines of a part's process that hold a figure


@dataclass
class Results:
    """Figures so far, written to a file after each one."""

    path: Path | None
    start: float
    figures: list[dict[str, Any]] = field(default_factory=list)
    problems: dict[str, str] = field(
        default_factory=dict
    )  # part -> why it is missing or incomplete

    def add(self, part: str, figure: dict[str, Any]) -> None:
        figure = {"part": part, **figure}
        self.figures.append(figure)
        self.say(f"{part:16} {figure['name']:34} {figure['value']:10.4g} {figure['unit']:9}"
                 f"{self._share(figure)}")  # fmt: skip
        self._write()

    def fail(self, part: str, why: str) -> None:
        self.problems[part] = why
        self.say(f"{part:16} {why}")
        self._write()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:6.1f}] {text}".rstrip(), flush=True)

    def _share(self, figure: dict[str, Any]) -> str:
        """The share of a ceiling, for figures that have one."""
        rate, ceiling = figure.get("rate"), figure.get("ceiling")
        limit = next((f["value"] for f in self.figures if f["name"] == ceiling), None)
        if not rate or not limit:
            return ""
        figure["share"] = rate / limit
        return f"{rate / limit:6.1%} of {ceiling}"

    def _write(self) -> None:
        if self.path is not None:
            record = {"figures": self.figures, "missing": self.problems}
            write_text_atomically(self.path, json.dumps(record, indent=1) + "\n")


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--size", default="vicuna7b", help="vicuna7b, smollm2 or tiny (default: vicuna7b)"
    )
    parser.add_argument("--layers", type=int, help="of the language model (default: all)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="also write the figures here, as JSON"
    )
    parser.add_argument(
        "--parts", default="", metavar="REGEX",
        help=f"only parts whose name it matches, of: {', '.join(PARTS)}",
    )  # fmt: skip
    parser.add_argument(
        "--minutes", type=float, default=6.0, help="end after this long, at the latest (default: 6)"
    )
    parser.add_argument(
        "--slow", type=float, default=1.0,
        help="multiplies the time limit of each part, for slow machines (default: 1)",
    )  # fmt: skip
    options = parser.parse_args()
    chosen = [part for part in PARTS if re.search(options.parts, part)]
    if not chosen:
        raise UserError(f"--parts={options.parts}: expected some of {', '.join(PARTS)}")
    start = time.monotonic()
    deadline = start + 60 * options.minutes - 5  # ending the last process takes a while
    results = Results(options.out, start)
    model = [options.size, str(options.layers or 0)]
    with tempfile.TemporaryDirectory() as cache:
        for part in chosen:
            left = deadline - time.monotonic()
            if left < 5:
                results.fail(part, "not measured: no time is left")
                continue
            _run_part(part, model, cache, min(PARTS[part] * options.slow, left), results)
    return 0 if results.figures else 1


def _run_part(part: str, model: list[str], cache: str, limit: float, results: Results) -> None:
    """Measure one part in a process that is ended after `limit` seconds."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92"),
    }
    script = "gpu_torch.py" if part.startswith("torch") else "gpu_parts.py"
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name(script)), part, *model],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read_lines, args=(process, lines), daemon=True).start()
    end, last = time.monotonic() + limit, "no output"
    try:
        while (line := lines.get(timeout=max(0.0, end - time.monotonic()))) is not None:
            if line.startswith(MARK):
                results.add(part, json.loads(line.removeprefix(MARK)))
            elif line.strip():
                last = line.strip()
        if process.wait() != 0:
            results.fail(part, f"failed: {shorten(last, 200)}")
    except queue.Empty:
        results.fail(part, f"ended after {limit:.0f} s")
    finally:
        process.kill()
        process.wait()


def _read_lines(process: "subprocess.Popen[str]", lines: "queue.Queue[str | None]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


if __name__ == "__main__":
    run(main)
