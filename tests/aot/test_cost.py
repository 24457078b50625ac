"""Costs counted from the text of compiled programs, and the time that they predict."""

import jax
import jax.numpy as jnp
import pytest
from helpers.paths import FIXTURES

from minigpt4_jax.aot.cost import Collective, Cost, Step, cost_of
from minigpt4_jax.aot.hlo import parse
from minigpt4_jax.aot.roofline import predict
from minigpt4_jax.aot.topology import CHIPS, chip_of
from minigpt4_jax.errors import UserError

# Lines of a program that libtpu 0.0.42 compiled, shortened: a scan of 32 layers gathers a matrix in
# pieces beside the products of two fusions, and another at once; attention is a dilated convolution.
TPU = FIXTURES / "tpu_program.hlo.txt"


def test_the_text_of_a_tpu_program():
    cost = cost_of(parse(TPU.read_text()))
    assert cost.open_loops == 0
    matrix = 64 * 256 * 2  # bytes of the gathered matrix
    assert {(c.kind, c.group, c.bytes, c.count, c.ahead) for c in cost.collectives} == {
        ("all-gather", 8, matrix, 33, True),  # its two pieces are one exchange; one spans the loop
        ("all-gather", 8, matrix, 32, False),
        ("all-reduce", 2, 768 * 4, 1, False),
    }
    assert cost.sent == 65 * matrix * 7 / 8 + 768 * 4
    product = 2 * (2 * 8) * 64 * 256
    scores = 2 * (2 * 4) * 8 * 8 * 16  # of the dilated positions only those of one head meet
    assert cost.flops == 32 * (product + scores)
    # A turn: the slice, of the stack one layer; the matrix gathered at once, written and read by
    # the first fusion beside its rows. What the pieces hand on lies elsewhere.
    turn = 64 * 32 * 2 + 2 * matrix + 2 * 8 * 256 * 2
    assert cost.bytes == pytest.approx(32 * turn + 2 * 768 * 4, rel=1e-3)  # and the counter


def test_a_scan_counts_as_often_as_it_runs():
    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    shapes = (
        jax.ShapeDtypeStruct((32, 64), jnp.float32),
        jax.ShapeDtypeStruct((7, 64, 64), "float32"),
    )
    cost = cost_of(parse(jax.jit(layers).lower(*shapes).compile().as_text()))
    assert cost.flops == 7 * 2 * 32 * 64 * 64


def test_exchanges_ahead_run_beside_the_rest_and_others_wait():
    chip = CHIPS["v5e"]
    steps = (
        Step(chip.flops, chip.flops, 0.0, False, 2),  # 2 s of products
        Step(0.0, 0.0, chip.bandwidth, False, 1),  # 1 s of memory
    )

    def seconds(*exchanges):
        return predict(Cost(steps, exchanges, 0), chip, (2, 2), 4 * chip.flops)

    small, large = int(chip.ring), int(4 * chip.ring)  # bytes of 1 and 4 s to a neighbour
    alone = seconds()
    assert (alone.seconds, alone.limit, alone.share) == (3.0, "compute", 1 / 3)
    beside = seconds(Collective("collective-permute", 2, small, 1, True))
    assert beside.seconds == 3.0
    assert beside.links == pytest.approx(1.0, rel=1e-4)
    waited = seconds(Collective("collective-permute", 2, small, 1, False))
    assert waited.seconds == pytest.approx(4.0, rel=1e-4)
    links = seconds(Collective("collective-permute", 2, large, 1, False))
    assert links.limit == "links"
    # a chip passes on (n - 1) / n of what is gathered, and twice that of a sum
    assert Collective("all-gather", 4, 100, 1, True).sent == 75
    assert Collective("all-reduce", 4, 100, 1, True).sent == 150


def test_an_unknown_chip_is_named():
    with pytest.raises(UserError, match="'v3:2x2': expected one of v4, v5e"):
        chip_of("v3:2x2")
