"""TPU slices that need not be there: devices for the compiler, and what a chip is said to do.

The compiler for TPUs (libtpu, `pip install '.[tpu]'`) makes programs for any slice on any machine.
"""

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import jax

from minigpt4_jax.errors import UserError

_TARGET: ContextVar[str | None] = ContextVar("target", default=None)


def backend() -> str:
    """The platform that programs traced now are for: "cpu", "gpu" or "tpu"."""
    return _TARGET.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Within it, programs are traced for a platform that is not this machine's."""
    token = _TARGET.set(platform)
    try:
        yield
    finally:
        _TARGET.reset(token)


def devices(topology: str) -> list[Any]:
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
