"""Compile programs in less time, in a process and in its children; and as for users in parts of it.

XLA reads XLA_FLAGS once in a process. Options of a single program take precedence over them.
"""

import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import Iterator

import jax
import pytest

# The older code generator of fusions takes half the time; programs are too small to split among threads;
# the preset leaves out passes that take a quarter of the time for a training step.
FLAGS = (
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_cpu_opt_preset=FAST_COMPILE"
)
DEFAULTS: dict[str, str | bool | int] = {
    "xla_cpu_use_fusion_emitters": True,
    "xla_cpu_parallel_codegen_split_count": 32,
    "xla_cpu_opt_preset": "CPU_OPT_PRESET_DEFAULT",
}


@functools.cache
def flags() -> str:
    """FLAGS, or "" if this version of XLA does not know them: it ends the process then."""
    if FLAGS in os.environ.get("XLA_FLAGS", ""):
        return FLAGS
    variables = os.environ | {"XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    done = subprocess.run(command, env=variables, capture_output=True)
    return "" if done.returncode else FLAGS


@contextlib.contextmanager
def default_options() -> Iterator[None]:
    """Compile as without FLAGS, here and in the processes started meanwhile."""
    given = os.environ.get("XLA_FLAGS", "")
    if FLAGS not in given:
        yield
        return
    from jax._src import compiler  # no public function reaches every program

    original = compiler.get_compile_options

    def get_compile_options(*args, env_options_overrides=None, **kwargs):
        options = DEFAULTS | (env_options_overrides or {})
        return original(*args, env_options_overrides=options, **kwargs)

    jax.clear_caches()  # of programs that other modules compiled quickly
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", get_compile_options)
        patch.setenv("XLA_FLAGS", given.replace(FLAGS, ""))
        yield
    jax.clear_caches()
