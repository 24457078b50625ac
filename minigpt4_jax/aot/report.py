"""One compiled program as figures: measured by the compiler, counted, predicted; as text and as JSON."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minigpt4_jax.aot import hlo
from minigpt4_jax.aot.compiler import Memory, TooLarge, compile_for_chip
from minigpt4_jax.aot.cost import Collective, Cost, cost_of
from minigpt4_jax.aot.roofline import Prediction, predict
from minigpt4_jax.aot.topology import Chip, chip_of, sides_of
from minigpt4_jax.training.mesh_selection import size_text

SHOWN = 8  # kinds of collectives in the text


@dataclass(frozen=True)
class Slice:
    """Where a program is for."""

    topology: str
    chips: int
    mesh: str
    why: str  # this mesh

    @property
    def chip(self) -> Chip:
        return chip_of(self.topology)


@dataclass(frozen=True)
class Figures:
    """Of one program on each chip of a slice."""

    program: str  # train, encode, prefill, decode
    what: str  # its sizes in words
    rows: int  # examples, images or rows that a run of it works on
    memory: Memory | None  # None: it does not fit
    beside: int  # bytes of HBM that other programs' weights hold meanwhile
    lacks: TooLarge | None
    cost: Cost | None
    needed: float  # operations of products that it cannot do without, of all chips together
    prediction: Prediction | None
    seconds: float  # that compiling took

    @property
    def peak(self) -> float:
        """Bytes of HBM."""
        return (self.memory.peak if self.memory else 0) + self.beside

    def fits(self, chip: Chip) -> bool:
        return self.memory is not None and self.peak <= chip.usable


def figures(
    program: str,
    what: str,
    rows: int,
    make: Callable[[], Any],
    where: Slice,
    *,
    needed: float,
    beside: int = 0,
    keep: Callable[[str], None] | None = None,
    code: bool = True,
) -> Figures:
    """Compile what `make` lowers, and count. keep: called with the program's text. code: as of
    `compile_for_chip`."""
    begun = time.perf_counter()
    found = compile_for_chip(make(), code=code)
    if isinstance(found, TooLarge):
        spent = time.perf_counter() - begun
        return Figures(program, what, rows, None, beside, found, None, needed, None, spent)
    text, memory = found
    if keep is not None:
        keep(text)
    cost = cost_of(hlo.parse(text))
    guess = predict(cost, where.chip, sides_of(where.topology), needed)
    spent = time.perf_counter() - begun
    return Figures(program, what, rows, memory, beside, None, cost, needed, guess, spent)


# --- text ---------------------------------------------------------------------------------------


def lines(f: Figures, where: Slice) -> list[str]:
    """What the command prints of a program."""
    chip = where.chip
    head = f"{f.program}: {f.what}"
    if f.memory is None or f.cost is None or f.prediction is None:
        assert f.lacks is not None
        return [head, f"  does not fit    {_lacks(f, chip)}"]
    m, c, p = f.memory, f.cost, f.prediction
    beside = f", other weights {_gb(f.beside)}" if f.beside else ""
    code = f", program {_gb(m.program)}" if m.program else ""
    verdict = "" if f.fits(chip) else f"; does not fit: {_gb(f.peak - chip.usable)} GB too many"
    found = [
        head,
        f"  HBM of a chip   {_gb(f.peak)} of {_gb(chip.usable)} GB{verdict} (arguments "
        f"{_gb(m.arguments)}, results {_gb(m.results)}, temporaries {_gb(m.temporaries)}{code}{beside})",
        f"  products        {c.flops / 1e12:.3g} TFLOP, {_ms(p.compute)} at {chip.flops / 1e12:.0f} "
        f"TFLOP/s; the step needs {f.needed / where.chips / 1e12:.3g}",
        f"  HBM traffic     {_gb(c.bytes)} GB, {_ms(p.memory)} at {chip.bandwidth / 1e9:.0f} GB/s",
        f"  links           {_gb(c.sent)} GB sent, {_ms(p.links)} at {chip.ring / 1e9:.0f} GB/s",
    ]
    found += [f"    {line}" for line in exchanges(c)]
    unit = "a token of each row" if f.program == "decode" else "a run"
    found.append(
        f"  predicted       {_ms(p.seconds)} {unit}, limited by {p.limit}; {p.share:.1%} of peak; "
        f"{f.rows / p.seconds:.3g} rows/s"
    )
    return found


def exchanges(c: Cost) -> list[str]:
    """The collectives, those that send most first."""
    found = [
        f"{x.count:6} x {x.kind} of {size_text(x.bytes)} among {x.group} chips, "
        f"{'beside other work' if x.ahead else 'waited for'}"
        for x in c.collectives[:SHOWN]
    ]
    rest = c.collectives[SHOWN:]
    if rest:
        sent = sum(x.sent * x.count for x in rest)
        found.append(f"{sum(x.count for x in rest):6} x others, {size_text(sent)} sent together")
    return found


def _lacks(f: Figures, chip: Chip) -> str:
    assert f.lacks is not None
    needed, room = f.lacks.needed + f.beside, f.lacks.available
    return (
        f"{_gb(needed)} GB of {_gb(room)} GB: {_gb(needed - room)} GB too many. Take more chips, "
        "a mesh with fsdp or model, fewer rows at once (config.accumulate), config.remat or --quantize"
    )


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


# --- JSON ---------------------------------------------------------------------------------------


def record(f: Figures, where: Slice) -> dict[str, Any]:
    """Plain values; bytes, seconds and operations of one chip, `needed_flops` of all."""
    found: dict[str, Any] = {
        "program": f.program, "what": f.what, "rows": f.rows, "topology": where.topology,
        "chips": where.chips, "mesh": where.mesh, "fits": f.fits(where.chip),
        "hbm": where.chip.usable, "peak": f.peak, "needed_flops": f.needed,
        "compile_seconds": round(f.seconds, 1),
    }  # fmt: skip
    if f.lacks is not None:
        return found | {"peak": f.lacks.needed + f.beside, "hbm": f.lacks.available}
    assert f.memory is not None and f.cost is not None and f.prediction is not None
    return found | {
        "memory": dataclasses.asdict(f.memory) | {"beside": f.beside},
        "flops": f.cost.flops,
        "bytes": f.cost.bytes,
        "sent": f.cost.sent,
        "collectives": [_plain(c) for c in f.cost.collectives],
        "predicted": dataclasses.asdict(f.prediction),
    }


def _plain(c: Collective) -> dict[str, Any]:
    return dataclasses.asdict(c) | {"sent": c.sent}
