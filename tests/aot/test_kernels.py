"""Kernels and copies of a step, counted in the HLO of a GPU program; descriptions of GPUs."""

import importlib.util

import pytest

from minigpt4_jax.aot import gpus
from minigpt4_jax.aot.cost import cost_of
from minigpt4_jax.aot.hlo import parse
from minigpt4_jax.aot.kernels import kernels_of
from minigpt4_jax.aot.topology import chip_of, slice_devices, slice_shape
from minigpt4_jax.cli import compile as command
from minigpt4_jax.errors import UserError

# A loop until the rows are done. An iteration copies a layer's weights out of their stack, multiplies by
# cuBLAS with its workspace, and writes a vector into the cache.
TEXT = """HloModule decode, is_scheduled=true

%slice_computation (p0: bf16[4,1024,512], p1: s32[]) -> bf16[1,1024,512] {
  %p0 = bf16[4,1024,512]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = bf16[1,1024,512]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,1024,512}
}

%write_computation (p2: bf16[2048,128], p3: s32[1,1], p4: bf16[1,128]) -> bf16[2048,128] {
  %p2 = bf16[2048,128]{1,0} parameter(0)
  %p3 = s32[1,1]{1,0} parameter(1)
  %p4 = bf16[1,128]{1,0} parameter(2)
  ROOT %scatter = bf16[2048,128]{1,0} scatter(%p2, %p3, %p4), update_window_dims={1}
}

%body (state: (s32[], bf16[4,1024,512], bf16[8,512], bf16[2048,128], s32[1,1], bf16[1,128])) -> (s32[]) {
  %state = (s32[], bf16[4,1024,512], bf16[8,512], bf16[2048,128], s32[1,1], bf16[1,128]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %stack = bf16[4,1024,512]{2,1,0} get-tuple-element(%state), index=1
  %x = bf16[8,512]{1,0} get-tuple-element(%state), index=2
  %cache = bf16[2048,128]{1,0} get-tuple-element(%state), index=3
  %slot = s32[1,1]{1,0} get-tuple-element(%state), index=4
  %new = bf16[1,128]{1,0} get-tuple-element(%state), index=5
  %layer = bf16[1,1024,512]{2,1,0} fusion(%stack, %i), kind=kLoop, calls=%slice_computation
  %weight = bf16[1024,512]{1,0} bitcast(%layer)
  %product = (bf16[8,1024]{1,0}, s8[4194304]{0}) custom-call(%x, %weight), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}}
  %written = bf16[2048,128]{1,0} fusion(%cache, %slot, %new), kind=kInput, calls=%write_computation
  ROOT %next = (s32[], bf16[4,1024,512], bf16[8,512], bf16[2048,128], s32[1,1], bf16[1,128]) tuple(%i, %stack, %x, %written, %slot, %new)
}

%condition (state.1: (s32[])) -> pred[] {
  %state.1 = (s32[], bf16[4,1024,512], bf16[8,512], bf16[2048,128], s32[1,1], bf16[1,128]) parameter(0)
  ROOT %done = pred[] get-tuple-element(%state.1), index=0
}

ENTRY %main (w: bf16[4,1024,512], x0: bf16[8,512], c: bf16[2048,128], s: s32[1,1], n: bf16[1,128]) -> bf16[2048,128] {
  %w = bf16[4,1024,512]{2,1,0} parameter(0)
  %x0 = bf16[8,512]{1,0} parameter(1)
  %c = bf16[2048,128]{1,0} parameter(2)
  %s = s32[1,1]{1,0} parameter(3)
  %n = bf16[1,128]{1,0} parameter(4)
  %first = s32[] constant(0)
  %copied = bf16[2048,128]{1,0} copy(%c)
  %initial = (s32[], bf16[4,1024,512], bf16[8,512], bf16[2048,128], s32[1,1], bf16[1,128]) tuple(%first, %w, %x0, %copied, %s, %n)
  %loop = (s32[], bf16[4,1024,512], bf16[8,512], bf16[2048,128], s32[1,1], bf16[1,128]) while(%initial), condition=%condition, body=%body
  ROOT %result = bf16[2048,128]{1,0} get-tuple-element(%loop), index=3
}
"""  # noqa: E501
WEIGHT = 1024 * 512 * 2


def test_a_step_is_an_iteration_of_the_loop():
    kernels = kernels_of(parse(TEXT))
    assert (kernels.count, kernels.library_calls) == (3, 1)  # the copy before the loop is not in it
    assert (kernels.copies, kernels.copied_bytes) == (1, WEIGHT)
    assert (kernels.argument_copies, kernels.argument_copied_bytes) == (1, WEIGHT)


def test_a_program_without_such_a_loop_counts_as_a_whole():
    entry = TEXT.replace("%loop = ", "%unused = ").replace("while(%initial)", "call(%initial)")
    kernels = kernels_of(parse(entry.replace("condition=%condition, body=", "to_apply=")))
    assert kernels.count == 4
    assert kernels.argument_copies == 2 and kernels.copies == 2


def test_traffic_of_library_calls_and_of_writes_in_place():
    cost = cost_of(parse(TEXT))
    x, y, cache, vector = 8 * 512 * 2, 8 * 1024 * 2, 2048 * 128 * 2, 128 * 2
    # The workspace of cuBLAS is not counted, nor the rest of a cache that one vector is written to.
    assert cost.hbm_bytes == 2 * WEIGHT + (WEIGHT + x + y) + (2 * vector + 4) + 2 * cache + 4
    assert cost.flops == 2 * 8 * 1024 * 512


def test_float8_products_take_half_the_time():
    in_bfloat16 = sum(i.mxu_flops * i.count for i in cost_of(parse(TEXT)).instructions)
    in_float8 = cost_of(parse(TEXT.replace('lt$matmul"', 'lt$matmul$f8"')))
    assert sum(i.mxu_flops * i.count for i in in_float8.instructions) == in_bfloat16 / 2 > 0
    assert in_float8.flops == cost_of(parse(TEXT)).flops


@pytest.mark.parametrize("name", gpus.GPUS)
def test_a_gpu_is_described_to_the_compiler(name):
    chip = chip_of(f"{name}:1")
    assert chip.platform == "gpu" and chip.usable_hbm < chip.hbm_bytes
    text = gpus.target_config(name)
    assert f"device_memory_size: {chip.hbm_bytes}" in text and text.count("{") == text.count("}")
    assert slice_shape(f"{name}:8") == (8,)


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is not None, reason="the plugin is installed"
)
def test_a_missing_compiler_is_named_with_what_to_install():
    with pytest.raises(UserError, match=r"CUDA plugin is not installed: pip install '.\[cuda\]'"):
        slice_devices("h200:1")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--topology=h200"], "'h200': expected a number of GPUs such as h200:1"),
        (["--topology=h200:9"], "expected 1 to 8 GPUs of a node, as in h200:8"),
        (["--topology=h200:2x4"], "expected 1 to 8 GPUs of a node"),
        (["--topology=h300:1"], "'h300:1': expected one of v4, .*h200.*, or a number of GPUs"),
    ],
)
def test_invalid_gpus_are_named(args, message):
    with pytest.raises(UserError, match=message):
        command.main(args)
