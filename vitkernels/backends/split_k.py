"""The weight's gradient in parts, each of some of the patches, so that all multiprocessors have tiles of dW."""

from __future__ import annotations

from typing import NamedTuple

from ..gpu import Gpu
from ..problem import PatchProblem

# What a call needs beside its gradients: several parts of dW, or of the table, have at most so many bytes together.
WEIGHT_BYTES, TABLE_BYTES = 20 << 20, 8 << 20
PART_COST = 5.0  # multiply-adds that writing and reading an element of dW once more takes (H100: 8 bytes at 4 TB/s)


class Split(NamedTuple):
    cost: float  # in multiply-adds of one multiprocessor
    parts: int
    steps: int  # of a part


def cheapest(p: PatchProblem, gpu: Gpu, tiles: int, steps: int, multiply_adds: float, begin: int = 4) -> Split:
    """Of `steps` steps of so many multiply-adds, for each of `tiles` tiles; `begin` more are the time to begin."""
    most = min(steps, WEIGHT_BYTES // (p.D * p.K * p.sum_dtype.itemsize), 4 * gpu.multiprocessors // tiles)

    def split(wanted: int) -> Split:
        each = -(-steps // wanted)
        parts = -(-steps // each)
        waves = -(-tiles * parts // gpu.multiprocessors)
        return Split(waves * (each + begin) * multiply_adds + PART_COST * p.D * p.K * parts, parts, each)

    return min(map(split, range(1, max(1, most) + 1)), key=lambda split: split.cost)
