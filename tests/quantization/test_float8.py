"""float8 products of frozen weights: rounding, gradients, the loaded model, and refused configurations."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from helpers import tiny

from minigpt4_jax.checkpoint.loader import load_model
from minigpt4_jax.checkpoint.model_directory import read_config
from minigpt4_jax.checkpoint.quantized_tensors import quantize_in_chunks
from minigpt4_jax.data.config import DataConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.quantization import schemes
from minigpt4_jax.quantization.matmul import linear
from minigpt4_jax.training.config import LoraChoice, TrainConfig
from minigpt4_jax.training.config_check import check
from minigpt4_jax.training.model_config import frozen_config, read_model_config
from minigpt4_jax.training.trainer import train

E4M3 = ml_dtypes.float8_e4m3fn


def rounded(a, axis=-1):
    """a, with each row rounded to e4m3 with a scale that makes its largest value 448; written anew."""
    scale = np.abs(a).max(axis, keepdims=True) / 448
    return (a / scale).astype(E4M3).astype(np.float32) * scale


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, 48)).astype(np.float32) * [[[1.0], [1e-3], [30.0], [1.0], [1.0]]]
    weight = rng.standard_normal((32, 48)).astype(np.float32)
    return x.astype(np.float32), weight, *quantize_in_chunks(weight, "float8")


def test_weights_are_rounded_to_e4m3(arrays):
    _, weight, levels, scale = arrays
    assert (levels.dtype, levels.shape, scale.shape) == (E4M3, (32, 48), (32,))
    back = schemes.dequantize(levels, scale, np.float32, np)
    assert np.abs(back - weight).max() <= np.abs(weight).max() / 16  # 3 bits of mantissa
    assert np.abs(levels.astype(np.float32)).max(1).min() > 440  # the range is used


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_product_and_gradient(arrays, dtype):
    x, _, levels, scale = arrays
    weight = schemes.dequantize(levels, scale, np.float32, np)

    def f(x):
        return linear(x, jnp.asarray(levels), None, None, jnp.asarray(scale).astype(dtype))

    y = jax.jit(f)(x)
    assert y.dtype == dtype
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-4} if dtype == jnp.float32 else {"rtol": 0.01, "atol": 0.3}
    )
    np.testing.assert_allclose(np.float32(y), rounded(x) @ weight.T, **tolerance)
    dy = np.random.default_rng(1).standard_normal(y.shape).astype(np.float32)
    dy = np.float32(jnp.asarray(dy).astype(dtype))
    factor = np.float32(scale)
    expected = rounded(dy * factor) @ np.float32(levels)
    (dx,) = jax.jit(lambda x, dy: jax.vjp(f, x)[1](dy))(x, jnp.asarray(dy).astype(dtype))
    np.testing.assert_allclose(np.float32(dx), expected, **tolerance)


def test_a_row_of_zeros_is_zero(arrays):
    _, _, levels, scale = arrays
    y = linear(jnp.zeros((3, 48)), jnp.asarray(levels), None, None, jnp.asarray(scale))
    assert (np.float32(y) == 0).all()


def test_what_is_loaded(tmp_path):
    """The matrices of the blocks are e4m3; the Q-Former, the embedding and what is trained are not."""
    folder = tiny.write_random_model(tmp_path / "m")
    model, config = load_model(
        folder, "bfloat16", quantize="float8", trainable_parts={"projection"}
    )
    dtypes = {".".join(map(str, p)): leaf.dtype for p, leaf in nnx.to_flat_state(nnx.state(model))}
    float8 = {name for name, dtype in dtypes.items() if dtype == E4M3}
    assert float8 == {
        name for name in dtypes if ".blocks." in name and name.endswith(".weight")
        and not name.startswith("qformer")
    } != set()  # fmt: skip
    assert dtypes["llm.embed"] == jnp.bfloat16 and dtypes["projection.weight"] == jnp.float32
    assert config.quantize == "float8"


def test_bad_combinations(tmp_path):
    c = TrainConfig(model="m", frozen_dtype="float8")
    c = dataclasses.replace(c, data=dataclasses.replace(c.data, path="d"))
    check(c)
    with pytest.raises(UserError, match=r"config.frozen_dtype is 'int8': expected '' or 'float8'"):
        check(dataclasses.replace(c, frozen_dtype="int8"))
    with pytest.raises(UserError, match=r"config.frozen_dtype .*freeze_vit=true"):
        check(dataclasses.replace(c, freeze_vit=False))
    folder = tiny.write_random_model(tmp_path / "m")
    c = dataclasses.replace(c, model=str(folder))
    config = read_model_config(c)
    assert (config.quantize, frozen_config(c, config).quantize) == (None, "float8")
    document = (folder / "model.json").read_text()
    (folder / "model.json").write_text(document.replace('"quantize": null', '"quantize": "int8"'))
    with pytest.raises(UserError, match=r"'float8': the matrices of .* are stored in int8"):
        read_model_config(c)


def test_training(tmp_path, capsys):
    """Adapters on float8 matrices, with captions in between: close to training on floats, and what is saved
    does not depend on it."""
    folder = tiny.write_random_model(tmp_path / "m")
    tiny.write_data(tmp_path / "data", rows=4)
    rows = (str(tmp_path / "data" / "rows.jsonl"),)
    losses = []
    for frozen_dtype in "", "float8":
        c = TrainConfig(
            model=str(folder), data=DataConfig(path=rows, val_path=rows), lora=LoraChoice(rank=2),
            steps=2, batch_size=2, init_lr=0.05, warmup_steps=0, dtype="float32", max_text_length=12,
            frozen_dtype=frozen_dtype, sample_every=2, sample_images=1, sample_tokens=3, log_every=1,
        )  # fmt: skip
        finished = train(c, tmp_path / f"w{frozen_dtype}")
        lines = (tmp_path / f"w{frozen_dtype}" / "metrics.jsonl").read_text().splitlines()
        losses.append([row["loss"] for row in map(json.loads, lines) if "loss" in row])
        assert read_config(finished.model).quantize is None
    np.testing.assert_allclose(losses[1][0], losses[0][0], rtol=0.02)
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.15)
    assert losses[1] != losses[0]
    assert "frozen matrices in float8 (this device has no such products" in capsys.readouterr().out
