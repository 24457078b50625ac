"""The platform that programs are traced for, and what is compiled otherwise on a GPU.

CPU, GPU and TPU run the same model. Where XLA needs another form of the same computation, `backend()`
decides: it is the default backend, or the target of a plan (`compiling_for`). docs/guides/gpu.md
lists all the places.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

# Platform and compute capability that a plan is for
_TARGET: ContextVar[tuple[str, tuple[int, int]] | None] = ContextVar("target", default=None)
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
    # The same with several rows for models with adapters, and for matrices that are split over several GPUs:
    # their outputs are no multiples of a kernel's blocks, so that joined products would copy the weights in
    # every step.
    "separate reads": {"xla_gpu_dot_merger_threshold_mb": 0},
    # The same for int8 weights whose inputs, split over several GPUs, are no multiple of 64 (11,008 over 8):
    # products that also split their inputs within a GPU would pad them, and write the unpacked matrix in
    # every step.
    "unsplit reads": {
        "xla_gpu_dot_merger_threshold_mb": 0,
        "xla_gpu_experimental_force_split_k": 1,
    },
    # The same for weights with groups of 4 bits, which products unpack as they read them. Joined products
    # would unpack them to memory, and so would products that are split over their inputs.
    "packed reads": {
        "xla_gpu_dot_merger_threshold_mb": 0,
        "xla_gpu_experimental_enable_subchannel_dequantisation_fusion": True,
        "xla_gpu_experimental_force_split_k": 1,
    },
}


def backend() -> str:
    """The platform of programs traced in this context: "cpu", "gpu" or "tpu"."""
    target = _TARGET.get()
    return jax.default_backend() if target is None else target[0]


@contextlib.contextmanager
def compiling_for(platform: str, capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Trace programs for another platform than this machine's. capability: compute capability of a GPU."""
    token = _TARGET.set((platform, capability))
    try:
        yield
    finally:
        _TARGET.reset(token)


def compiler_options(bound: str) -> CompilerOptions | None:
    """`compiler_options` of jax.jit for a program bound by "products", or by "reads", "separate reads",
    "unsplit reads" or "packed reads" of weights; None on CPU and TPU."""
    return _GPU_OPTIONS[bound] if backend() == "gpu" else None


def compute_capability() -> tuple[int, int]:
    """That of the NVIDIA GPU that programs are traced for; (0, 0) for GPUs of other makers, and without a
    GPU."""
    target = _TARGET.get()
    if target is not None:
        return target[1]
    device = jax.devices()[0]
    if device.platform != "gpu":
        return 0, 0
    major, _, minor = str(device.compute_capability).partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)


def unrolls_layers() -> bool:
    """Whether training and encoding run a list of layers, as decoding does everywhere, instead of a scan over
    stacked ones: on a GPU, XLA copies each layer's weights out of the stack, an eighth of a step."""
    return backend() == "gpu"
