"""What is published of each TPU chip. Nothing here was measured.

Sources, read in November 2026: the key specifications on Google's pages docs.cloud.google.com/tpu/docs/v4,
/v5e, /v5p and /v6e. There the bidirectional bandwidth between chips is 400 GB/s on v5e, 1200 on
v5p and 800 on v6e, over 4, 6 and 4 links. For v4 it is the TPU v4 paper (Jouppi et al. 2023,
"An optically reconfigurable supercomputer"), table 4: 6 links of 50 GB/s. int8 of v5p: Google's
announcement of December 2023. The time of a hop is that of "How To Scale Your Model" (Austin et al.
2025, part 3), about 1 microsecond.
"""

import math
import os
import re
from dataclasses import dataclass
from typing import Any

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


def slice_devices(topology: str) -> list[Any]:
    """The devices of a slice, for instance "v5e:2x4", for lowering alone.

    UserError: libtpu is not installed, or does not know the slice.
    """
    from jax.experimental import topologies

    # else libtpu asks the network which machine this is
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault(
        "ALLOW_MULTIPLE_LIBTPU_LOAD", "1"
    )  # no chip is held, so nothing is shared
    shape = topology.partition(":")[2]
    single = set(shape) <= {"1", "x"} and shape != ""
    bounds: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if single else {}
    if topology.startswith("v4:"):
        bounds["chip_config_name"] = "megacore"  # its two cores as one, as they are used
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **bounds)
    except Exception as e:  # the runtime raises its own kinds, among them for a missing library
        raise UserError(
            f"topology {topology!r}: {str(e).splitlines()[0][:200]}; expected for instance "
            "v5e:2x4, v5p:2x2x1 or v6e:4x4, and libtpu (pip install '.[tpu]')"
        ) from e
    return list(found.devices)
