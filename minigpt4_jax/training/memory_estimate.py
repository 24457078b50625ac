"""Estimates a training step's memory per device before anything is compiled.

What stays in memory from step to step is exact: it follows from shapes and from the partition rules of
minigpt4_jax.parallel.sharding. Of temporary arrays only the large ones are counted, so that part may be
off by a tenth (tests/training/test_memory_estimate.py compares it with what XLA's TPU compiler plans).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from minigpt4_jax.checkpoint.loader import DTYPES, parameter_dtype
from minigpt4_jax.checkpoint.parameters import abstract_model, part_of
from minigpt4_jax.config import LlmConfig, ModelConfig
from minigpt4_jax.parallel.sharding import parameter_spec
from minigpt4_jax.quantization.schemes import holds_levels
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.model_config import frozen_config
from minigpt4_jax.training.train_step import trained_parts
from minigpt4_jax.utils.rounding import round_up

QUESTION_TOKENS = 48  # tokens besides the visual ones and the answer, for rows with a question

# How many arrays of one size a layer's backward pass holds at once, by what XLA's TPU compiler plans.
ATTENTION_SCORES = 2  # [B, N, T, T] float32
FFN_ACTIVATIONS = 3  # [B, T, F] in the weights' dtype
RESIDUALS = 3  # [B, T, D] float32
LOGITS = 2  # [B, A, V] float32


class BatchShape(NamedTuple):
    """The shape that a batch is padded to."""

    rows: int  # B
    tokens: int  # T, including the visual ones
    labels: int  # A


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per device."""

    weights: int  # frozen
    trained: int  # float32 masters, and AdamW's two moments
    batch: int
    activations: int  # of every layer, kept for the backward pass
    working: int  # the maximum of other temporary arrays

    @property
    def total(self) -> int:
        return self.weights + self.trained + self.batch + self.activations + self.working


def largest_batch(c: TrainConfig, config: ModelConfig, tokens: int | None = None) -> BatchShape:
    """The batch of rows with one image and the longest allowed answer. tokens: T, if given."""
    data, answer = c.data, config.max_text_length
    question = QUESTION_TOKENS if data.prompts or data.mix else 1
    row = round_up(config.visual_tokens + question + answer, data.pad_tokens)
    tokens = tokens or data.pack_tokens or row
    return BatchShape(c.batch_size, tokens, min(round_up(answer, data.pad_answers), tokens))


def estimate_memory(c: TrainConfig, config: ModelConfig, sizes: dict[str, int]) -> MemoryEstimate:
    """What a step on `largest_batch` needs on a mesh of these sizes (axis -> devices)."""
    config = frozen_config(c, config)
    parts = trained_parts(freeze_vit=c.freeze_vit, freeze_qformer=c.freeze_qformer, config=config)
    parameters = _count_parameters(c, config, parts, sizes)
    shape = largest_batch(c, config)
    rows = -(-shape.rows // (c.accumulate * sizes["data"] * sizes["fsdp"]))
    itemsize = jnp.dtype(DTYPES[c.dtype]).itemsize
    activations = _llm_activations(c, config.llm, rows * shape.tokens, itemsize, sizes["model"])
    if "vit" in parts:
        activations += _vit_activations(c, config, rows, itemsize, sizes["model"])
    pixels = 3 * rows * c.accumulate * config.vision.image_size**2
    working = _peak_temporaries(config.llm, rows, shape, itemsize, sizes["model"])
    if sizes["fsdp"] > 1:
        working += parameters.layer_bytes  # gathered
    # of the trained part: the gradient, and the copy in the compute dtype
    working += (4 + itemsize) * parameters.num_trained
    return MemoryEstimate(
        weights=parameters.frozen_bytes, trained=3 * 4 * parameters.num_trained, batch=pixels,
        activations=activations, working=working,
    )  # fmt: skip


class _Parameters(NamedTuple):
    frozen_bytes: int  # per device
    num_trained: int  # numbers, replicated
    layer_bytes: int  # of one layer of the language model, gathered over fsdp


def _count_parameters(
    c: TrainConfig, config: ModelConfig, parts: frozenset[str], sizes: dict[str, int]
) -> _Parameters:
    dtype = jnp.dtype(DTYPES[c.dtype])
    frozen_bytes = num_trained = llm_bytes = 0
    for path, leaf in nnx.to_flat_state(nnx.state(abstract_model(config, stacked=True))):
        name = ".".join(map(str, path))
        if part_of(name) in parts:
            num_trained += math.prod(leaf.shape)
            continue
        levels = holds_levels(leaf.dtype)
        stored_dtype = jnp.dtype(leaf.dtype) if levels else parameter_dtype(path, dtype)
        size = math.prod(leaf.shape) * stored_dtype.itemsize
        spec = parameter_spec(name, leaf.shape, leaf.dtype, config, sizes)
        frozen_bytes += size // _num_shards(spec, sizes)
        if name.startswith("llm.blocks."):
            llm_bytes += size
    return _Parameters(frozen_bytes, num_trained, llm_bytes // config.llm.layers // sizes["model"])


def _num_shards(spec: PartitionSpec, sizes: dict[str, int]) -> int:
    """Over how many devices an array is sharded."""
    axes = [name for axis in spec for name in ((axis,) if isinstance(axis, str) else axis or ())]
    return math.prod(sizes[name] for name in axes)


def _llm_activations(c: TrainConfig, llm: LlmConfig, tokens: int, itemsize: int, model: int) -> int:
    """Bytes that the language model's layers keep for the backward pass: each layer's input in float32
    and, without remat, the outputs of its matmuls except the last, which is only added."""
    attention = llm.head_dim * (llm.heads + 2 * llm.kv_heads)
    outputs = 0 if c.remat else (attention + 2 * llm.ffn) // model + llm.width
    return llm.layers * tokens * (4 * llm.width + itemsize * outputs)


def _vit_activations(
    c: TrainConfig, config: ModelConfig, rows: int, itemsize: int, model: int
) -> int:
    """As `_llm_activations`, of the vision encoder."""
    v = config.vision
    outputs = 0 if c.remat else (3 * v.width + v.mlp) // model + v.width
    return v.depth * rows * (v.patches + 1) * (4 * v.width + itemsize * outputs)


def _peak_temporaries(
    llm: LlmConfig, rows: int, shape: BatchShape, itemsize: int, model: int
) -> int:
    """Bytes of temporary arrays in the backward pass of one layer, or of the loss."""
    tokens = rows * shape.tokens
    layer = (
        ATTENTION_SCORES * (4 * rows * llm.heads * shape.tokens**2 // model)
        + FFN_ACTIVATIONS * tokens * llm.ffn * itemsize // model
        + RESIDUALS * 4 * tokens * llm.width
    )
    loss = LOGITS * 4 * rows * shape.labels * llm.vocab // model
    return max(layer, loss)
