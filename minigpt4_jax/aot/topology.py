"""Published figures of TPU chips, and the devices of a TPU slice or of GPUs for AOT compilation.

Nothing was measured. GPUs are in gpus.py. Sources, read in November 2026: the key specifications on
Google's pages docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e. Their bidirectional interchip
bandwidth is 400 GB/s on v5e, 1200 on v5p and 800 on v6e, over 4, 6 and 4 links. v4: the TPU v4 paper
(Jouppi et al. 2023, "An optically reconfigurable supercomputer"), table 4: 6 links of 50 GB/s.
Latency per hop: "How To Scale Your Model" (Austin et al. 2025, part 3), about 1 microsecond.
"""

import math
import os
import re
from typing import Any

from minigpt4_jax.aot import gpus
from minigpt4_jax.aot.chip import GIB, Chip
from minigpt4_jax.errors import UserError
from minigpt4_jax.utils.text import one_line

HOP_SECONDS = 1e-6

# Programs cannot use a quarter of a GiB: the compiler reserves it.
CHIPS = {
    "v4": Chip("v4", 275e12, 32 * GIB, 1200e9, 50e9, 6, 3, 4096),
    "v5e": Chip("v5e", 197e12, 16 * GIB, 819e9, 50e9, 4, 2, 256),
    "v5p": Chip("v5p", 459e12, 95 * GIB, 2765e9, 100e9, 6, 3, 8960),
    "v6e": Chip("v6e", 918e12, 32 * GIB, 1638e9, 100e9, 4, 2, 256),
}


def chip_of(topology: str) -> Chip:
    """The chip of a slice such as "v5e:2x4" or "h200:8". UserError: unknown chip."""
    name = topology.partition(":")[0]
    chips = CHIPS | gpus.CHIPS
    if name not in chips:
        raise UserError(
            f"topology {topology!r}: expected one of {', '.join(chips)} and a shape, as in v5e:2x4, "
            "or a number of GPUs, as in h200:1"
        )
    return chips[name]


def slice_shape(topology: str) -> tuple[int, ...]:
    """ "v5e:2x4" -> (2, 4), "h200:8" -> (8,). UserError: malformed, or not a slice of this chip."""
    chip, text = chip_of(topology), topology.partition(":")[2]
    is_gpu = chip.platform == "gpu"
    if not re.fullmatch("[1-9][0-9]{0,4}(x[1-9][0-9]{0,4})*", text):
        example = (
            "a number of GPUs such as h200:1" if is_gpu else "a shape such as v5e:2x4 or v5p:2x2x1"
        )
        raise UserError(f"topology {topology!r}: expected {example}")
    shape = tuple(map(int, text.split("x")))
    if is_gpu and (len(shape) > 1 or shape[0] > chip.max_chips):
        raise UserError(
            f"topology {topology!r}: expected 1 to {chip.max_chips} GPUs of a node, as in {chip.name}:8"
        )
    if len(shape) != chip.axes or math.prod(shape) > chip.max_chips:
        raise UserError(
            f"topology {topology!r}: {chip.name} slices have {chip.axes} dimensions and at most "
            f"{chip.max_chips} chips, for instance {chip.name}:{'x'.join('221'[: chip.axes])}"
        )
    return shape


def slice_devices(topology: str) -> list[Any]:
    """The devices of a slice such as "v5e:2x4" or "h200:8", for lowering and compiling only.

    UserError: libtpu or JAX's CUDA plugin is not installed, or does not know the slice.
    """
    chip = chip_of(topology)
    if chip.platform == "gpu":
        return gpus.gpu_devices(chip.name, slice_shape(topology)[0])
    return _tpu_devices(topology)


def _tpu_devices(topology: str) -> list[Any]:
    from jax.experimental import topologies

    # Otherwise libtpu queries the network for the kind of machine.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # No chip is opened, so several processes may load libtpu.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    shape = topology.partition(":")[2]
    single_chip = set(shape) <= {"1", "x"} and shape != ""
    options: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if single_chip else {}
    if topology.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        )
    except Exception as e:  # the runtime raises its own types, also for a missing library
        raise UserError(
            f"topology {topology!r}: {one_line(e)}; expected for instance "
            "v5e:2x4, v5p:2x2x1 or v6e:4x4, and libtpu (pip install '.[tpu]')"
        ) from e
    return list(description.devices)
