"""Data-sheet figures of GPUs that people train on: what the cost model divides by, never a measurement.

Peak rates are dense (without sparsity), of 16-bit products those summed in fp32. None of NVIDIA's own documents could
be opened where this table was written. Each figure was compared with copies of them elsewhere, except those that are
named in `unchecked`, which are from memory or read off the same chip's other board.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..gpu import NOMINAL, Gpu


class DataSheet(NamedTuple):
    """One GPU. TFLOP/s by product, as `product_of` names products; GB = 1e9 bytes, MB of L2 as the sheets say."""

    name: str
    arch: int  # 90 for sm_90
    multiprocessors: int
    half: float  # fp16 and bf16
    tf32: float
    fp32: float  # without tensor cores
    fp64: float  # with them, where the GPU has any for it
    memory_gb_s: float
    l2_mb: float
    host_gb_s: float  # PCIe x16, one direction, as the standard counts
    peer_gb_s: float  # NVLink, one direction, all links together; PCIe where there is none
    source: str
    unchecked: str = ""

    def flops(self, product: str) -> float:
        """FLOP a second."""
        return getattr(self, product) * 1e12

    @property
    def bytes(self) -> float:
        """Bytes of memory a second."""
        return self.memory_gb_s * 1e9

    def ridge(self, product: str) -> float:
        """FLOP a byte from which arithmetic bounds, not memory."""
        return self.flops(product) / self.bytes

    @property
    def planned(self) -> Gpu:
        """As the plans of the kernels know it: the figures of its architecture, its own multiprocessors."""
        return NOMINAL[self.arch]._replace(name=self.name, multiprocessors=self.multiprocessors)


GPUS: dict[str, DataSheet] = {
    sheet.name: sheet
    for sheet in (
        DataSheet("A100 SXM 80GB", 80, 108, 312, 156, 19.5, 19.5, 2039, 40, 32, 300,
                  "NVIDIA A100 data sheet; A100 architecture whitepaper (L2, multiprocessors)"),
        DataSheet("H100 SXM", 90, 132, 989.4, 494.7, 66.9, 66.9, 3350, 50, 64, 450,
                  "NVIDIA H100 data sheet; H100 architecture whitepaper (L2, multiprocessors, digits after the point)"),
        DataSheet("H200", 90, 132, 989.4, 494.7, 66.9, 66.9, 4800, 50, 64, 450,
                  "NVIDIA H200 data sheet (SXM)", "tf32, fp32, l2_mb: as the H100, the same chip"),
        DataSheet("B200", 100, 148, 2250, 1100, 80, 40, 8000, 126, 64, 900,
                  "NVIDIA Blackwell architecture technical brief, HGX B200 at 1000 W (memory: 'up to')",
                  "l2_mb: no data sheet has it; host_gb_s: PCIe 5, as HGX boards are built"),
        DataSheet("L4", 89, 58, 121, 60, 30.3, 0.47, 300, 48, 32, 32,
                  "NVIDIA L4 data sheet (half of its figures, which count sparsity)",
                  "multiprocessors: 7424 cores / 128"),
        DataSheet("RTX 4090", 89, 128, 165.2, 82.6, 82.6, 1.29, 1008, 72, 32, 32,
                  "NVIDIA Ada GPU architecture whitepaper", "multiprocessors: 16384 cores / 128"),
    )
}  # fmt: skip


def named(names: str | Sequence[str] | None) -> list[DataSheet]:
    """The sheets of these GPUs, of all for None.

    Raises:
        ValueError: a name that is not in GPUS; the message has those that are.
    """
    wanted = list(GPUS) if names is None else [names] if isinstance(names, str) else list(names)
    if unknown := [name for name in wanted if name not in GPUS]:
        raise ValueError(f"no data sheet of {', '.join(map(str, unknown))}; there are {', '.join(GPUS)}")
    return [GPUS[name] for name in wanted]
