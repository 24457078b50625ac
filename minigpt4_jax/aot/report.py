"""Memory, cost and predicted time of one compiled program, as text and as JSON."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minigpt4_jax.aot import hlo
from minigpt4_jax.aot.chip import Chip
from minigpt4_jax.aot.compiler import Memory, OutOfMemory, compile_lowered
from minigpt4_jax.aot.cost import Collective, Cost, cost_of
from minigpt4_jax.aot.kernels import Kernels, kernels_of
from minigpt4_jax.aot.roofline import Prediction, predict
from minigpt4_jax.aot.topology import chip_of, slice_shape
from minigpt4_jax.utils.text import format_bytes

MAX_COLLECTIVES = 8  # listed in the text


@dataclass(frozen=True)
class Target:
    """What a program is compiled for: a slice or GPUs, and a mesh over them."""

    topology: str
    num_chips: int
    mesh: str
    mesh_reason: str  # why this mesh

    @property
    def chip(self) -> Chip:
        return chip_of(self.topology)


@dataclass(frozen=True)
class Report:
    """Figures of one program, per chip of its slice, or per GPU."""

    program: str  # train, encode, prefill, decode
    description: str  # batch and sequence sizes in words
    rows: int  # examples, images or sequences of one run
    memory: Memory | None  # None: out of memory
    other_weights: int  # bytes of HBM held by weights that the program does not use
    out_of_memory: OutOfMemory | None
    cost: Cost | None
    model_flops: float  # FLOPs that the program requires, over all chips
    prediction: Prediction | None
    compile_seconds: float  # with tracing, lowering and counting
    xla_seconds: float = 0.0  # of the compiler alone
    kernels: Kernels | None = None  # on a GPU

    @property
    def peak(self) -> float:
        """Bytes of HBM that the program and the other weights need."""
        needed = self.out_of_memory.needed if self.out_of_memory else 0
        return (self.memory.peak if self.memory else needed) + self.other_weights

    def fits(self, chip: Chip) -> bool:
        return self.memory is not None and self.peak <= chip.usable_hbm


def compile_and_report(
    program: str,
    description: str,
    rows: int,
    lower: Callable[[], Any],
    target: Target,
    *,
    model_flops: float,
    other_weights: int = 0,
    save_hlo: Callable[[str], Any] | None = None,
    machine_code: bool = True,
) -> Report:
    """Compile the program that `lower` returns and analyze it. save_hlo: called with the HLO text.
    machine_code: as in `compile_lowered`."""
    start = time.perf_counter()
    compiled = compile_lowered(lower(), machine_code=machine_code)
    memory = out_of_memory = cost = prediction = kernels = None
    xla_seconds = 0.0
    if isinstance(compiled, OutOfMemory):
        out_of_memory = compiled
    else:
        memory = compiled.memory
        if save_hlo is not None:
            save_hlo(compiled.hlo_text)
        module, xla_seconds = hlo.parse(compiled.hlo_text), compiled.seconds
        cost = cost_of(module)
        if target.chip.platform == "gpu":
            kernels = kernels_of(module)
        prediction = predict(cost, target.chip, slice_shape(target.topology), model_flops)
    return Report(
        program, description, rows, memory, other_weights, out_of_memory, cost, model_flops,
        prediction, time.perf_counter() - start, xla_seconds, kernels,
    )  # fmt: skip


# --- text ---------------------------------------------------------------------------------------


def format_report(r: Report, target: Target) -> list[str]:
    """Lines that the command prints for a program."""
    chip = target.chip
    title = f"{r.program}: {r.description}"
    if r.memory is None or r.cost is None or r.prediction is None:
        return [title, f"  does not fit    {_format_shortage(r)}"]
    m, c, p = r.memory, r.cost, r.prediction
    other = f", other weights {_gb(r.other_weights)}" if r.other_weights else ""
    code = f", program {_gb(m.program)}" if m.program else ""
    verdict = "" if r.fits(chip) else f"; does not fit: {_gb(r.peak - chip.usable_hbm)} GB too many"
    memory, traffic = "HBM per chip", "HBM traffic"
    if chip.platform == "gpu":
        memory, traffic = "memory per GPU", "memory traffic"
    unit = "a token of each row" if r.program == "decode" else "a run"
    return [
        title,
        f"  {memory:16}{_gb(r.peak)} of {_gb(chip.usable_hbm)} GB{verdict} (arguments "
        f"{_gb(m.arguments)}, results {_gb(m.results)}, temporaries {_gb(m.temporaries)}{code}{other})",
        f"  matmuls         {c.flops / 1e12:.3g} TFLOP, {_ms(p.compute_seconds)} at "
        f"{chip.flops / 1e12:.0f} TFLOP/s; required {r.model_flops / target.num_chips / 1e12:.3g}",
        *([] if r.kernels is None else [_format_kernels(r)]),
        f"  {traffic:16}{_gb(c.hbm_bytes)} GB, {_ms(p.memory_seconds)} at "
        f"{chip.hbm_bandwidth / 1e9:.0f} GB/s",
        f"  links           {_gb(c.sent_bytes)} GB sent, {_ms(p.link_seconds)} at "
        f"{chip.ring_bandwidth / 1e9:.0f} GB/s",
        *(f"    {line}" for line in format_collectives(c)),
        f"  predicted       {_ms(p.seconds)} {unit}, limited by {p.bottleneck}; {p.mfu:.1%} of peak; "
        f"{r.rows / p.seconds:.3g} rows/s",
    ]


def _format_kernels(r: Report) -> str:
    assert r.kernels is not None
    k, step = r.kernels, "a token" if r.program == "decode" else "a run"
    return (
        f"  kernels         {k.count} {step}, {k.library_calls} of them library calls; {k.copies} copies "
        f"of {format_bytes(k.copied_bytes)}, of arguments {k.argument_copies} of "
        f"{format_bytes(k.argument_copied_bytes)}; compiled in {r.xla_seconds:.1f} s"
    )


def format_collectives(c: Cost) -> list[str]:
    """One line per kind of collective, those that send most first."""
    lines = [
        f"{x.count:6} x {x.kind} of {format_bytes(x.bytes)} among {x.group_size} chips, "
        f"{'overlapped' if x.overlapped else 'exposed'}"
        for x in c.collectives[:MAX_COLLECTIVES]
    ]
    rest = c.collectives[MAX_COLLECTIVES:]
    if rest:
        sent = sum(x.sent_bytes * x.count for x in rest)
        lines.append(f"{sum(x.count for x in rest):6} x others, {format_bytes(sent)} sent in total")
    return lines


def _format_shortage(r: Report) -> str:
    assert r.out_of_memory is not None
    available = r.out_of_memory.available
    return (
        f"{_gb(r.peak)} GB of {_gb(available)} GB: {_gb(r.peak - available)} GB too many. Use more "
        "chips, a mesh with fsdp or model, fewer rows at once (config.accumulate), config.remat or --quantize"
    )


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


# --- JSON: the keys are read by scripts and stay as they are --------------------------------------


def to_json(r: Report, target: Target) -> dict[str, Any]:
    """Plain values: bytes, seconds and FLOPs of one chip, except `needed_flops`, of all chips."""
    hbm = r.out_of_memory.available if r.out_of_memory else target.chip.usable_hbm
    values: dict[str, Any] = {
        "program": r.program, "what": r.description, "rows": r.rows, "topology": target.topology,
        "chips": target.num_chips, "mesh": target.mesh, "fits": r.fits(target.chip),
        "hbm": hbm, "peak": r.peak, "needed_flops": r.model_flops,
        "compile_seconds": round(r.compile_seconds, 1),
    }  # fmt: skip
    if r.memory is None or r.cost is None or r.prediction is None:
        return values
    if r.kernels is not None:
        values["kernels"] = dataclasses.asdict(r.kernels)
        values["xla_seconds"] = round(r.xla_seconds, 1)
    return values | {
        "memory": dataclasses.asdict(r.memory) | {"beside": r.other_weights},
        "flops": r.cost.flops,
        "bytes": r.cost.hbm_bytes,
        "sent": r.cost.sent_bytes,
        "collectives": [_collective_to_json(c) for c in r.cost.collectives],
        "predicted": _prediction_to_json(r.prediction),
    }


def _collective_to_json(c: Collective) -> dict[str, Any]:
    return {
        "kind": c.kind, "group": c.group_size, "bytes": c.bytes, "count": c.count,
        "ahead": c.overlapped, "sent": c.sent_bytes,
    }  # fmt: skip


def _prediction_to_json(p: Prediction) -> dict[str, Any]:
    return {
        "compute": p.compute_seconds, "memory": p.memory_seconds, "links": p.link_seconds,
        "seconds": p.seconds, "limit": p.bottleneck, "share": p.mfu,
    }  # fmt: skip
