"""What csrc/backward will do for the images' gradient (images.cuh, images_sm90.cuh); backward_plan.py has the rest."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from ...gpu import Gpu
from ...problem import PatchProblem, Triple
from ..patch_layout import (
    PatchLayout,
    blocks_in,
    blocks_of,
    group_of,
    layout_of,
    no_copy_engine,
    padded_row,
    product_of,
)
from .backward_operands import STAGES, WGMMA_PIXELS, Grad, Operand, Tile, grad_operand, no_map, pair_of
from .forward_loaders import no_operands, no_padded_rows

# As csrc instantiates them
IMAGE_TILES = {
    "half": Tile(128, 64, 32), "tf32": Tile(128, 64, 16), "fp32": Tile(128, 64, 16), "fp64": Tile(64, 64, 16),
}  # fmt: skip
WGMMA_IMAGES = 128  # patches of a tile of dX by wgmma (images_sm90.cuh)


class PixelClass(NamedTuple):
    first: Triple  # (t, y, x): first pixel in the cell
    size: Triple  # pixels
    windows: Triple  # that saw them
    columns: int  # pixels of a cell, all channels: (c, t, y, x)
    pitch: int  # of the packed weight's rows: columns, rounded up to whole copies
    all_windows: int
    packed: int  # its weight begins at this element: [windows, D, pitch]
    tiles: int  # of columns
    first_block: int


class ImagesPlan(NamedTuple):
    """dX. A cell of an axis holds the pixels q·S … q·S + S − 1 of the padded image; windows q − j with 0 ≤ j < ⌈P/S⌉
    saw its first P − (⌈P/S⌉ − 1)·S pixels, and all of those but the last saw the others. So the pixels of a cell are of
    one or two classes along each axis, and within a class every window saw every pixel: no product is with a zero that
    stands for a pixel unseen, which would carry what is not finite to it."""

    classes: tuple[PixelClass, ...]
    cells: Triple  # of one image
    M: int  # B·cells
    tiles_m: int
    blocks: int
    packed: int  # elements of the packed weight
    grad: Operand
    shared_bytes: int


class WgmmaImagesPlan(NamedTuple):
    """dX by wgmma (images_sm90.cuh): 128 patches × BN elements of a patch, 64 channels at a step."""

    BN: int
    tiles_k: int
    tiles: int
    blocks: int
    block: Triple  # images × grid lines × grid columns of a tile
    group: int  # patches of a line that one tensor map each brings
    stages: int
    shared_bytes: int
    weight_row: int  # elements of a row of the packed weight
    pair: int  # blocks of a cluster, whose tiles lie side by side in m, and which share the weight; 1: none do


def no_wgmma_images(p: PatchProblem, gpu: Gpu, strides: tuple[int, ...], images_at: int, grad: Grad) -> str:
    """Why wgmma can't make the images' gradient, in these strides; none: it can."""
    layout = layout_of(p, strides)
    group = group_of(p, layout)
    covered = tuple(g * n for g, n in zip(p.G, p.P, strict=True))
    reasons = (
        (gpu.arch != 90, "the GPU is no sm_90"),
        (product_of(p, False) != "half", "the product is not of 16 bits"),
        (no_operands(p, "half") != "", no_operands(p, "half")),
        (p.S != p.P, f"patches of {p.P} every {p.S} pixels"),
        *((True, text) for text in no_copy_engine(p, layout, images_at, group)),
        (covered != (p.F, p.H, p.W), f"patches cover {covered} of {(p.F, p.H, p.W)} pixels"),
        (no_padded_rows(p, layout) != "", no_padded_rows(p, layout)),
        *no_map(p, grad),
    )
    return next((text for wrong, text in reasons if wrong), "")


def images_plan(p: PatchProblem, tf32: bool, strides: tuple[int, ...], grad: Grad) -> ImagesPlan:
    product, layout = product_of(p, tf32), layout_of(p, strides)
    tile = IMAGE_TILES[product]
    sides = (p.F, p.H, layout.W)
    t, y, x = (-(-(n + pad) // S) for n, pad, S in zip(sides, layout.pad, layout.S, strict=True))
    M = p.B * t * y * x
    tiles_m, packed, blocks, classes = -(-M // tile.BM), 0, 0, []
    for which in range(8):
        c = _pixel_class(layout, which, packed, blocks, tile)
        if c.columns:
            packed += c.all_windows * p.D * c.pitch
            blocks += tiles_m * c.tiles
            classes.append(c)
    dY = grad_operand(p, grad)
    if dY.loader == "raw" or p.n_keep is not None:
        dY = dY._replace(loader="each")
    value = p.compute_dtype.itemsize
    operands = STAGES * (tile.BM * (tile.BK + 16 // value) + tile.BK * (tile.BN + 8)) * value
    shared_bytes = tile.BM * 32 + tile.BN * 32 + operands  # images.cuh's Row and Column
    return ImagesPlan(tuple(classes), (t, y, x), M, tiles_m, blocks, packed, dY, shared_bytes)


def wgmma_images_plan(p: PatchProblem, gpu: Gpu, strides: tuple[int, ...]) -> WgmmaImagesPlan:
    """Of the two tiles the one whose waves take less."""
    layout = layout_of(p, strides)
    group, row = group_of(p, layout), padded_row(layout)
    block, weight_row = blocks_of(p, WGMMA_IMAGES, group=group), p.K // layout.P[2] * row

    def plan(BN: int) -> WgmmaImagesPlan:
        stage_bytes, staging = (WGMMA_IMAGES + BN) * 128, 8 * 2 * 16 * WGMMA_PIXELS * p.image_dtype.itemsize
        stages = min(6, (gpu.shared_bytes - staging - 1024) // stage_bytes)  # beside them: barriers
        tiles_k, tiles_m = -(-weight_row // BN), blocks_in(p, block)
        pair = pair_of(tiles_k * tiles_m, gpu)
        tiles = tiles_k * -(-tiles_m // pair) * pair
        return WgmmaImagesPlan(
            BN, tiles_k, tiles, min(tiles, gpu.multiprocessors // pair * pair), block, group, stages,
            stages * (stage_bytes + 16) + staging, weight_row, pair,
        )  # fmt: skip

    # Half the tile takes more than half the time: its dY is read as often again.
    return min(plan(256), plan(128), key=lambda plan: -(-plan.tiles // plan.blocks) * (plan.BN + 60))


def _pixel_class(layout: PatchLayout, which: int, packed: int, first_block: int, tile: Tile) -> PixelClass:
    """Bit i of `which`: along axis i, the pixels that the last window did not see."""
    first, size, windows = [], [], []
    for i, (P, S) in enumerate(zip(layout.P, layout.S, strict=True)):
        seen, others = -(-P // S), which >> i & 1
        most = P - (seen - 1) * S
        first.append(most * others)
        size.append(S - most if others else most)
        windows.append(seen - others)
    columns = layout.C * prod(size)
    (t, y, x), (a, b, c), (i, j, k) = first, size, windows
    return PixelClass(
        (t, y, x), (a, b, c), (i, j, k), columns, -(-columns // 8) * 8, i * j * k, packed, -(-columns // tile.BN),
        first_block,
    )  # fmt: skip
