"""What is published of each TPU chip. Nothing here was measured.

Sources, read in November 2026: the key specifications on Google's pages docs.cloud.google.com/tpu/docs/v4,
/v5e, /v5p and /v6e. There the bidirectional bandwidth between chips is 400 GB/s on v5e, 1200 on
v5p and 800 on v6e, over 4, 6 and 4 links. For v4 it is the TPU v4 paper (Jouppi et al. 2023,
"An optically reconfigurable supercomputer"), table 4: 6 links of 50 GB/s. int8 of v5p: Google's
announcement of December 2023. The time of a hop is that of "How To Scale Your Model" (Austin et al.
2025, part 3), about 1 microsecond.
"""

import math
import re
from dataclasses import dataclass

from minigpt4_jax.errors import UserError

GIB = 1 << 30
HOP_SECONDS = 1e-6


@dataclass(frozen=True)
class Chip:
    """Peak figures of one chip."""

    name: str
    flops: float  # FLOP/s in bfloat16
    int8: float  # OP/s of int8 by int8; products of int8 weights here are bfloat16's
    hbm: int  # bytes
    bandwidth: float  # of HBM, bytes/s
    link: float  # of a link between chips, bytes/s in one direction
    links: int
    axes: int  # of a slice's shape
    most: int  # chips of the largest slice

    @property
    def usable(self) -> int:
        """Bytes of HBM that programs may take: the compiler keeps a quarter of a GiB."""
        return self.hbm - GIB // 4

    @property
    def ring(self) -> float:
        """Bytes/s that a chip passes on in a ring of chips, both ways round."""
        return 2 * self.link


CHIPS = {
    "v4": Chip("v4", 275e12, 275e12, 32 * GIB, 1200e9, 50e9, 6, 3, 4096),
    "v5e": Chip("v5e", 197e12, 393e12, 16 * GIB, 819e9, 50e9, 4, 2, 256),
    "v5p": Chip("v5p", 459e12, 918e12, 95 * GIB, 2765e9, 100e9, 6, 3, 8960),
    "v6e": Chip("v6e", 918e12, 1836e12, 32 * GIB, 1638e9, 100e9, 4, 2, 256),
}


def chip_of(topology: str) -> Chip:
    """The chip of a slice such as "v5e:2x4". UserError: none that is known."""
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise UserError(
            f"topology {topology!r}: expected one of {', '.join(CHIPS)} and a shape, as in v5e:2x4"
        )
    return CHIPS[name]


def sides_of(topology: str) -> tuple[int, ...]:
    """ "v5e:2x4" -> (2, 4). UserError: not of this form, or no slice of this kind of chip."""
    text = topology.partition(":")[2]
    if not re.fullmatch("[1-9][0-9]{0,4}(x[1-9][0-9]{0,4})*", text):
        raise UserError(f"topology {topology!r}: expected a shape such as v5e:2x4 or v5p:2x2x1")
    chip, sides = chip_of(topology), tuple(map(int, text.split("x")))
    if len(sides) != chip.axes or math.prod(sides) > chip.most:
        raise UserError(
            f"topology {topology!r}: expected {chip.axes} sides, as {chip.name}'s slices have, and "
            f"at most {chip.most} chips, for instance {chip.name}:{'x'.join('221'[: chip.axes])}"
        )
    return sides
