"""One layer of each network at full size, in float32, against float64 NumPy; parameter counts."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import oracle

from convert.hf_config import llm_config_from_hf
from minigpt4_jax.checkpoint.parameters import parameter_shapes
from minigpt4_jax.config import (
    LlmConfig,
    LoraConfig,
    ModelConfig,
    QFormerConfig,
    VisionConfig,
    text_branch,
)
from minigpt4_jax.models import llm_layers, positions, qformer, vit

pytestmark = pytest.mark.default_compiler


def random_layer(make):
    """(a layer with all parameters random, its tensors by name)."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    leaves, tensors, filled = nnx.to_flat_state(state), {}, []
    # Parts of one array, a few numbers apart: drawing all of them takes seconds.
    sizes = [math.prod(leaf.shape) for _, leaf in leaves]
    numbers = np.random.default_rng(0).standard_normal(max(sizes) + 16 * len(sizes), np.float32)
    for n, (path, leaf) in enumerate(leaves):
        value = numbers[16 * n :][: sizes[n]].reshape(leaf.shape)
        value = value * np.float32(leaf.shape[-1] ** -0.5 if len(leaf.shape) > 1 else 0.3)
        if path[-1] == "scale":
            value += 1
        tensors[".".join(map(str, path))] = value
        filled.append((path, leaf.replace(jnp.asarray(value))))
    return nnx.merge(graphdef, nnx.from_flat_state(filled)), tensors


def tokens(count, width, seed=1):
    return np.random.default_rng(seed).standard_normal((1, count, width), np.float32)


@partial(jax.jit, static_argnames="queries")
def run(block, *args, **queries):
    return block(*args, **queries)


def check(ours, expected):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(ours) / scale, expected / scale, atol=1e-5)


def test_vit_block():
    c, x = VisionConfig(), tokens(257, 1408)
    block, tensors = random_layer(lambda r: vit.Block(c, r))
    check(run(block, x)[0], oracle.vit_block(tensors, "", oracle.f64(x[0]), c))


def test_qformer_layer():
    c, x, vision = QFormerConfig(), tokens(32, 768), tokens(257, 1408, 2)
    block, tensors = random_layer(lambda r: qformer.Block(c, 0, r))
    x64, vision64 = oracle.f64(x[0]), oracle.f64(vision[0])
    expected = oracle.qformer_layer(tensors, "", x64, vision64, c, cross=True)
    ours, _ = run(block, x, vision, None, queries=32)
    check(ours[0], expected)


@pytest.mark.slow
def test_llama_7b_layer():
    c, x = LlmConfig(), tokens(12, 4096)
    block, tensors = random_layer(lambda r: llm_layers.Block(c, None, r))
    rope = positions.rotary(c, jnp.arange(12)[None])
    ours, _ = run(block, x, rope, np.array([12]))
    check(ours[0], oracle.llm_block(tensors, "", oracle.f64(x[0]), c))


def count(config, *parts):
    shapes = parameter_shapes(config).items()
    return sum(math.prod(s) for name, s in shapes if name.split(".")[0] in parts)


def test_parameter_counts_of_the_papers():
    """SPEC sections 1 to 4."""
    vicuna = ModelConfig()
    assert count(vicuna, "vit") == 985_894_528
    assert count(vicuna, "qformer") == 105_137_664 + 24_576
    assert count(vicuna, "projection") == 3_149_824
    assert count(vicuna, "llm") == 6_738_415_616
    wide = LlmConfig(width=5120, layers=40, heads=40, kv_heads=40, ffn=13824)
    assert count(ModelConfig(llm=wide), "projection") == 3_937_280
    llama2 = ModelConfig(variant="minigpt4-llama2", qformer=None, merge_patches=4)
    assert count(llama2, "projection") == 23_072_768
    v2 = ModelConfig(
        variant="minigpt-v2", qformer=None, merge_patches=4, lora=LoraConfig(),
        vision=VisionConfig(image_size=448),
    )  # fmt: skip
    assert count(v2, "vit") == 986_975_872
    lora = sum(math.prod(s) for n, s in parameter_shapes(v2).items() if ".lora_" in n)
    assert lora == 33_554_432


OPT_2_7B = {
    "model_type": "opt", "vocab_size": 50272, "hidden_size": 2560, "num_hidden_layers": 32,
    "num_attention_heads": 32, "ffn_dim": 10240, "max_position_embeddings": 2048,
}  # fmt: skip
OPT_6_7B = OPT_2_7B | {"hidden_size": 4096, "ffn_dim": 16384}
FLAN_T5_XL = {
    "model_type": "t5", "vocab_size": 32128, "d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24,
    "num_heads": 32, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
}  # fmt: skip
FLAN_T5_XXL = FLAN_T5_XL | {"d_model": 4096, "d_ff": 10240, "num_heads": 64}


@pytest.mark.parametrize(
    ("values", "parameters"),
    [
        (OPT_2_7B, 2_651_596_800),
        (OPT_6_7B, 6_658_473_984),
        (FLAN_T5_XL, 2_849_757_184),
        (FLAN_T5_XXL, 11_135_332_352),
    ],
)
def test_blip2_language_models(values, parameters):
    llm = llm_config_from_hf(values)
    assert count(ModelConfig(llm=llm), "llm") == parameters


def test_stage1_qformer():
    q = QFormerConfig(vocab=30523, max_positions=512, itc_width=256, lm_head=True)
    text = 30523 * 768 + 512 * 768 + 12 * (2 * 768 * 3072 + 3072 + 3 * 768)
    heads = 2 * (768 * 256 + 256) + (768 * 2 + 2) + (768 * 768 + 3 * 768 + 30523) + 1
    config = ModelConfig(variant="blip2-qformer", qformer=q, llm=text_branch(q), image_first=True)
    assert count(config, "qformer") == 105_137_664 + 24_576 + text + heads
