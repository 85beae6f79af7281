"""How the backward's operands lie and are read: what backward_plan.py and images_plan.py share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ...gpu import Gpu
from ...problem import PatchProblem, Triple

STAGES = 3  # csrc/backward/plan.h: steps under way
WGMMA_PIXELS = 16  # of a row that one copy of the copy engine has, for wgmma


class Tile(NamedTuple):
    """A block's part of a product: BM×BN sums, BK of the summed index at a step."""

    BM: int
    BN: int
    BK: int
    rate: float = 1.0  # of multiply-adds, as in vitkernels/backends/triton/configs.py


# How an operand comes to shared memory, eight elements to a thread at a time (csrc/backward/plan.h): copied
# asynchronously, of the product's type already; so as it is, to be converted by the thread that copied it; one by one
OPERANDS = ("straight", "raw", "each")


class Operand(NamedTuple):
    loader: str
    chunk: int  # bytes copied at a time


class Grad(NamedTuple):
    """dY where it lies."""

    at: int  # its address, modulo 16
    strides: Triple


def pair_of(tiles: int, gpu: Gpu) -> int:
    """Blocks of a cluster that share an operand: two where at least half of the multiprocessors have a tile, as the L2
    is what is short where many read; else one."""
    return 2 if 2 <= gpu.multiprocessors <= 2 * tiles else 1


def largest_chunk(dtype: torch.dtype, at: int, steps: Sequence[int]) -> int:
    """The largest piece, in bytes, of which eight elements, all these numbers of elements and the address are
    multiples; 0: none that can be copied asynchronously."""
    size = dtype.itemsize
    for chunk in (16, 8, 4):
        if chunk >= size and not any(n % chunk for n in (8 * size, at, *(s * size for s in steps))):
            return chunk
    return 0


def operand_of(chunk: int, as_it_is: bool) -> Operand:
    return Operand("each" if chunk == 0 else "straight" if as_it_is else "raw", chunk)


def grad_operand(p: PatchProblem, grad: Grad) -> Operand:
    chunk = largest_chunk(p.out_dtype, grad.at, grad.strides[:2]) if grad.strides[2] == 1 else 0
    return operand_of(chunk, p.out_dtype == p.compute_dtype)


def no_map(p: PatchProblem, grad: Grad) -> tuple[tuple[bool, str], ...]:
    """Whether no tensor map can describe dY, and why."""
    b, row, channel = grad.strides
    return (
        (p.out_dtype != p.compute_dtype, "dY is of another type than the product"),
        (p.D > 1 and channel != 1, f"dY's channels are {channel} apart"),
        ((grad.at + p.T * row * 2) % 16 != 0, "dY is not on 16 bytes"),
        (p.B > 1 and (b <= 0 or b % 8 != 0), "dY's images are not 16 bytes apart"),
        (row <= 0 or row % 8 != 0, "dY's rows are not 16 bytes apart"),
    )
