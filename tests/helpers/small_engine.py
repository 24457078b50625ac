"""An engine over a model of a few thousand parameters, and requests for it. Tests share its programs."""

from functools import cache

import numpy as np
from flax import nnx

from minigpt4_jax.config import IMAGE, LlmConfig, ModelConfig, QFormerConfig, VisionConfig
from minigpt4_jax.inference.engine import Engine
from minigpt4_jax.inference.requests import BucketSizes, Request
from minigpt4_jax.inference.sampling import SamplingStages
from minigpt4_jax.models.llm import unstack
from minigpt4_jax.models.minigpt import MiniGpt

P = 3  # visual tokens of an image
VOCAB = 60


@cache
def model(window=None, stacked=False):
    vision = VisionConfig(image_size=28, patch_size=14, width=8, depth=1, heads=2, mlp=8)
    qformer = QFormerConfig(queries=P, hidden=8, layers=1, heads=2, ffn=8, vision_width=8)
    llm = LlmConfig(
        vocab=VOCAB, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, ffn=24, window=window
    )
    config = ModelConfig(vision=vision, qformer=qformer, llm=llm)
    module = nnx.jit(lambda: MiniGpt(config, nnx.Rngs(0)))()  # one program instead of sixty
    for _, leaf in nnx.to_flat_state(nnx.state(module.llm)):  # so that logits differ clearly
        leaf.set_value(leaf.get_value() * (6 if leaf.get_value().ndim > 1 else 1))
    if not stacked:
        module.llm = unstack(module.llm)
    return module


@cache
def cached_model(kind, window=None, stacked=False):
    """The model with a key-value cache of this kind."""
    module = nnx.merge(*nnx.split(model(window, stacked)))
    module.llm.cache_kind = kind
    return module


@cache
def engine(window=None, stacked=False, kind=None):
    return Engine(cached_model(kind, window, stacked))


def prompt(rng, length, images=0):
    """(tokens, visual tokens) of a random prompt with images at random places."""
    tokens = rng.integers(1, VOCAB, length).tolist()
    for _ in range(images):
        index = int(rng.integers(0, len(tokens) + 1))
        tokens[index:index] = [IMAGE] * P
    visual = rng.normal(0, 1, (images * P, 16)).astype(np.float32) if images else None
    return tokens, visual


def greedy_requests(count=4, **changes):
    """Up to four requests of different lengths and numbers of images."""
    rng = np.random.default_rng(7)
    shapes = [(5, 0), (33, 1), (2, 2), (17, 0)][:count]
    return [Request(*prompt(rng, n, i), **{"max_new_tokens": 8} | changes) for n, i in shapes]


LARGEST = BucketSizes(cache_length=384, max_new_tokens=256, num_stops=32, stop_width=16)
ALL_STAGES = SamplingStages(random=True, num_candidates=0, penalties=True)


def ids_alone(request):
    """The ids of one request without a running batch. Requests of all sizes share two programs."""
    state = engine().prefill([request], LARGEST, ALL_STAGES, prompt_size=LARGEST.cache_length)
    state = engine().decode(state, ALL_STAGES)
    return np.asarray(state.ids)[0, : int(state.num_generated[0])].tolist()
