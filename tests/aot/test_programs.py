"""Programs lowered from shapes: they are the ones that run; error messages of the command."""

import dataclasses
import json
import math

import pytest
from helpers import tiny

from minigpt4_jax.aot import compiler, programs, report
from minigpt4_jax.aot.cost import cost_of
from minigpt4_jax.aot.hlo import parse
from minigpt4_jax.aot.job import parse_job
from minigpt4_jax.aot.presets import model_for
from minigpt4_jax.aot.roofline import count_model_flops, uses_parameter
from minigpt4_jax.cli import compile as command
from minigpt4_jax.errors import UserError
from minigpt4_jax.parallel.sharding import single_device_mesh
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.memory_estimate import BatchShape
from minigpt4_jax.training.train_step import trained_parts

TRAINED = trained_parts(freeze_vit=True, freeze_qformer=True)
# The programs are compiled for a CPU device here; only memory and FLOPs are compared.
TARGET = report.Target("v5e:1x1", 1, "one device", "")


def weight_bytes(config, is_counted):
    specs = programs.parameter_specs(config)
    return sum(math.prod(s) * dtype.itemsize for name, s, dtype in specs if is_counted(name))


def test_train_step_from_shapes():
    config, shape = tiny.config(), BatchShape(2, 64, 48)
    c = TrainConfig(dtype="bfloat16", batch_size=2)
    model_flops = count_model_flops(config, *shape, TRAINED)
    result = report.compile_and_report(
        "train", "", 2, lambda: programs.lower_train_step(c, config, single_device_mesh(), shape), TARGET,
        model_flops=model_flops,
    )  # fmt: skip
    trained = 16 * 24 + 24  # the projection: a master and two moments, float32
    frozen = weight_bytes(config, lambda name: not name.startswith("projection"))
    pixels = 2 * 28 * 28 * 3
    rest = result.memory.arguments - frozen - 3 * 4 * trained - pixels
    assert 0 < rest < 2000  # token ids, label positions, lengths, scalars
    # Causal attention computes all scores, of which the step requires half, and recomputes them for the
    # gradient. Here rows are longer than they are wide, so that this is a large part.
    assert model_flops <= result.cost.flops < 1.5 * model_flops
    assert result.fits(TARGET.chip)


def test_decode_from_shapes():
    config, rows, context = tiny.config(), 2, 64
    engine = programs.AbstractEngine(config, single_device_mesh())
    text, memory, _ = compiler.compile_lowered(engine.lower_decode(rows, context))
    llm = config.llm
    cache = 2 * llm.layers * rows * llm.kv_heads * context * llm.head_dim * 2
    weights = weight_bytes(config, lambda name: name.startswith("llm"))
    assert 0 < memory.arguments - weights - cache < 10_000  # generated ids and log-probabilities
    assert cost_of(parse(text)).unknown_loops == 1  # it runs until every row is done


def test_flant5_decodes_without_reading_its_encoder():
    config = model_for(TrainConfig(), "blip2-flant5xl")[1]
    llm = dataclasses.replace(
        config.llm, vocab=64, width=24, layers=2, encoder_layers=2, heads=2, kv_heads=2, head_dim=8, ffn=40
    )  # fmt: skip
    config = dataclasses.replace(tiny.config(), variant="blip2-flant5", image_first=True, llm=llm)
    used = weight_bytes(config, lambda name: uses_parameter("decode", name, config))
    kept = weight_bytes(config, lambda name: name.startswith("llm.")) - used
    assert kept > 0.3 * used  # the encoder, and what makes keys and values of its outputs

    engine = programs.AbstractEngine(config, single_device_mesh())
    _, memory, _ = compiler.compile_lowered(engine.lower_decode(1, 64))
    cache = (
        2 * llm.layers * llm.kv_heads * 2 * 64 * llm.head_dim * 2
    )  # of the answer and of the prompt
    assert abs(memory.arguments - used - cache) < 10_000
    # Of 32 prompt tokens and one of the answer: a third of the matrices is the decoder's.
    flops = count_model_flops(config, 1, 32, 1, None) - count_model_flops(config, 1, 0, 0, None)
    encoder = weight_bytes(config, lambda name: name.startswith("llm.encoder"))
    assert encoder * 32 < flops < 1.6 * encoder * 32


def test_model_follows_the_configuration(tmp_path):
    def job(*args):
        options, rest = command._parser().parse_known_args(["--topology=v5e:2x4", *args])
        return parse_job(options, rest)

    assert job().model_name == "vicuna7b"
    assert job("--config=stage1:vicuna13b").model_config.llm.width == 5120
    assert job("--config", "stage1:vicuna13b").config_name == "stage1:vicuna13b"
    v2 = job("--config=v2_stage3")
    assert v2.model_name == "v2" and v2.model_config.visual_tokens == 256
    assert v2.batch_shape == (24, 1344, 1024)
    assert job("--config=stage2:llama2", "--config.batch_size=4").batch_shape.rows == 4
    model = tiny.write_random_model(tmp_path / "model")
    assert job("--config=stage2", f"--config.model={model}").model_config.llm.width == 24
    quantized = tiny.write_random_model(tmp_path / "quantized", quantize="int8")
    with pytest.raises(UserError, match="quantized is stored in int8: omit the option"):
        job(f"--config.model={quantized}", "--quantize=int4")
    with pytest.raises(UserError, match="quantized is quantized to int8, so vit cannot be trained"):
        job(f"--config.model={quantized}", "--config.freeze_vit=false").compile("train")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--topology=v9:2x4"], "'v9:2x4': expected one of v4"),
        (["--topology=v5e:2by4"], "expected a shape such as v5e:2x4"),
        (["--topology=v5e:²x2"], "expected a shape such as v5e:2x4"),
        (["--topology=v5e:0x2"], "expected a shape such as v5e:2x4"),
        (["--topology=v5e:2x2x2"], "v5e slices have 2 dimensions"),
        (["--topology=v5p:2x2"], "v5p slices have 3 dimensions.*for instance v5p:2x2x1"),
        (["--topology=v5e:1000x1000"], "at most 256 chips"),
        (["--topology=v5e:2x4", "--program=training"], "--program=training: expected some of"),
        (["--topology=v5e:2x4", "--size=7b"], "--size=7b: expected one of vicuna7b"),
        (["--topology=v5e:2x4", "--batch=0"], "--batch=0: expected a number above 0"),
        (["--topology=v5e:2x4", "--context=3000000000"], "above 0, up to 1,048,576"),
        (
            ["--topology=v5e:2x4", "--context=32"],
            "--context=32: expected more than 32, the tokens",
        ),
        (["--topology=v5e:2x4", "--config=v2_stage3", "--tokens=256"], "expected more than 256"),
        (["--topology=v5e:2x4", "--json=/nowhere/x.json"], "--json=/nowhere/x.json: expected a"),
        (["--topology=v5e:2x4", "--hlo=/dev/null/x"], "--hlo=/dev/null/x: cannot create"),
        (["--topology=v5e:2x4", "--config.dtype=float32"], "expected bfloat16"),
        (["--topology=v5e:2x4", "--config.batchsize=8"], "did you mean config.batch_size"),
    ],
)
def test_invalid_arguments_are_named(args, message):
    with pytest.raises(UserError, match=message):
        command.main(args)


def test_parse_buffer_assignment():
    text = """BufferAssignment:
allocation 1: size 400, parameter 0, shape |f32[100]| at ShapeIndex {}, maybe-live-out:
 value: <6565 param.88 @0> (size=400,offset=0): f32[100]{0:T(128)}
allocation 2: size 96, color 2, preallocated-temp:
allocation 3: size 7, thread-local:
allocation 87: size 512, maybe-live-out:
allocation 88: size 3, constant:
allocation 90: size 64, output shape is |(f32[16])|, maybe-live-out:
allocation 360: size 1157612032, preallocated-temp:
"""
    assert compiler.parse_buffer_assignment(text) == compiler.Memory(400, 576, 1157612035, 0)


def test_out_of_memory_is_reported():
    text = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm."
    shortage = compiler.parse_out_of_memory(text)
    assert (shortage.needed, shortage.available) == (20.5 * 2**30, 15.75 * 2**30)
    other = "the total memory required for HLO temporaries (20.5G) exceeds available HBM (15.75G)."
    assert compiler.parse_out_of_memory(other) == shortage
    assert compiler.parse_out_of_memory(other.replace("20.5G", "1.25P")).needed == 1.25 * 2**50
    r = report.Report("train", "8 rows", 8, None, 0, shortage, None, 1.0, None, 1.0)
    assert "22.01 GB of 16.91 GB: 5.10 GB too many" in report.format_report(r, TARGET)[1]
    assert not report.to_json(r, TARGET)["fits"]
    assert json.dumps(report.to_json(r, TARGET))


def test_model_flops_of_a_frozen_7b_step():
    """Training everything takes 6 x parameters x tokens. Frozen layers need no weight gradients: 4 for the
    language model, 2 for the vision encoder."""
    config = model_for(TrainConfig(), "vicuna7b")[1]
    flops = count_model_flops(config, 1, 192, 192, TRAINED)
    llm, vit = 6_476_271_616 + 131_072_000, 985_894_528 - 361_000
    rough = 4 * llm * 192 + 2 * vit * 257
    assert rough < flops < 1.05 * rough
    quantized = dataclasses.replace(config, quantize="int4")
    assert count_model_flops(quantized, 1, 192, 192, TRAINED) == flops
