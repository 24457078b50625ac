"""Workloads shared by the benchmarks: model sizes, a stage-2 batch, reproducible weights, FLOPs of a step."""

import dataclasses
import zlib

import numpy as np

from minigpt4_jax.config import IMAGE, LlmConfig, ModelConfig, QFormerConfig, VisionConfig
from minigpt4_jax.models.minigpt import Batch
from minigpt4_jax.utils.rounding import round_up

SMOLLM2 = LlmConfig(
    vocab=49152, width=576, layers=30, heads=9, kv_heads=3, head_dim=64, ffn=1536,
    eps=1e-5, rope_theta=1e5, tie=True, max_length=8192,
)  # fmt: skip
# The quickstart's vision encoder (minigpt4_jax/demos/vision_encoder.py)
SMALL_VISION = VisionConfig(image_size=112, patch_size=14, width=128, depth=4, heads=4, mlp=512)
SMALL_QFORMER = QFormerConfig(queries=13, hidden=128, layers=2, heads=4, ffn=384, vision_width=128)

# A few thousand parameters: whether a benchmark works at all
TINY = ModelConfig(
    vision=VisionConfig(image_size=28, patch_size=14, width=64, depth=2, heads=2, mlp=64),
    qformer=QFormerConfig(queries=3, hidden=64, layers=2, heads=2, ffn=64, vision_width=64),
    llm=LlmConfig(vocab=512, width=64, layers=2, heads=2, kv_heads=2, head_dim=32, ffn=128),
)

SIZES = {
    "tiny": TINY,
    "smollm2": ModelConfig(vision=SMALL_VISION, qformer=SMALL_QFORMER, llm=SMOLLM2),
    "vicuna7b": ModelConfig(),  # MiniGPT-4 with EVA-ViT-g, the Q-Former and Vicuna 7B
}
BATCH = {"tiny": 2, "smollm2": 8, "vicuna7b": 12}


def model_config(size: str, layers: int | None) -> ModelConfig:
    """A configuration of SIZES. layers: of the language model, if not all."""
    config = SIZES[size]
    if layers is not None:
        config = dataclasses.replace(config, llm=dataclasses.replace(config.llm, layers=layers))
    return config


def make_batch(config: ModelConfig, rows: int, answer: int) -> Batch:
    """Stage-2 rows: BOS, 8 prompt tokens, P visual tokens, 15 prompt tokens, an answer.

    The answers have from answer / 2 to `answer` tokens; T is the longest row, rounded up to 16.
    """
    rng = np.random.default_rng(0)
    before, after, p = 9, 15, config.visual_tokens
    start = before + p + after
    size = round_up(start + answer, 16)
    tokens = rng.integers(3, config.llm.vocab, (rows, size), dtype=np.int32)
    tokens[:, before : before + p] = IMAGE
    counts = np.linspace(answer // 2, answer, rows).astype(np.int32)
    steps = np.arange(answer, dtype=np.int32)
    answers = np.where(steps < counts[:, None], start + steps, -1).astype(np.int32)
    lengths = (start + counts).astype(np.int32)
    tokens[np.arange(size) >= lengths[:, None]] = 0
    s = config.vision.image_size
    pixels = rng.standard_normal((rows, 1, s, s, 3), dtype=np.float32)
    return Batch(pixels, tokens, lengths, answers)


# The length is prime, so that repetitions do not align with rows.
_POOL = 0.02 * np.random.default_rng(1).standard_normal(1_048_573, dtype=np.float32)


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random weights for `name`, the same in every process, and fast to generate at 7B.

    Norm scales are near 1, everything else normal with standard deviation 0.02.
    """
    start = zlib.crc32(name.encode()) % len(_POOL)
    values = np.resize(np.roll(_POOL, -start), shape)
    return values + 1 if name.endswith(".scale") else values


def flops(config: ModelConfig, batch: Batch) -> float:
    """FLOPs of the matrix products of one projection-only step, 2 per multiply-add.

    Forward through everything, backward through the language model for activations only, and the
    gradient of the projection. The output matrix multiplies labelled positions only. Attention is counted
    in full, not halved for causality. Norms, softmax and activation functions are not counted.
    """
    v, q, m = config.vision, config.qformer, config.llm
    b, t = batch.tokens.shape
    count = 2.0 * b * vision_macs(v)
    if q is not None:
        count += 2.0 * b * qformer_macs(q, v.patches + 1)
    count += 2 * 2.0 * b * config.visual_tokens * config.projection_in * m.width
    heads = m.heads * m.head_dim
    layer = m.width * (2 * heads + 2 * m.kv_heads * m.head_dim + 3 * m.ffn) + 2 * t * heads
    head = m.width * m.vocab
    count += 2 * 2.0 * (b * t * m.layers * layer + batch.label_positions.size * head)
    return count


def vision_macs(v: VisionConfig) -> float:
    """Multiply-adds of one image through the vision encoder."""
    t = v.patches + 1
    block = t * (4 * v.width**2 + 2 * v.width * v.mlp) + 2 * t * t * v.width
    return v.patches * 3 * v.patch_size**2 * v.width + v.depth * block


def qformer_macs(q: QFormerConfig, tokens: int) -> float:
    """Multiply-adds of the vision tokens of one image through the Q-Former."""
    p, d = q.queries, q.hidden
    layer = p * (4 * d * d + 2 * d * q.ffn) + 2 * p * p * d
    cross = 2 * p * d * d + 2 * tokens * q.vision_width * d + 2 * p * tokens * d
    return q.layers * layer + -(-q.layers // q.cross_every) * cross
