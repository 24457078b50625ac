"""Processes with virtual CPU devices, and XLA flags with which programs compile quickly."""

import functools
import os
import subprocess
import sys

# The older code generator of fusions takes half the time; programs are too small to split among threads;
# the preset leaves out passes that take a quarter of the time for a training step.
QUICK_CODEGEN = (
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_cpu_opt_preset=FAST_COMPILE"
)


def environment(devices: int) -> dict[str, str]:
    """Environment variables for a process with this many virtual CPU devices."""
    flags = f"--xla_force_host_platform_device_count={devices} {quick_codegen_flags()}"
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return os.environ | quick | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


@functools.cache
def quick_codegen_flags() -> str:
    """QUICK_CODEGEN, or "" if this version of XLA does not know the flags: it ends the process then."""
    if QUICK_CODEGEN in os.environ.get("XLA_FLAGS", ""):
        return QUICK_CODEGEN
    variables = os.environ | {"XLA_FLAGS": QUICK_CODEGEN, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    done = subprocess.run(command, env=variables, capture_output=True)
    return "" if done.returncode else QUICK_CODEGEN
