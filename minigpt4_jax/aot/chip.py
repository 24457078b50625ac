"""Peak figures of one chip, a TPU or a GPU, that programs are planned for."""

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class Chip:
    """Peak figures of one chip."""

    name: str
    flops: float  # bfloat16 FLOP/s
    hbm_bytes: int  # of its memory, HBM or GDDR
    hbm_bandwidth: float  # bytes/s
    link_bandwidth: float  # of one link between chips (ICI, NVLink, PCIe) in one direction, bytes/s
    links: int
    axes: int  # dimensions of a slice's shape
    max_chips: int  # of the largest slice, or of a node
    platform: str = "tpu"  # or "gpu"
    reserved: int = GIB // 4  # bytes that programs cannot use
    ring_links: int = 2  # links that a ring sends over: one a direction on TPUs, all on GPUs
    compute_capability: tuple[int, int] = (0, 0)  # of a GPU

    @property
    def usable_hbm(self) -> int:
        """Bytes of memory available to programs."""
        return self.hbm_bytes - self.reserved

    @property
    def ring_bandwidth(self) -> float:
        """Bytes/s that a chip sends in a ring."""
        return self.ring_links * self.link_bandwidth
