"""Roofline prediction of a program's time on chips that reach their published peaks.

Each instruction takes the longer of its matrix products at peak FLOP/s and its HBM traffic at peak
bandwidth. Overlapped collectives run beside the instructions, the others are added. No real program
reaches these peaks: the prediction is a lower bound for the program as compiled, and names its bottleneck.
"""

import math
from dataclasses import dataclass, replace

from minigpt4_jax.aot.chip import Chip
from minigpt4_jax.aot.cost import Collective, Cost
from minigpt4_jax.aot.topology import HOP_SECONDS
from minigpt4_jax.checkpoint.parameters import parameter_shapes
from minigpt4_jax.config import ModelConfig


@dataclass(frozen=True)
class Prediction:
    """Predicted time of one run of a program."""

    compute_seconds: float  # matrix products alone
    memory_seconds: float  # HBM traffic alone
    link_seconds: float  # collectives alone
    seconds: float  # all together
    bottleneck: str  # compute, memory or links
    mfu: float  # model FLOPs utilization: needed FLOPs over the peak of all chips


def predict(cost: Cost, chip: Chip, slice_shape: tuple[int, ...], model_flops: float) -> Prediction:
    """slice_shape: as (2, 4). model_flops: of all chips together, see `count_model_flops`."""
    memory = cost.hbm_bytes / chip.hbm_bandwidth
    times = [
        (i.mxu_flops / chip.flops, i.hbm_bytes / chip.hbm_bandwidth, i.count)
        for i in cost.instructions
        if not i.overlapped
    ]
    busy = max(memory, sum(max(product, traffic) * n for product, traffic, n in times))
    compute_bound = sum(product * n for product, traffic, n in times if product >= traffic)
    overlapped, exposed = (
        sum(
            _collective_seconds(c, chip, slice_shape) for c in cost.collectives if c.overlapped is o
        )
        for o in (True, False)
    )
    seconds = max(busy, overlapped) + exposed
    waits = {"compute": compute_bound, "memory": busy - compute_bound, "links": seconds - busy}
    peak_flops = chip.flops * math.prod(slice_shape)
    return Prediction(
        compute_seconds=sum(product * n for product, _, n in times),
        memory_seconds=memory,
        link_seconds=overlapped + exposed,
        seconds=seconds,
        bottleneck=max(waits, key=lambda name: waits[name]),
        mfu=model_flops / (seconds * peak_flops) if seconds else 0.0,
    )


def _collective_seconds(c: Collective, chip: Chip, slice_shape: tuple[int, ...]) -> float:
    """Time of all executions of a collective: ring bandwidth plus the latency of the hops."""
    ring_hops = min(c.group_size - 1, sum(slice_shape)) if c.group_size > 1 else 0
    hops = {"all-reduce": 2 * ring_hops, "collective-permute": 1}.get(c.kind, ring_hops)
    return c.count * (c.sent_bytes / chip.ring_bandwidth + hops * HOP_SECONDS)


def count_model_flops(
    config: ModelConfig, rows: int, tokens: int, labels: int, trained: frozenset[str] | None
) -> float:
    """FLOPs of the matrix products that a step requires, over all chips: the forward pass and the
    gradients of the trained parts, without recomputation.

    tokens, labels: of a row with one image. With an encoder these are its tokens and the decoder's.
    trained: trained parts; None: forward pass only.
    """
    config, total = replace(config, quantize=None, kept=()), 0.0
    vision_tokens = config.vision.patches + 1
    queries = config.qformer.queries if config.qformer else 0
    encodes = config.llm.encoder_layers > 0
    for name, shape in parameter_shapes(config).items():
        part = name.split(".")[0]
        if (not name.endswith(".weight") and ".lora_" not in name) or len(shape) != 2:
            continue
        if part == "qformer":
            positions = vision_tokens if ".cross.k" in name or ".cross.v" in name else queries
        elif part == "projection":
            positions = config.visual_tokens
        elif part == "llm":
            reads_prompt = not encodes or _reads_prompt(name)
            positions = tokens if reads_prompt and "head" not in name else labels
        else:
            positions = vision_tokens if part == "vit" else 0
        total += 2 * positions * math.prod(shape) * _products(name, part, trained)
    c, v = config.llm, config.vision
    if config.llm.tie:
        total += 2 * labels * c.vocab * c.width * (1 if trained is None else 2)
    # attention scores and weighted values; a causal row needs half of them
    total += 4 * vision_tokens**2 * v.width * v.depth * (3 if trained and "vit" in trained else 1)
    pairs = 2 * tokens**2 * c.layers
    if encodes:
        causal_and_cross = 2 * labels**2 + 4 * labels * tokens
        pairs = 4 * tokens**2 * c.encoder_layers + causal_and_cross * c.layers
    total += pairs * c.heads * c.head_dim * (1 if trained is None else 3)
    return total * rows


def _reads_prompt(name: str) -> bool:
    """Whether a parameter of an encoder-decoder processes the prompt, once for all tokens of an answer."""
    return name.startswith("llm.encoder") or ".cross.k." in name or ".cross.v." in name


def uses_parameter(program: str, name: str, config: ModelConfig) -> bool:
    """Whether encode, prefill or decode reads a parameter."""
    if not name.startswith("llm."):
        return program == "encode"
    if program == "decode" and config.llm.encoder_layers:
        return not _reads_prompt(name)
    return program != "encode"


def _products(name: str, part: str, trained: frozenset[str] | None) -> int:
    """Products with a matrix: forward, gradient of its input, gradient of the matrix."""
    if trained is None:
        return 1
    weight_gradient = ("lora" if ".lora_" in name else part) in trained
    trained_before = {
        "vit": False,
        "qformer": "vit" in trained,
        "projection": bool({"vit", "qformer"} & trained),
    }
    within_vit = part == "vit" and weight_gradient
    return 1 + (within_vit or trained_before.get(part, True)) + weight_gradient
