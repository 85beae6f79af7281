"""What csrc/backward will do: tiles, parts, how operands are read, and where scratch lies.

Arithmetic alone, as forward_plan.py is for the forward. M = B·rows patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch

from ...gpu import Gpu
from ...problem import PatchProblem, Triple
from .. import split_k
from ..patch_layout import (
    PatchLayout,
    blocks_in,
    blocks_of,
    group_of,
    layout_of,
    no_copy_engine,
    product_of,
    scaling,
)  # fmt: skip
from ..split_k import TABLE_BYTES
from .forward_plan import no_copied, no_operands, no_padded_rows, padded_row


class Tile(NamedTuple):
    """A block's part of a product: BM×BN sums, BK of the summed index at a step."""

    BM: int
    BN: int
    BK: int
    rate: float = 1.0  # of multiply-adds, as in vitkernels/backends/triton/configs.py


# As csrc instantiates them: dW by warps, large and for a weight of few tiles (weight_sm80.cuh); dX (images.cuh)
WEIGHT_TILES = {
    "half": (Tile(128, 128, 32), Tile(64, 64, 32, 0.6)),
    "tf32": (Tile(128, 128, 16), Tile(64, 64, 16, 0.6)),
    "fp32": (Tile(128, 128, 16), Tile(64, 64, 16, 0.6)),
    "fp64": (Tile(64, 64, 16), Tile(32, 32, 16, 0.6)),
}
IMAGE_TILES = {
    "half": Tile(128, 64, 32), "tf32": Tile(128, 64, 16), "fp32": Tile(128, 64, 16), "fp64": Tile(64, 64, 16),
}  # fmt: skip
# dW by wgmma (weight_sm90.cuh): 256 or 128 channels by 8 rows × 16 pixels of a patch, 64 patches at a step. The rates
# are guesses.
WGMMA_ROWS, WGMMA_PIXELS = 8, 16
WGMMA_TILES = (Tile(256, 128, 64, 1.6), Tile(128, 128, 64, 1.3))
WGMMA_IMAGES = 128  # patches of a tile of dX by wgmma (images_sm90.cuh)
COPIED_TILES = {16: Tile(256, 128, 64, 1.2), 4: Tile(256, 128, 64, 0.8)}  # pixels by threads, so many bytes at a time

STAGES, ROW_STEPS = 3, 4  # csrc/backward/plan.h: steps under way, steps whose patches are looked up at once
SUMS_THREADS, FINISH_THREADS = 256, 256  # of reduce.cuh


# How an operand comes to shared memory, eight elements to a thread at a time (csrc/backward/plan.h): copied
# asynchronously, of the product's type already; so as it is, to be converted by the thread that copied it; one by one
OPERANDS = ("straight", "raw", "each")


class Operand(NamedTuple):
    loader: str
    chunk: int  # bytes copied at a time


class WeightPlan(NamedTuple):
    wgmma: bool
    BM: int
    BN: int
    BK: int
    splits: int  # of the M patches
    chunk: int  # patches of one; with wgmma those of its blocks, beyond the grid's edge too
    tiles_k: int
    tiles: int
    pixels: Operand  # wgmma: of no bytes where the copy engine brings them
    grad: Operand
    shared_bytes: int
    block: Triple  # wgmma: images × grid lines × grid columns of a step
    group: int  # wgmma: patches of a line that one tensor map each brings
    stages: int  # wgmma
    blocks: int  # of the launch


class SumsPlan(NamedTuple):
    """Sums of dY over images: of the token rows from `first` to `last`, to the table those before `stored`, and to the
    bias those of patches. Under a keep list a patch's row is its place in the grid, not in the list."""

    first: int
    last: int
    stored: int
    table_rows: int  # of one part
    splits: int  # of the images
    chunk: int  # images of one
    lanes: int  # threads side by side along a row, eight channels each
    blocks: int  # of rows
    tiles_d: int  # of lanes·8 channels


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


class Plan(NamedTuple):
    """csrc/backward/plan.h's BackwardPlan, field by field."""

    weight: WeightPlan | None
    sums: SumsPlan | None
    images: ImagesPlan | None
    wgmma_images: WgmmaImagesPlan | None  # instead
    indexed: bool  # whether kept patches are looked up by their place in the grid
    # In scratch, bytes from its beginning:
    weight_parts: int  # [splits, D, K] of sums
    table_parts: int  # [splits, table_rows, D] of sums
    bias_parts: int  # [splits·blocks, D] of sums
    packed: int  # weight of dX, of the product's type
    heads: int  # [B, N], int32
    nexts: int  # [B, rows], int32
    scratch_bytes: int


class Grad(NamedTuple):
    """dY where it lies."""

    at: int  # its address, modulo 16
    strides: Triple


def _largest_chunk(dtype: torch.dtype, at: int, steps: Sequence[int]) -> int:
    """The largest piece, in bytes, of which eight elements, all these numbers of elements and the address are
    multiples; 0: none that can be copied asynchronously."""
    size = dtype.itemsize
    for chunk in (16, 8, 4):
        if chunk >= size and not any(n % chunk for n in (8 * size, at, *(s * size for s in steps))):
            return chunk
    return 0


def _operand(chunk: int, as_it_is: bool) -> Operand:
    return Operand("each" if chunk == 0 else "straight" if as_it_is else "raw", chunk)


def _pixels(p: PatchProblem, layout: PatchLayout, product: str, images_at: int) -> Operand:
    b, c, f, h, w = layout.strides
    side = layout.W if layout.pad[2] > 0 else 0  # a piece must not cross the image's edge
    across = layout.S[2] if p.G[2] > 1 else 0
    steps = (layout.P[2], across, layout.pad[2], side, b if p.B > 1 else 0, c, f, h)
    chunk = _largest_chunk(p.image_dtype, images_at, steps) if w == 1 else 0
    return _operand(chunk, _as_they_lie(p))


def _as_they_lie(p: PatchProblem) -> bool:
    """Whether pixels are the product's operands."""
    return p.image_dtype == p.compute_dtype and not scaling(p, product_of(p, False))[0]


def _grad(p: PatchProblem, grad: Grad) -> Operand:
    chunk = _largest_chunk(p.out_dtype, grad.at, grad.strides[:2]) if grad.strides[2] == 1 else 0
    return _operand(chunk, p.out_dtype == p.compute_dtype)


def not_by_engine(p: PatchProblem, images_at: int) -> str:
    """Why the copy engine can't bring the image's patches for wgmma, and threads have to."""
    layout = layout_of(p)
    group = group_of(p, layout)
    reasons = no_copy_engine(p, layout, images_at, group)
    # wgmma reads 16 patches of a step's 64, of one map, where pixels are its operands as they lie
    if group > 4 and _as_they_lie(p):
        reasons.append(f"one of {group} patches begins on 16 bytes, of 4 at least it must")
    return next(iter(reasons), "")


def no_wgmma(p: PatchProblem, gpu: Gpu, images_at: int, grad: Grad) -> str:
    """Why nobody can bring dY and the image's patches for wgmma; none: somebody can."""
    if gpu.arch != 90:
        return "the GPU is no sm_90"
    layout = layout_of(p)
    engine, (copied, _) = not_by_engine(p, images_at), no_copied(p, layout, "half", images_at)
    reasons = (
        (product_of(p, False) != "half", "the product is not of 16 bits"),
        (no_operands(p, "half") != "", no_operands(p, "half")),
        (engine != "" and copied != "", f"{engine}; {copied}"),
        (layout.P[2] % 2 != 0, f"patch rows of {layout.P[2]} elements, an odd number"),
        (p.P[1] < WGMMA_ROWS, f"patches of {p.P[1]} rows, of {WGMMA_ROWS} at least they must be"),
        *_no_map(p, grad),
    )
    return next((text for wrong, text in reasons if wrong), "")


def _no_map(p: PatchProblem, grad: Grad) -> tuple[tuple[bool, str], ...]:
    """Whether no tensor map can describe dY, and why."""
    b, row, channel = grad.strides
    return (
        (p.out_dtype != p.compute_dtype, "dY is of another type than the product"),
        (p.D > 1 and channel != 1, f"dY's channels are {channel} apart"),
        ((grad.at + p.T * row * 2) % 16 != 0, "dY is not on 16 bytes"),
        (p.B > 1 and (b <= 0 or b % 8 != 0), "dY's images are not 16 bytes apart"),
        (row <= 0 or row % 8 != 0, "dY's rows are not 16 bytes apart"),
    )


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
        *_no_map(p, grad),
    )
    return next((text for wrong, text in reasons if wrong), "")


def weight_plan(p: PatchProblem, gpu: Gpu, tf32: bool, images_at: int, grad: Grad) -> WeightPlan:
    """The tile and the number of parts that cost least."""
    product, layout = product_of(p, tf32), layout_of(p)
    group, block, copied = group_of(p, layout), (0, 0, 0), 0
    offers = [(tile, -(-p.K // tile.BN), -(-p.B * p.rows // tile.BK), 4) for tile in WEIGHT_TILES[product]]
    if not no_wgmma(p, gpu, images_at, grad):
        if not_by_engine(p, images_at):
            group, copied = 1, no_copied(p, layout, "half", images_at)[1]
        block = blocks_of(p, WGMMA_TILES[0].BK, group=group)
        tiles_k = layout.C * p.P[0] * -(-layout.P[2] // WGMMA_PIXELS) * -(-p.P[1] // WGMMA_ROWS)
        by_wgmma = (COPIED_TILES[copied],) if copied else WGMMA_TILES
        fitting = [tile for tile in by_wgmma if _wgmma_stages(p, gpu, tile)[0] >= 2]
        offers += [(tile, tiles_k, blocks_in(p, block), 2) for tile in fitting]

    def split(offer: tuple[Tile, int, int, int]) -> split_k.Split:
        tile, tiles_k, steps, begin = offer
        multiply_adds = tile.BM * tile.BN * tile.BK / tile.rate
        return split_k.cheapest(p, gpu, -(-p.D // tile.BM) * tiles_k, steps, multiply_adds, begin)

    best = min(offers, key=lambda offer: split(offer).cost)
    (tile, tiles_k, *_), (_, parts, steps) = best, split(best)
    chunk, tiles = steps * tile.BK, -(-p.D // tile.BM) * tiles_k
    if tile.BK == WGMMA_TILES[0].BK:
        stages, stage_bytes = _wgmma_stages(p, gpu, tile)
        pixels, dY = Operand("straight", copied), Operand("straight", 0)
        return WeightPlan(
            True, *tile[:3], parts, chunk, tiles_k, tiles, pixels, dY, stages * (stage_bytes + 16), block, group,
            stages, min(parts * tiles, gpu.multiprocessors),
        )  # fmt: skip
    pixels, dY = _pixels(p, layout, product, images_at), _grad(p, grad)
    if _shared_bytes(p, tile, pixels, dY) > gpu.shared_bytes and dY.loader == "raw":
        dY = dY._replace(loader="each")
    if _shared_bytes(p, tile, pixels, dY) > gpu.shared_bytes and pixels.loader == "raw":
        pixels = pixels._replace(loader="each")
    shared_bytes = _shared_bytes(p, tile, pixels, dY)
    return WeightPlan(
        False, *tile[:3], parts, chunk, tiles_k, tiles, pixels, dY, shared_bytes, block, 0, 0, parts * tiles
    )


def _wgmma_stages(p: PatchProblem, gpu: Gpu, tile: Tile) -> tuple[int, int]:
    """How many fit, and the bytes of one."""
    stage_bytes = tile.BK * (tile.BN * p.image_dtype.itemsize + tile.BM * 2)
    return min(6, (gpu.shared_bytes - 1024) // stage_bytes), stage_bytes  # beside them: barriers


def _shared_bytes(p: PatchProblem, tile: Tile, pixels: Operand, grad: Operand) -> int:
    """What the columns (elements of a patch: where they lie, and two values to normalise by) and the rows (patches) of
    a tile are; operands; and those still to be converted."""
    value, total = p.compute_dtype.itemsize, p.sum_dtype.itemsize
    tables = tile.BN * (24 + 2 * total) + 2 * ROW_STEPS * tile.BK * 32
    operands = STAGES * tile.BK * (tile.BM + 8 + tile.BN + 8) * value
    raw = tile.BN * p.image_dtype.itemsize * (pixels.loader == "raw")
    raw += tile.BM * p.out_dtype.itemsize * (grad.loader == "raw")
    return tables + operands + STAGES * tile.BK * raw


def sums_plan(p: PatchProblem, gpu: Gpu, bias: bool, pos: bool, prefix: bool) -> SumsPlan:
    first = 0 if prefix or (pos and p.pos_rows > p.N) else p.T
    last = p.T + p.N if bias or pos else p.T
    stored = p.T + p.N if pos else p.T
    rows, octets = stored - first, -(-p.D // 8)
    lanes = next(n for n in (1, 2, 4, 8, 16, 32) if n == 32 or n >= octets)
    tiles_d = -(-octets // lanes)
    blocks = -(-(last - first) // (SUMS_THREADS // lanes))
    most = max(1, min(-(-p.B // 4), TABLE_BYTES // max(1, rows * p.D * p.sum_dtype.itemsize)))
    enough = -(-4 * gpu.multiprocessors // max(1, blocks * tiles_d))
    chunk = -(-p.B // min(most, enough))
    return SumsPlan(first, last, stored, rows, -(-p.B // chunk), chunk, lanes, blocks, tiles_d)


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
    dY = _grad(p, grad)
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
        tiles_k = -(-weight_row // BN)
        tiles = blocks_in(p, block) * tiles_k
        return WgmmaImagesPlan(
            BN, tiles_k, tiles, min(tiles, gpu.multiprocessors), block, group, stages,
            stages * (stage_bytes + 16) + staging, weight_row,
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


def make_plan(
    p: PatchProblem, gpu: Gpu, tf32: bool, images_at: int, grad: Grad, *,
    weight: bool, bias: bool, pos: bool, prefix: bool, images: tuple[int, ...] | None, d_images_at: int = 0,
) -> Plan:  # fmt: skip
    """For the gradients that are asked for; `images`: the strides of theirs, which is at `d_images_at`, modulo 16."""
    total, scratch_bytes = p.sum_dtype.itemsize, 0

    def take(size: int) -> int:
        nonlocal scratch_bytes
        at = scratch_bytes
        scratch_bytes += -(-size // 256) * 256
        return at

    of_weight = weight_plan(p, gpu, tf32, images_at, grad) if weight else None
    sums = sums_plan(p, gpu, bias, pos, prefix) if bias or pos or prefix else None
    of_images = wgmma_images = None
    packed = 0
    if images and no_wgmma_images(p, gpu, images, d_images_at, grad):
        of_images = images_plan(p, tf32, images, grad)
        packed = of_images.packed
    elif images:
        wgmma_images = wgmma_images_plan(p, gpu, images)
        packed = wgmma_images.weight_row * p.D
    indexed = p.n_keep is not None and (bias or pos or of_images is not None)
    return Plan(
        of_weight, sums, of_images, wgmma_images, indexed,
        weight_parts=take(of_weight.splits * p.D * p.K * total) if of_weight else 0,
        table_parts=take(sums.splits * sums.table_rows * p.D * total) if sums else 0,
        bias_parts=take(sums.splits * sums.blocks * p.D * total) if sums and bias else 0,
        packed=take(packed * p.compute_dtype.itemsize),
        heads=take(p.B * p.N * 4) if indexed else 0,
        nexts=take(p.B * p.rows * 4) if indexed else 0,
        scratch_bytes=scratch_bytes,
    )  # fmt: skip
