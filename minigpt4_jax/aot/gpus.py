"""Published figures of NVIDIA GPUs, and their descriptions for XLA's compiler. Nothing was measured.

Sources, read in November 2026: NVIDIA's data sheets (dense bfloat16 products with float32 sums, memory
bandwidth, NVLink) and the tables of compute capabilities in the CUDA C++ Programming Guide. Bytes of
memory are what the driver reports; L2 and clocks as the driver or the architecture white papers give them.
"""

import importlib.util
from dataclasses import dataclass
from typing import Any

from minigpt4_jax.aot.chip import GIB, Chip
from minigpt4_jax.errors import UserError
from minigpt4_jax.utils.text import one_line

MIB = 1 << 20
NODE = 8  # GPUs of a node at most


@dataclass(frozen=True)
class Gpu:
    """What XLA's compiler asks about a GPU, beside the figures of `Chip`."""

    name: str  # as the driver gives it
    compute_capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    l2_bytes: int
    clock_ghz: float


@dataclass(frozen=True)
class Architecture:
    """Limits of a streaming multiprocessor of one compute capability."""

    fpus: int
    threads: int
    shared_memory: int  # bytes
    shared_memory_per_block: int  # bytes, where a kernel asks for more than 48 KiB


ARCHITECTURES = {
    (7, 5): Architecture(64, 1024, 64 << 10, 64 << 10),
    (8, 0): Architecture(64, 2048, 164 << 10, 163 << 10),
    (8, 6): Architecture(128, 1536, 100 << 10, 99 << 10),
    (8, 9): Architecture(128, 1536, 100 << 10, 99 << 10),
    (9, 0): Architecture(128, 2048, 228 << 10, 227 << 10),
    (10, 0): Architecture(128, 2048, 228 << 10, 227 << 10),
}

GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 50 * MIB, 1.98),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 50 * MIB, 1.98),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 126 * MIB, 1.965),
    "a100-40": Gpu("NVIDIA A100-SXM4-40GB", (8, 0), 108, 40 * MIB, 1.41),
    "a100-80": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 40 * MIB, 1.41),
    "l40s": Gpu("NVIDIA L40S", (8, 9), 142, 96 * MIB, 2.52),
    "l4": Gpu("NVIDIA L4", (8, 9), 58, 48 * MIB, 2.04),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", (8, 9), 128, 72 * MIB, 2.52),
    "rtx3090": Gpu("NVIDIA GeForce RTX 3090", (8, 6), 82, 6 * MIB, 1.695),
    "t4": Gpu("Tesla T4", (7, 5), 40, 4 * MIB, 1.59),
}


def _chip(
    name: str, flops: float, memory_mib: int, bandwidth: float, link: float, links: int
) -> Chip:
    # CUDA's context and its libraries take about 1 GiB of the memory.
    return Chip(
        name, flops, memory_mib * MIB, bandwidth, link, links, 1, NODE, "gpu", GIB, links,
        GPUS[name].compute_capability,
    )  # fmt: skip


NVLINK = 25e9  # of one link of NVLink 3 and 4 in one direction, bytes/s
PCIE4 = 32e9  # of 16 lanes of PCIe 4.0 in one direction
CHIPS = {
    "h100": _chip("h100", 989e12, 81_008, 3.35e12, NVLINK, 18),
    "h200": _chip("h200", 989e12, 143_771, 4.8e12, NVLINK, 18),
    "b200": _chip("b200", 2250e12, 182_642, 8e12, 2 * NVLINK, 18),
    "a100-40": _chip("a100-40", 312e12, 40_370, 1.555e12, NVLINK, 12),
    "a100-80": _chip("a100-80", 312e12, 81_158, 2.039e12, NVLINK, 12),
    "l40s": _chip("l40s", 362e12, 45_500, 864e9, PCIE4, 1),
    "l4": _chip("l4", 121e12, 22_565, 300e9, PCIE4, 1),
    "rtx4090": _chip("rtx4090", 165e12, 24_210, 1008e9, PCIE4, 1),
    "rtx3090": _chip("rtx3090", 71e12, 24_250, 936e9, PCIE4, 1),
    # No bfloat16 in its matrix units: products run at the float32 rate.
    "t4": _chip("t4", 8.1e12, 15_100, 320e9, 16e9, 1),
}


def target_config(name: str) -> str:
    """XLA's description of a GPU (the text of a GpuTargetConfigProto)."""
    gpu, chip = GPUS[name], CHIPS[name]
    major, minor = gpu.compute_capability
    limits = ARCHITECTURES[gpu.compute_capability]
    # Hopper and later have instructions that only code for exactly this architecture may use.
    features = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {limits.threads}
  shared_memory_per_block: 49152 shared_memory_per_core: {limits.shared_memory}
  shared_memory_per_block_optin: {limits.shared_memory_per_block}
  core_count: {gpu.cores} fpus_per_core: {limits.fpus}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {chip.hbm_bandwidth:.0f} device_memory_size: {chip.hbm_bytes}
  l2_cache_size: {gpu.l2_bytes} clock_rate_ghz: {gpu.clock_ghz}
  cuda_compute_capability {{ major: {major} minor: {minor}{features} }}
}}
runtime_version: {{ major: 12 minor: 9 patch: 0 }}
dnn_version_info {{ major: 9 minor: 8 }}
platform_name: "CUDA"
device_description_str: "{gpu.name}"
"""


def gpu_devices(name: str, count: int) -> list[Any]:
    """`count` GPUs of a node, for lowering and compiling only.

    UserError: JAX's CUDA plugin is not installed, or does not compile for this GPU.
    """
    from jax.experimental import topologies

    topology = f"{name}:{count}"
    if not any(importlib.util.find_spec(f"jax_cuda{v}_plugin") for v in (12, 13)):
        raise UserError(
            f"topology {topology!r}: JAX's CUDA plugin is not installed: pip install '.[cuda]' "
            "(2.5 GB; no GPU is needed)"
        )
    try:
        description = topologies.get_topology_desc(
            platform="cuda",
            topology_name=topology,
            target_config=target_config(name),
            topology=f"1x1x{count}",
        )
    except Exception as e:  # the runtime raises its own types
        raise UserError(
            f"topology {topology!r}: {one_line(e)}; expected JAX's CUDA plugin of the version of "
            "JAX itself (pip install '.[cuda]')"
        ) from e
    return list(description.devices)
