"""Initial values of Q-Former parameters that no file has (BERT's and LAVIS' initialization)."""

import math
from collections.abc import Mapping

import numpy as np

BERT_STD = 0.02
TEMPERATURE = 0.07
_HEADS = ("vision_projection", "text_projection", "itm_head")  # initialized as torch.nn.Linear


def initial_qformer(
    name: str, shapes: Mapping[str, tuple[int, ...]], rng: np.random.Generator
) -> np.ndarray:
    """float32 values of the parameter `name`. shapes: of all parameters."""
    shape = shapes[name]
    module, _, kind = name.rpartition(".")
    if kind == "temperature":
        return np.full(shape, TEMPERATURE, np.float32)
    if module.rpartition(".")[2] in _HEADS:
        bound = 1 / math.sqrt(shapes[f"{module}.weight"][-1])
        return rng.uniform(-bound, bound, shape).astype(np.float32)
    if kind in ("scale", "bias"):
        return np.full(shape, kind == "scale", np.float32)
    return rng.normal(0, BERT_STD, shape).astype(np.float32)
