"""Encoding, scores and greedy ids of a small random model, compared with the float64 oracle in helpers.

Needs no dumps of the original."""

import numpy as np
import pytest
from helpers import oracle
from helpers.paths import TOKENIZER

from minigpt4_jax.checkpoint.parameters import parameter_shapes
from minigpt4_jax.checkpoint.writer import write_model
from minigpt4_jax.config import LlmConfig, LoraConfig, ModelConfig, QFormerConfig, VisionConfig
from minigpt4_jax.inference.loading import load
from minigpt4_jax.inference.requests import Request
from minigpt4_jax.processing.images import load_pixels, normalize
from minigpt4_jax.processing.sequences import build_row, prompt_tokens

pytestmark = pytest.mark.default_compiler


def relative(ours, theirs):
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def small_model(kind):
    """(config, random tensors by name) of a model like those of the original's dumps."""
    vision = VisionConfig(image_size=28, patch_size=7, width=24, depth=2, heads=3, mlp=40)
    qformer = QFormerConfig(queries=3, hidden=16, layers=3, heads=2, ffn=24, vision_width=24)
    llm = LlmConfig(
        vocab=785, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=48, tie=kind == "b",
        max_length=128,
    )  # fmt: skip
    config = ModelConfig(
        variant={"a": "minigpt4-vicuna", "b": "minigpt4-llama2", "c": "minigpt-v2"}[kind],
        vision=vision, qformer=qformer if kind == "a" else None, llm=llm,
        lora=LoraConfig(rank=2, alpha=6.0) if kind == "c" else None,
        merge_patches=1 if kind == "a" else 4, max_text_length=12,
    ).check()  # fmt: skip
    rng = np.random.default_rng(0)
    tensors = {
        name: (rng.normal(0, 0.3, shape) + name.endswith("scale")).astype(np.float32)
        for name, shape in parameter_shapes(config).items()
    }
    return config, tensors


@pytest.fixture(scope="module", params=["a", "b", "c"])
def small(request, tmp_path_factory):
    config, tensors = small_model(request.param)
    folder = tmp_path_factory.mktemp("small") / "model"
    tokenizer = {p.name: p for p in TOKENIZER.iterdir()}
    write_model(folder, config, tensors.items(), tokenizer=tokenizer)
    return load(folder, dtype="float32"), tensors


def pictures(count):
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (30 + i, 40, 3), dtype=np.uint8) for i in range(count)]


def test_equals_the_oracle(small):
    model, tensors = small
    images = pictures(3)
    visual = model.encode_images(images)
    assert visual.dtype == np.float32
    expected_visual = [
        oracle.encode(tensors, model.config, normalize(load_pixels(i, 28))) for i in images
    ]
    assert relative(visual, np.stack(expected_visual)) < 1e-5
    prompts = [
        "###Human: <Img><ImageHere></Img> what color is it ###Assistant: ",
        "<ImageHere> and <ImageHere> differ",
        "no image",
    ]
    groups, answers = [images[0], images[1:], None], ["a red car", "yes " * 20, "dog"]
    visual_of_prompts = [np.stack(expected_visual)[:1], np.stack(expected_visual)[1:], None]
    nll, counts = model.score(groups, prompts, answers)
    ids = model.engine.generate(
        [
            Request(prompt_tokens(model.tokenizer, model.config, p, images=n), v, 6)
            for p, n, v in zip(prompts, (1, 2, 0), _flatten(visual_of_prompts), strict=True)
        ]
    )
    for i, v in enumerate(_flatten(visual_of_prompts)):
        n = (1, 2, 0)[i]
        row = build_row(model.tokenizer, model.config, prompts[i], answers[i], images=n)
        assert counts[i] == len(row.label_positions)
        expected = oracle.nll(tensors, model.config, row.tokens, row.label_positions, v)
        assert nll[i] == pytest.approx(expected, rel=1e-5)
        tokens = prompt_tokens(model.tokenizer, model.config, prompts[i], images=n)
        assert ids[i] == oracle.greedy(tensors, model.config, tokens, 6, v)


def _flatten(groups):
    return [None if v is None else v.reshape(-1, v.shape[-1]) for v in groups]
