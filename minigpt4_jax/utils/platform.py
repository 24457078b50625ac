"""The platform that programs are traced for, and what is compiled otherwise on a GPU.

CPU, GPU and TPU run the same model. Where XLA needs another form of the same computation, `backend()`
decides: it is the default backend, or the target of a plan (`compiling_for`). docs/reference/platforms.md
lists all the places.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

_TARGET: ContextVar[str | None] = ContextVar("target", default=None)
CompilerOptions = dict[str, bool | int | str]

# Options of XLA's compiler for GPUs, by what bounds a program.
_GPU_OPTIONS: dict[str, CompilerOptions] = {
    # Products of many rows (training, prefill, encoding): by cuBLAS, without trying Triton kernels. Untuned
    # ones do not even compile for 12 images of 257 tokens, and tuning them takes most of a first call.
    # Products that share an input are not joined: their weights would be concatenated at run time.
    "products": {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0},
    # Products of few rows (decoding) are bound by reading weights: those that share an input become one
    # kernel, which reads the weights where they are.
    "reads": {"xla_gpu_dot_merger_threshold_mb": 512},
}


def backend() -> str:
    """The platform of programs traced in this context: "cpu", "gpu" or "tpu"."""
    return _TARGET.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Trace programs for another platform than this machine's."""
    token = _TARGET.set(platform)
    try:
        yield
    finally:
        _TARGET.reset(token)


def compiler_options(bound: str) -> CompilerOptions | None:
    """`compiler_options` of jax.jit for a program bound by "products" or by "reads" of weights; None on
    CPU and TPU."""
    return _GPU_OPTIONS[bound] if backend() == "gpu" else None
