"""convert build --quantize stores what quantizing while loading gives."""

import json

import numpy as np
import pytest
from flax import nnx
from helpers.released_files import llm_config, llm_state, save_hf

from minigpt4_jax.checkpoint.loader import load_model


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_stored_weights_equal_those_quantized_while_loading(files, command, scheme):
    plain, rounded = files.folder / "plain", files.folder / "rounded"
    wide = llm_config(hidden_size=64, intermediate_size=96)  # groups of 64 and of 32
    save_hf(files.folder / "wide", wide, llm_state(wide))
    given = {"llm": files.folder / "wide", "checkpoint": None}
    assert command(*files.arguments("minigpt-v2", out=plain, **given))[0] == 0
    line = [*files.arguments("minigpt-v2", out=rounded, **given), f"--quantize={scheme}"]
    code, _, err = command(*line)
    assert code == 0, err
    stored, config = load_model(rounded)
    quantized, _ = load_model(plain, quantize=scheme)
    assert config.quantize == scheme
    expected = dict(nnx.to_flat_state(nnx.state(quantized)))
    for path, leaf in nnx.to_flat_state(nnx.state(stored)):
        assert leaf.dtype == expected[path].dtype
        np.testing.assert_array_equal(leaf.get_value(), expected[path].get_value())
    floats, found = (json.loads(command("inspect", d, "--json")[1]) for d in (plain, rounded))
    assert found["parameters"] == floats["parameters"]
    assert found["bytes"] < floats["bytes"]
    assert "int8" in found["parts"]["llm"]["dtypes"] and "int8" in found["parts"]["vit"]["dtypes"]
    assert ("int4" in found["parts"]["llm"]["dtypes"]) == (scheme == "int4")


def test_an_unknown_scheme_is_refused(files, refused):
    line = refused(*files.arguments("minigpt-v2"), "--quantize=int3")
    assert "int3" in line and "int8" in line and "int4" in line
