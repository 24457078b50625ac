"""Programs from shapes alone: that they are those that run, and what the command says of mistakes."""

import dataclasses
import json
import math

import pytest
from helpers import tiny

from minigpt4_jax.aot import compiler, programs, report
from minigpt4_jax.aot.cost import cost_of
from minigpt4_jax.aot.hlo import parse
from minigpt4_jax.aot.job import read as read_job
from minigpt4_jax.aot.presets import size_of
from minigpt4_jax.aot.roofline import needed_flops
from minigpt4_jax.cli import compile as command
from minigpt4_jax.errors import UserError
from minigpt4_jax.parallel.sharding import one_device
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.memory_estimate import Shape
from minigpt4_jax.training.train_step import trained_parts

PARTS = trained_parts(freeze_vit=True, freeze_qformer=True)
# For one device of this machine's kind: the programs are the same, compiled by another compiler.
HERE = report.Slice("v5e:1x1", 1, "one device", "")


def test_a_step_from_shapes_counts_what_it_needs():
    config, shape = tiny.config(), Shape(2, 64, 48)
    c = TrainConfig(dtype="bfloat16", batch_size=2)
    needed = needed_flops(config, *shape, PARTS)
    found = report.figures(
        "train", "", 2, lambda: programs.train_step(c, config, one_device(), shape), HERE,
        needed=needed,
    )  # fmt: skip
    trained = 16 * 24 + 24  # the projection: a master and two moments, float32
    weights = sum(
        math.prod(s) * k.itemsize
        for n, s, k in programs.parameters(config)
        if not n.startswith("projection")
    )
    pixels = 2 * 28 * 28 * 3
    rest = found.memory.arguments - weights - 3 * 4 * trained - pixels
    assert 0 < rest < 2000  # tokens, answers, lengths, numbers
    # causal attention is computed whole, of which the step needs half, and again for its gradient;
    # here, with rows longer than they are wide, that is much
    assert needed <= found.cost.flops < 1.5 * needed
    assert found.fits(HERE.chip)


def test_answering_from_shapes():
    config, rows, context = tiny.config(), 2, 64
    of = programs.Answering(config, one_device(), int8_cache=False)
    text, memory = compiler.compile_for_chip(of.lower_decode(rows, context))
    llm = config.llm
    cache = 2 * llm.layers * rows * llm.kv_heads * context * llm.head_dim * 2
    weights = sum(
        math.prod(s) * k.itemsize for n, s, k in programs.parameters(config) if n.startswith("llm")
    )
    assert 0 < memory.arguments - weights - cache < 10_000  # ids and log-probabilities made so far
    cost = cost_of(parse(text))
    assert cost.open_loops == 1  # it runs until every row is done


def test_sizes_follow_the_configuration(tmp_path):
    def job(*args):
        options, rest = command._parser().parse_known_args(["--topology=v5e:2x4", *args])
        return read_job(options, rest)

    assert job().size == "vicuna7b"
    assert job("--config=stage1:vicuna13b").config.llm.width == 5120
    assert job("--config", "stage1:vicuna13b").name == "stage1:vicuna13b"
    v2 = job("--config=v2_stage3")
    assert (v2.size, v2.config.visual_tokens, v2.shape) == ("v2", 256, (24, 1344, 1024))
    assert job("--config=stage2:llama2", "--config.batch_size=4").shape.rows == 4
    model = tiny.write_random_model(tmp_path / "model")
    assert job("--config=stage2", f"--config.model={model}").config.llm.width == 24
    rounded = tiny.write_random_model(tmp_path / "rounded", quantize="int8")
    with pytest.raises(UserError, match="rounded is stored in int8: leave it out"):
        job(f"--config.model={rounded}", "--quantize=int4")
    with pytest.raises(UserError, match="rounded is in int8, so vit cannot be trained"):
        job(f"--config.model={rounded}", "--config.freeze_vit=false").figures("train")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--topology=v9:2x4"], "'v9:2x4': expected one of v4"),
        (["--topology=v5e:2by4"], "expected a shape such as v5e:2x4"),
        (["--topology=v5e:²x2"], "expected a shape such as v5e:2x4"),
        (["--topology=v5e:0x2"], "expected a shape such as v5e:2x4"),
        (["--topology=v5e:2x2x2"], "expected 2 sides, as v5e's slices have"),
        (["--topology=v5p:2x2"], "expected 3 sides.*for instance v5p:2x2x1"),
        (["--topology=v5e:1000x1000"], "at most 256 chips"),
        (["--topology=v5e:2x4", "--program=training"], "--program=training: expected some of"),
        (["--topology=v5e:2x4", "--size=7b"], "--size=7b: expected one of vicuna7b"),
        (["--topology=v5e:2x4", "--batch=0"], "--batch=0: expected a number above 0"),
        (["--topology=v5e:2x4", "--context=3000000000"], "above 0, up to 1,048,576"),
        (["--topology=v5e:2x4", "--context=32"], "--context=32: expected more than 32, which an"),
        (["--topology=v5e:2x4", "--config=v2_stage3", "--tokens=256"], "expected more than 256"),
        (["--topology=v5e:2x4", "--json=/nowhere/x.json"], "--json=/nowhere/x.json: expected a"),
        (["--topology=v5e:2x4", "--hlo=/dev/null/x"], "--hlo=/dev/null/x: cannot make"),
        (["--topology=v5e:2x4", "--config.dtype=float32"], "expected bfloat16"),
        (["--topology=v5e:2x4", "--config.batchsize=8"], "did you mean config.batch_size"),
    ],
)
def test_mistakes_are_named(args, message):
    with pytest.raises(UserError, match=message):
        command.main(args)


def test_the_memory_of_a_plan_is_read():
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
    assert compiler.memory_of(text) == compiler.Memory(400, 576, 1157612035, 0)


def test_what_does_not_fit_is_told():
    text = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm."
    lacks = compiler.lacks_of(text)
    assert (lacks.needed, lacks.available) == (20.5 * 2**30, 15.75 * 2**30)
    other = "the total memory required for HLO temporaries (20.5G) exceeds available HBM (15.75G)."
    assert compiler.lacks_of(other) == lacks
    assert compiler.lacks_of(other.replace("20.5G", "1.25P")).needed == 1.25 * 2**50
    f = report.Figures("train", "8 rows", 8, None, 0, lacks, None, 1.0, None, 1.0)
    assert "22.01 GB of 16.91 GB: 5.10 GB too many" in report.lines(f, HERE)[1]
    assert not report.record(f, HERE)["fits"]
    assert json.dumps(report.record(f, HERE))


def test_needed_flops_of_a_frozen_7b_step():
    """6 x parameters x tokens is for training all; of frozen layers the gradient of weights is not
    needed: 4 for the language model, 2 for the vision encoder."""
    config = size_of(TrainConfig(), "vicuna7b")[1]
    found = needed_flops(config, 1, 192, 192, PARTS)
    llm, vit = 6_476_271_616 + 131_072_000, 985_894_528 - 361_000
    rough = 4 * llm * 192 + 2 * vit * 257
    assert rough < found < 1.05 * rough
    rounded = dataclasses.replace(config, quantize="int4")
    assert needed_flops(rounded, 1, 192, 192, PARTS) == found
