"""Processes with virtual CPU devices."""

import os

from helpers import quick_codegen


def environment(devices: int) -> dict[str, str]:
    """Environment variables for a process with this many virtual CPU devices, which compiles quickly."""
    flags = f"--xla_force_host_platform_device_count={devices} {quick_codegen.flags()}"
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return os.environ | quick | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
