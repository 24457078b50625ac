"""Costs counted from HLO text, and the time predicted from them."""

import jax
import jax.numpy as jnp
import pytest
from helpers.paths import FIXTURES

from minigpt4_jax.aot.cost import Collective, Cost, InstructionCost, cost_of
from minigpt4_jax.aot.hlo import parse
from minigpt4_jax.aot.roofline import predict
from minigpt4_jax.aot.topology import CHIPS, chip_of
from minigpt4_jax.errors import UserError

pytestmark = pytest.mark.default_compiler

# Shortened HLO of a program compiled by libtpu 0.0.42: a scan over 32 layers gathers one matrix in
# pieces, overlapped with the products of two fusions, and another one exposed; attention is a
# dilated convolution.
TPU_PROGRAM = FIXTURES / "tpu_program.hlo.txt"


def test_cost_of_a_tpu_program():
    cost = cost_of(parse(TPU_PROGRAM.read_text()))
    assert cost.unknown_loops == 0
    matrix = 64 * 256 * 2  # bytes of the gathered matrix
    assert {(c.kind, c.group_size, c.bytes, c.count, c.overlapped) for c in cost.collectives} == {
        # its two pieces are one collective; one spans the whole loop
        ("all-gather", 8, matrix, 33, True),
        ("all-gather", 8, matrix, 32, False),
        ("all-reduce", 2, 768 * 4, 1, False),
    }
    assert cost.sent_bytes == 65 * matrix * 7 / 8 + 768 * 4
    product = 2 * (2 * 8) * 64 * 256
    scores = 2 * (2 * 4) * 8 * 8 * 16  # only dilated positions of the same head overlap
    assert cost.flops == 32 * (product + scores)
    # Per iteration: one layer sliced from the stack, the exposed gather written, and read by the
    # first fusion together with its rows. What the pieces forward is not in HBM.
    iteration = 64 * 32 * 2 + 2 * matrix + 2 * 8 * 256 * 2
    # rel: the loop counter
    assert cost.hbm_bytes == pytest.approx(32 * iteration + 2 * 768 * 4, rel=1e-3)


def test_scan_body_counts_once_per_iteration():
    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    shapes = (
        jax.ShapeDtypeStruct((32, 64), jnp.float32),
        jax.ShapeDtypeStruct((7, 64, 64), "float32"),
    )
    cost = cost_of(parse(jax.jit(layers).lower(*shapes).compile().as_text()))
    assert cost.flops == 7 * 2 * 32 * 64 * 64


def test_overlapped_collectives_are_hidden_and_exposed_ones_add_time():
    chip = CHIPS["v5e"]
    instructions = (
        InstructionCost(chip.flops, chip.flops, 0.0, False, 2),  # 2 s of products
        InstructionCost(0.0, 0.0, chip.hbm_bandwidth, False, 1),  # 1 s of HBM traffic
    )

    def predicted(*collectives):
        return predict(Cost(instructions, collectives, 0), chip, (2, 2), 4 * chip.flops)

    # bytes that take 1 and 4 s to a neighbour
    small, large = int(chip.ring_bandwidth), int(4 * chip.ring_bandwidth)
    alone = predicted()
    assert (alone.seconds, alone.bottleneck, alone.mfu) == (3.0, "compute", 1 / 3)
    overlapped = predicted(Collective("collective-permute", 2, small, 1, True))
    assert overlapped.seconds == 3.0
    assert overlapped.link_seconds == pytest.approx(1.0, rel=1e-4)
    exposed = predicted(Collective("collective-permute", 2, small, 1, False))
    assert exposed.seconds == pytest.approx(4.0, rel=1e-4)
    assert predicted(Collective("collective-permute", 2, large, 1, False)).bottleneck == "links"
    # ring: a chip sends (n - 1) / n of a gathered array, and twice that for a sum
    assert Collective("all-gather", 4, 100, 1, True).sent_bytes == 75
    assert Collective("all-reduce", 4, 100, 1, True).sent_bytes == 150


def test_unknown_chip_is_an_error():
    with pytest.raises(UserError, match="'v3:2x2': expected one of v4, v5e"):
        chip_of("v3:2x2")
