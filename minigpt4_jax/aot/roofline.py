"""How long a program would take on chips that do what is published of them.

Instruction by instruction: the longer of its products at the peak of the unit and its traffic at
the bandwidth of HBM. To that the exchanges between chips: those the compiler starts ahead run
beside the rest, the others wait. Peaks are not reached by anything real: what this predicts is the
shortest time that the program as compiled could take, and what it would wait for.
"""

import math
from dataclasses import dataclass, replace

from minigpt4_jax.aot.cost import Collective, Cost
from minigpt4_jax.aot.topology import HOP_SECONDS, Chip
from minigpt4_jax.checkpoint.weights import parameter_shapes
from minigpt4_jax.config import ModelConfig


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step on every chip."""

    compute: float  # products alone
    memory: float  # HBM alone
    links: float  # exchanges alone
    seconds: float  # of the step
    limit: str  # compute, memory or links: what most of it waits for
    share: float  # of the peak of all chips, by the operations that the step needs


def predict(cost: Cost, chip: Chip, sides: tuple[int, ...], needed: float) -> Prediction:
    """sides: of the slice, as (2, 4). needed: operations of all chips together, see `needed_flops`."""
    memory = cost.bytes / chip.bandwidth
    times = [
        (s.passes / chip.flops, s.bytes / chip.bandwidth, s.count)
        for s in cost.steps
        if not s.ahead
    ]
    busy = max(memory, sum(max(product, traffic) * n for product, traffic, n in times))
    products = sum(product * n for product, traffic, n in times if product >= traffic)
    beside = sum(_seconds(c, chip, sides) for c in cost.collectives if c.ahead)
    waiting = sum(_seconds(c, chip, sides) for c in cost.collectives if not c.ahead)
    seconds = max(busy, beside) + waiting
    exposed = seconds - busy
    waits = {"compute": products, "memory": busy - products, "links": exposed}
    return Prediction(
        compute=sum(product * n for product, _, n in times),
        memory=memory,
        links=beside + waiting,
        seconds=seconds,
        limit=max(waits, key=lambda name: waits[name]),
        share=needed / (seconds * chip.flops * math.prod(sides)) if seconds else 0.0,
    )


def _seconds(c: Collective, chip: Chip, sides: tuple[int, ...]) -> float:
    """Of all exchanges of one kind: bandwidth of a ring, and the way of the first byte."""
    around = min(c.group - 1, sum(sides)) if c.group > 1 else 0
    hops = {"all-reduce": 2 * around, "collective-permute": 1}.get(c.kind, around)
    return c.count * (c.sent / chip.ring + hops * HOP_SECONDS)


def needed_flops(
    config: ModelConfig, rows: int, tokens: int, labels: int, parts: frozenset[str] | None
) -> float:
    """Operations of products that a step cannot do without, of all chips together: forward, and the
    gradients that what is trained asks for; not what is computed again to save memory.

    tokens, labels: of a row with one image. parts: that are trained; None: forward alone.
    """
    config, total = replace(config, quantize=None, kept=()), 0.0
    seen = config.vision.patches + 1
    queries = config.qformer.queries if config.qformer else 0
    for name, shape in parameter_shapes(config).items():
        part = name.split(".")[0]
        if (not name.endswith(".weight") and ".lora_" not in name) or len(shape) != 2:
            continue
        if part == "qformer":
            many = seen if ".cross.k" in name or ".cross.v" in name else queries
        elif part == "projection":
            many = config.visual_tokens
        else:
            many = {"vit": seen, "llm": labels if "head" in name else tokens}.get(part, 0)
        total += 2 * many * math.prod(shape) * _passes(name, part, parts)
    c, v = config.llm, config.vision
    if config.llm.tie:
        total += 2 * labels * c.vocab * c.width * (1 if parts is None else 2)
    # scores and sums over values; of a causal row half
    total += 4 * seen**2 * v.width * v.depth * (3 if parts and "vit" in parts else 1)
    total += 2 * tokens**2 * c.heads * c.head_dim * c.layers * (1 if parts is None else 3)
    return total * rows


def _passes(name: str, part: str, parts: frozenset[str] | None) -> int:
    """Products with a matrix: forward, for the gradient of its input, for its own."""
    if parts is None:
        return 1
    own = ("lora" if ".lora_" in name else part) in parts
    before = {
        "vit": False,
        "qformer": "vit" in parts,
        "projection": bool({"vit", "qformer"} & parts),
    }
    first = part == "vit" and own
    return 1 + (first or before.get(part, True)) + own
