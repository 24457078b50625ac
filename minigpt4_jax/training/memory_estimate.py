"""How much memory of a device a training step will take, estimated before anything is compiled.

What lies there from step to step is exact, from shapes and from the table of minigpt4_jax.parallel.sharding.
Of what is there during a step only the large arrays are counted, so that it may be wrong by a tenth; compared
with what the compiler for TPUs asks for in tests/training/test_memory.py.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from minigpt4_jax.checkpoint.loader import DTYPES, parameter_dtype
from minigpt4_jax.checkpoint.parameters import abstract_model, part_of
from minigpt4_jax.config import LlmConfig, ModelConfig
from minigpt4_jax.parallel.sharding import parameter_spec
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.train_step import trained_parts

PROMPT = 48  # tokens around the visual ones and the answer where rows have a question

# Arrays of one size that a layer's backward pass holds at once, by what the compiler for TPUs takes.
SCORES = 2  # [B, N, T, T] float32
WIDE = 3  # [B, T, F] in the weights' type
RESIDUALS = 3  # [B, T, D] float32
LOGITS = 2  # [B, A, V] float32


class Shape(NamedTuple):
    """What a batch is padded to."""

    rows: int
    tokens: int  # T, the visual ones included
    labels: int  # A


@dataclass(frozen=True)
class Need:
    """Bytes of a device."""

    weights: int  # frozen
    trained: int  # float32: masters, and the two moments of AdamW
    batch: int
    kept: int  # of every layer for the backward pass
    working: int  # beside that, where it is most

    @property
    def total(self) -> int:
        return self.weights + self.trained + self.batch + self.kept + self.working


def longest(c: TrainConfig, config: ModelConfig, tokens: int | None = None) -> Shape:
    """Rows of the longest answer that a configuration lets in, with one image. tokens: T, instead."""
    pad, answer = c.data, config.max_text_length
    asked = PROMPT if pad.prompts or pad.mix else 1
    usual = pad.pack_tokens or _up(config.visual_tokens + asked + answer, pad.pad_tokens)
    tokens = tokens or usual
    return Shape(c.batch_size, tokens, min(_up(answer, pad.pad_answers), tokens))


def estimate(c: TrainConfig, config: ModelConfig, sizes: dict[str, int]) -> Need:
    """What a step of a run needs on a mesh of these sizes, with rows of the longest answer."""
    parts = trained_parts(freeze_vit=c.freeze_vit, freeze_qformer=c.freeze_qformer)
    frozen, masters, layer = _parameters(c, config, parts, sizes)
    shape = longest(c, config)
    rows = -(-shape.rows // (c.accumulate * sizes["data"] * sizes["fsdp"]))
    item, model = jnp.dtype(DTYPES[c.dtype]).itemsize, sizes["model"]
    tokens = rows * shape.tokens
    llm = config.llm
    kept = llm.layers * tokens * (4 * llm.width + (0 if c.remat else item * _products(llm, model)))
    if "vit" in parts:
        kept += _kept_of_vision(c, config, rows, item, model)
    scores = 4 * rows * llm.heads * shape.tokens**2 // model
    in_layer = (
        SCORES * scores
        + WIDE * tokens * llm.ffn * item // model
        + RESIDUALS * 4 * tokens * llm.width
    )
    at_the_end = LOGITS * 4 * rows * shape.labels * llm.vocab // model
    gathered = layer if sizes["fsdp"] > 1 else 0
    # of what is trained: the gradient, and the copy that a step computes with
    changed = (4 + item) * masters
    pixels = 3 * rows * c.accumulate * config.vision.image_size**2
    working = max(in_layer, at_the_end) + gathered + changed
    return Need(frozen, 3 * 4 * masters, pixels, kept, working)


def _parameters(
    c: TrainConfig, config: ModelConfig, parts: frozenset[str], sizes: dict[str, int]
) -> tuple[int, int, int]:
    """(bytes of frozen weights on a device, numbers of what is trained, bytes of one layer of the
    language model, gathered)"""
    frozen = masters = layers = 0
    for path, leaf in nnx.to_flat_state(nnx.state(abstract_model(config, stacked=True))):
        name = ".".join(map(str, path))
        if part_of(name) in parts:
            masters += math.prod(leaf.shape)
            continue
        kind = parameter_dtype(path, jnp.dtype(DTYPES[c.dtype]))
        kind = leaf.dtype if jnp.issubdtype(leaf.dtype, jnp.integer) else kind
        spec = parameter_spec(name, leaf.shape, leaf.dtype, config, sizes)
        size = math.prod(leaf.shape) * kind.itemsize
        frozen += size // _split(spec, sizes)
        if name.startswith("llm.blocks."):
            layers += size
    return frozen, masters, layers // config.llm.layers // sizes["model"]


def _split(spec: Any, sizes: dict[str, int]) -> int:
    """Among how many devices something is split."""
    names = [name for axis in spec for name in ((axis,) if isinstance(axis, str) else axis or ())]
    return math.prod(sizes[name] for name in names)


def _products(llm: LlmConfig, model: int) -> int:
    """Numbers that a layer keeps of a token where it is not computed again: results of its products but
    for the last, which is only added."""
    heads = llm.head_dim * (llm.heads + 2 * llm.kv_heads)
    return (heads + 2 * llm.ffn) // model + llm.width


def _kept_of_vision(c: TrainConfig, config: ModelConfig, rows: int, item: int, model: int) -> int:
    """Bytes of the vision encoder's layers where it is trained."""
    v = config.vision
    products = 0 if c.remat else item * ((3 * v.width + v.mlp) // model + v.width)
    return v.depth * rows * (v.patches + 1) * (4 * v.width + products)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
