"""A Model made from a module, without a model directory."""

import numpy as np
import pytest
from flax import nnx
from helpers import tiny
from helpers.paths import TOKENIZER

from minigpt4_jax.config import LoraConfig
from minigpt4_jax.inference.model import Model
from minigpt4_jax.models.minigpt import MiniGpt
from minigpt4_jax.processing.tokenizer import load_tokenizer

V2 = {"qformer": False, "variant": "minigpt-v2", "lora": LoraConfig(rank=2)}


@pytest.mark.parametrize("changes", [{}, V2], ids=["Q-Former", "v2"])
def test_its_answers_and_another_module(changes):
    config = tiny.config(**changes)
    model = Model(MiniGpt(config, nnx.Rngs(0)), config, load_tokenizer(TOKENIZER))
    image = np.random.default_rng(1).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    one = model.encode_images([image])
    assert one.shape == (1, config.visual_tokens, config.llm.width)
    model.set_module(MiniGpt(config, nnx.Rngs(1)))
    assert not np.allclose(model.encode_images([image]), one)
    assert len(model.generate([image], ["what"], template=True, max_new_tokens=3)) == 1
