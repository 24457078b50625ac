"""Sharding over several devices: meshes, the partition rules, and results equal to one device's."""

import functools
import json
import math
import re
import subprocess
import sys
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import sharded_programs, tiny, virtual_devices
from helpers.paths import ROOT
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from minigpt4_jax.checkpoint.parameters import abstract_model
from minigpt4_jax.config import LlmConfig, LoraConfig, ModelConfig, QFormerConfig, VisionConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.parallel import sharding
from minigpt4_jax.parallel.sharding import AXES, divisible_axes, parameter_spec, parse_mesh


def run_on_eight_devices(script: str, *args: object) -> str:
    command = [sys.executable, str(ROOT / "tests" / "helpers" / script), *map(str, args)]
    done = subprocess.run(
        command, env=virtual_devices.environment(8), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    # XLA's warning when it replicates an array to reshard it
    assert "Involuntary full rematerialization" not in done.stderr
    return done.stdout


# --- meshes and partition rules -------------------------------------------------------------


@pytest.mark.smoke
@given(st.permutations(AXES), st.lists(st.integers(1, 6), min_size=3, max_size=3), st.data())
def test_parse_every_mesh_that_fits_the_devices(names, sizes, data):
    total = math.prod(sizes)
    count = data.draw(st.integers(1, 3))  # axes that are named; the others are 1
    named = dict(zip(names[:count], sizes, strict=False))
    devices = math.prod(named.values())
    text = " , ".join(f"{name}:{size}" for name, size in named.items())
    assert parse_mesh(text, devices) == {name: named.get(name, 1) for name in AXES}
    inferred = data.draw(st.sampled_from(names[:count]))
    open_text = ",".join(f"{n}:{-1 if n == inferred else s}" for n, s in named.items())
    assert parse_mesh(open_text, devices) == parse_mesh(text, devices)
    if devices != total:
        with pytest.raises(UserError, match=f"there are {total}"):
            parse_mesh(text, total)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensor:8", "unknown axis 'tensor'; expected each of"),
        ("data:2,data:4", "duplicate axis 'data'"),
        ("data:2,model:2", "needs 4 devices, but there are 8.*for example data:8"),
        ("fsdp:-1,data:3", "needs a multiple of 3 devices, but there are 8"),
        ("fsdp:-1,data:-1", "only one axis can be -1"),
        ("data", "'data' is not AXIS:SIZE, as in"),
        ("data:0", "is not AXIS:SIZE"),
        ("data:2.0", "is not AXIS:SIZE"),
        ("data:8,", "'' is not AXIS:SIZE"),
        ("", "'' is not AXIS:SIZE"),
    ],
)
def test_invalid_meshes_are_errors(text, message):
    with pytest.raises(UserError, match=message):
        parse_mesh(text, 8)


@functools.cache  # takes a second or more
def parameters(config: ModelConfig, stacked: bool) -> dict[str, tuple]:
    """Parameter name -> (shape, dtype)."""
    state = nnx.to_flat_state(nnx.state(abstract_model(config, stacked=stacked)))
    return {".".join(map(str, path)): (leaf.shape, leaf.dtype) for path, leaf in state}


def specs(config: ModelConfig, stacked: bool = True, **sizes: int) -> dict[str, P]:
    sizes = {name: sizes.get(name, 1) for name in AXES}
    found = parameters(config, stacked).items()
    return {name: parameter_spec(name, *kind, config, sizes) for name, kind in found}


# The full-size models with few layers, which all have the same shapes: tracing needs a second for 30.
VIT, QFORMER = VisionConfig(depth=2), QFormerConfig(layers=2)
LLM = LlmConfig(vocab=32001, layers=4)
FULL = {
    "7B": ModelConfig(vision=VIT, qformer=QFORMER, llm=LLM),
    "v2": ModelConfig(
        variant="minigpt-v2", vision=VIT, qformer=None, merge_patches=4, lora=LoraConfig(),
        llm=LlmConfig(layers=4),
    ),
    "int4": ModelConfig(vision=VIT, qformer=QFORMER, llm=LLM, quantize="int4"),
    "qwen": ModelConfig(
        vision=VIT, qformer=QFORMER,
        llm=LlmConfig(
            layers=4, kv_heads=4, heads=28, width=3584, ffn=18944, qkv_bias=True, qk_norm=True
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("stacked", [True, False])
def test_the_rules_shard_every_parameter_of_the_full_size_models(name, stacked):
    config = FULL[name]
    shapes = parameters(config, stacked)
    for sizes in ({"fsdp": 8}, {"model": 8}, {"data": 2, "fsdp": 16, "model": 16}):
        total_bytes, device_bytes = 0, 0
        for key, spec in specs(config, stacked, **sizes).items():
            (shape, dtype), split = shapes[key], 1
            for dim, axes in zip(shape, (*spec, *[None] * len(shape)), strict=False):
                parts = math.prod(
                    sizes[a] for a in ([axes] if isinstance(axes, str) else axes or ())
                )
                assert dim % parts == 0, (key, shape, spec)
                split *= parts
            total_bytes += math.prod(shape) * dtype.itemsize
            device_bytes += math.prod(shape) * dtype.itemsize / split
        assert device_bytes < total_bytes * 0.15, sizes


def test_examples_of_parameter_specs():
    sizes = {"fsdp": 2, "model": 8}
    found = specs(FULL["7B"], **sizes)
    assert found["llm.blocks.attn.q.weight"] == P(None, "model", "fsdp")
    assert found["llm.blocks.mlp.down.weight"] == P(None, "fsdp", "model")
    assert found["vit.blocks.attn.qkv.weight"] == P(None, "model", "fsdp")
    assert found["qformer.blocks.0.attn.q.weight"] == P(None, ("fsdp", "model"))  # 12 heads
    assert found["qformer.blocks.0.mlp.up.weight"] == P("model", "fsdp")
    assert found["llm.embed"] == P(None, ("fsdp", "model"))  # 32001 divides by nothing
    assert found["projection.weight"] == P(None, None)
    assert specs(FULL["v2"], **sizes)["llm.embed"] == P("model", "fsdp")
    assert specs(FULL["v2"], **sizes)["llm.blocks.attn.q.lora_a"] == P(None, None, None)
    quantized = specs(FULL["int4"], stacked=False, **sizes)
    # levels [groups, half a group, out]: 172 groups are not divided by 8, the outputs are
    assert quantized["llm.blocks.3.mlp.down.weight"] == P(None, None, ("fsdp", "model"))
    assert quantized["llm.blocks.3.mlp.down.weight_scale"] == P(None, ("fsdp", "model"))
    assert quantized["llm.blocks.3.attn.o.weight"] == P("model", None, "fsdp")
    assert quantized["llm.blocks.3.attn.o.weight_scale"] == P("model", "fsdp")
    assert quantized["llm.blocks.3.mlp.up.weight"] == P("fsdp", None, "model")
    assert quantized["vit.blocks.mlp.up.weight"] == P(None, "fsdp", None, "model")
    assert quantized["vit.blocks.mlp.up.weight_scale"] == P(None, "fsdp", "model")


@pytest.mark.smoke
def test_a_parameter_without_a_rule_is_an_error():
    sizes = dict.fromkeys(AXES, 2)
    with pytest.raises(KeyError, match=r"llm\.blocks\.attn\.router: no rule"):
        parameter_spec("llm.blocks.attn.router", (2, 8, 8), jnp.float32, FULL["7B"], sizes)


def test_axes_that_do_not_divide_a_dimension_are_left_out():
    sizes = {"data": 2, "fsdp": 3, "model": 1}
    assert divisible_axes((12, 6, 4, 3, 5), [("data", "fsdp")] * 5, sizes) == [
        ("data", "fsdp"), ("data", "fsdp"), "data", "fsdp", None
    ]  # fmt: skip
    assert divisible_axes((8,), ["model"], sizes) == [None]


@pytest.mark.smoke
def test_stacked_layers_are_copied_in_chunks_into_one_array(monkeypatch):
    monkeypatch.setattr(sharding, "CHUNK_BYTES", 200)
    layers = np.arange(7 * 4 * 6, dtype=np.float32).reshape(7, 4, 6)  # 96 bytes each
    requested, sharding_ = [], sharding.replicated(sharding.single_device_mesh())

    def read(index):
        requested.append(index[0])
        return layers[index]

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # JAX warns if a donated buffer is not used
        array = sharding.make_sharded_array_in_chunks(layers.shape, layers.dtype, sharding_, read)
    assert requested == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 7)]
    np.testing.assert_array_equal(array, layers)
    assert array.sharding == sharding_
    update = sharding._update_layers(sharding_).lower(array, layers[:2], 0).compile()
    assert update.memory_analysis().alias_size_in_bytes == layers.nbytes


# --- on eight devices -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """ "MODEL|MESH|VALUE" -> array"""
    out = tmp_path_factory.mktemp("sharded") / "out.npz"
    run_on_eight_devices("sharded_programs.py", out)
    return dict(np.load(out))


@pytest.mark.slow
@pytest.mark.parametrize("case", sharded_programs.CASES, ids=str)
def test_loss_gradients_and_tokens_equal_those_of_one_device(programs, case):
    name, shape = case
    found = {k: v for k, v in programs.items() if k.startswith(f"{name}|{shape}|")}
    kinds = {key.split("|")[2].split(".")[0] for key in found}
    assert {"plain loss", "plain projection"} <= kinds
    generates = shape in sharded_programs.GENERATED.get(name, ())
    assert ({"ids", "logprobs"} <= kinds) == generates
    assert (case in sharded_programs.SEARCHED) == ("beam ids" in kinds)
    for key, value in found.items():
        expected = programs[re.sub(r"\|.*\|", "|one|", key)]
        assert value.shape == expected.shape
        if key.endswith("ids"):
            np.testing.assert_array_equal(value, expected, err_msg=key)
        else:
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5, err_msg=key)
            assert np.abs(expected).max() > 1e-3, key


def test_tokens_of_a_quantized_model_with_an_int8_cache(tmp_path):
    run_on_eight_devices("sharded_quantized.py", tmp_path)


@pytest.mark.slow
def test_training_runs_and_generation(tmp_path):
    from minigpt4_jax.training.trainer import train

    tiny.write_random_model(tmp_path / "model")
    tiny.write_data(tmp_path / "data", rows=10)
    values = {
        "model": str(tmp_path / "model"), "steps": 4, "batch_size": 8, "init_lr": 0.01,
        "data": {
            "path": [str(tmp_path / "data" / "rows.jsonl")],
            "val_path": [str(tmp_path / "data" / "rows.jsonl")],
            "prompts": ["<Img><ImageHere></Img> What is this?"],
        },
        "dtype": "float32", "warmup_steps": 1, "save_every": 4, "log_every": 1, "eval_every": 2,
        "sample_every": 4, "sample_images": 1, "sample_tokens": 3, "accumulate": 1,
    }  # fmt: skip
    train(values, tmp_path / "one")
    (tmp_path / "values.json").write_text(json.dumps(values))
    log = run_on_eight_devices("sharded_runs.py", tmp_path)

    records = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "run")
    ]
    assert [r["step"] for r in records[0]] == [r["step"] for r in records[1]]
    for one, several in zip(*records, strict=True):
        for key in {"loss", "val_loss", "grad_norm"} & one.keys():
            assert several[key] == pytest.approx(one[key], rel=1e-5, abs=1e-5), (one, several)
    assert "mesh data:2,fsdp:2,model:2 of 8 devices, as configured. Frozen weights:" in log
    assert "mesh fsdp:4,model:2 of 8 devices" in log

    answers = json.loads((tmp_path / "answers.json").read_text())
    one = answers.pop("None")
    for found in answers.values():
        for key, value in found.items():
            if key in ("visual", "nll"):
                np.testing.assert_allclose(value, one[key], rtol=1e-5, atol=1e-5)
            else:
                assert value == one[key], key
    assert any(one["greedy"])  # there is something to compare
