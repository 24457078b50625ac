"""Processes with virtual CPU devices, whose programs are compiled as fast as can be."""

import functools
import os

import jax


def environment(devices: int) -> dict[str, str]:
    """Of a process that is to have so many devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    if _is_known("xla_cpu_use_fusion_emitters"):
        flags += " --xla_cpu_use_fusion_emitters=false"
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return os.environ | quick | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


@functools.cache
def _is_known(flag: str) -> bool:
    """Whether this version of XLA has it: a process ends at once if told one that it has not."""
    try:
        jax.jit(lambda: 0, compiler_options={flag: False}).lower().compile()
    except Exception:
        return False
    return True
