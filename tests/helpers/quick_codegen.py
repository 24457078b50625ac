"""Options of XLA with which programs compile quickly, for this process and for those that it starts.

In this process they are options of each program, because XLA_FLAGS hold for all of its programs: what XLA
compiled with these flags before makes programs without them differ from those of users.
"""

import contextlib
import functools
import os
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest

# The older code generator of fusions takes half the time; programs are too small to split among threads;
# the preset leaves out passes that take a quarter of the time for a training step.
FLAGS = (
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_cpu_opt_preset=FAST_COMPILE"
)
OPTIONS: dict[str, str | bool | int] = {
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
    "xla_cpu_opt_preset": "CPU_OPT_PRESET_FAST_COMPILE",
}


@functools.cache
def flags() -> str:
    """FLAGS, or "" if this version of XLA does not know them: they would end a process.

    After a call XLA has read this process' own XLA_FLAGS.
    """
    program = jax.jit(jnp.negative).lower(jax.ShapeDtypeStruct((), jnp.float32))
    try:
        program.compile(compiler_options=dict(OPTIONS))
    except jax.errors.JaxRuntimeError:
        return ""
    return FLAGS


@contextlib.contextmanager
def quick_codegen() -> Iterator[None]:
    """Compile with OPTIONS here, and with FLAGS in the processes started meanwhile."""
    if not flags():
        yield
        return
    from jax._src import compiler  # no public function reaches every program

    original = compiler.get_compile_options

    def get_compile_options(*args, env_options_overrides=None, **kwargs):
        options = OPTIONS | (env_options_overrides or {})
        return original(*args, env_options_overrides=options, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", get_compile_options)
        patch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip())
        yield
