"""What csrc/backward will do: tiles, parts, how operands are read, and where scratch lies.

Arithmetic alone, as forward_plan.py is for the forward. M = B·rows patches.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

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
from .backward_operands import (
    STAGES,
    WGMMA_PIXELS,
    Grad,
    Operand,
    Tile,
    grad_operand,
    largest_chunk,
    no_map,
    operand_of,
    pair_of,
)
from .forward_loaders import no_copied, no_operands
from .images_plan import ImagesPlan, WgmmaImagesPlan, images_plan, no_wgmma_images, wgmma_images_plan

# As csrc instantiates them: dW by warps, large and for a weight of few tiles (weight_sm80.cuh)
WEIGHT_TILES = {
    "half": (Tile(128, 128, 32), Tile(64, 64, 32, 0.6)),
    "tf32": (Tile(128, 128, 16), Tile(64, 64, 16, 0.6)),
    "fp32": (Tile(128, 128, 16), Tile(64, 64, 16, 0.6)),
    "fp64": (Tile(64, 64, 16), Tile(32, 32, 16, 0.6)),
}
# dW by wgmma (weight_sm90.cuh): 256 or 128 channels by 8 rows × 16 pixels of a patch, 64 patches at a step. The rates
# are guesses, but for that of warps beside them: on an H200 a backward took 280 µs by warps with a quarter of the
# patches (keep 25 %), and 176 by wgmma with all (ViT-B/16, B = 256; results/nvidia-h200), 1.6 × 176 / 4 / 280.
WGMMA_ROWS = 8
WARPS_ON_HOPPER = 0.25  # of their rate in WEIGHT_TILES
WGMMA_TILES = (Tile(256, 128, 64, 1.6), Tile(128, 128, 64, 1.3))
# Whether two blocks share dY's stages, as those of the forward a weight's. `auto` takes the kernel where they don't by
# its time on an H200, so not before the other has one.
PAIRS = False
COPIED_TILES = {16: Tile(256, 128, 64, 1.2), 4: Tile(256, 128, 64, 0.8)}  # pixels by threads, so many bytes at a time

ROW_STEPS = 4  # csrc/backward/plan.h: steps whose patches are looked up at once
SUMS_THREADS, FINISH_THREADS = 256, 256  # of reduce.cuh

# Where no tensor map can describe dY (autocast's is in float32), the sums leave a copy of it in the product's type for
# wgmma, of as many images at a time as leave a call within so many bytes, the table's parts among them.
SCRATCH_BYTES, COPIES_TABLE_BYTES = 31 * 10**6, 24 * 10**5
COPY_COST = 2.5  # multiply-adds that writing an element of dY in 16 bits and reading it take; as split_k.PART_COST


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
    pair: int  # wgmma: blocks of a cluster, whose tiles lie side by side in k, and which share dY; 1: none do
    cost: float  # in multiply-adds of one multiprocessor


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


class Plan(NamedTuple):
    """csrc/backward/plan.h's BackwardPlan, field by field."""

    weight: WeightPlan | None
    sums: SumsPlan | None
    images: ImagesPlan | None
    wgmma_images: WgmmaImagesPlan | None  # instead
    indexed: bool  # whether kept patches are looked up by their place in the grid
    piece: int  # images whose parts of dW and sums are taken at a time, and added to those of the images before
    copy_row: int  # elements from row to row of the copies of dY that dW is made of; 0: of dY as it lies
    # In scratch, bytes from its beginning:
    weight_parts: int  # [splits, D, K] of sums
    table_parts: int  # [splits, table_rows, D] of sums
    bias_parts: int  # [splits·blocks, D] of sums
    copies: int  # [piece, rows, copy_row], of the product's type
    packed: int  # weight of dX, of the product's type
    heads: int  # [B, N], int32
    nexts: int  # [B, rows], int32
    scratch_bytes: int


def _pixels(p: PatchProblem, layout: PatchLayout, product: str, images_at: int) -> Operand:
    b, c, f, h, w = layout.strides
    side = layout.W if layout.pad[2] > 0 else 0  # a piece must not cross the image's edge
    across = layout.S[2] if p.G[2] > 1 else 0
    steps = (layout.P[2], across, layout.pad[2], side, b if p.B > 1 else 0, c, f, h)
    chunk = largest_chunk(p.image_dtype, images_at, steps) if w == 1 else 0
    return operand_of(chunk, _as_they_lie(p))


def _as_they_lie(p: PatchProblem) -> bool:
    """Whether pixels are the product's operands."""
    return p.image_dtype == p.compute_dtype and not scaling(p, product_of(p, False))[0]


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
        *no_map(p, grad),
    )
    return next((text for wrong, text in reasons if wrong), "")


def weight_plan(p: PatchProblem, gpu: Gpu, tf32: bool, images_at: int, grad: Grad) -> WeightPlan:
    """The tile and the number of parts that cost least."""
    product, layout = product_of(p, tf32), layout_of(p)
    group, block, copied = group_of(p, layout), (0, 0, 0), 0
    by_warps = WARPS_ON_HOPPER if gpu.arch == 90 and product == "half" else 1.0
    tiles_of_warps = [tile._replace(rate=tile.rate * by_warps) for tile in WEIGHT_TILES[product]]
    offers = [(tile, -(-p.K // tile.BN), -(-p.B * p.rows // tile.BK), 4) for tile in tiles_of_warps]
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
    (tile, tiles_k, *_), (cost, parts, steps) = best, split(best)
    chunk, tiles = steps * tile.BK, -(-p.D // tile.BM) * tiles_k
    if tile.BK == WGMMA_TILES[0].BK:
        stages, stage_bytes = _wgmma_stages(p, gpu, tile)
        pixels, dY = Operand("straight", copied), Operand("straight", 0)
        return WeightPlan(
            True, *tile[:3], parts, chunk, tiles_k, tiles, pixels, dY, stages * (stage_bytes + 16), block, group,
            stages, min(parts * tiles, gpu.multiprocessors), 1, cost,
        )  # fmt: skip
    pixels, dY = _pixels(p, layout, product, images_at), grad_operand(p, grad)
    if _shared_bytes(p, tile, pixels, dY) > gpu.shared_bytes and dY.loader == "raw":
        dY = dY._replace(loader="each")
    if _shared_bytes(p, tile, pixels, dY) > gpu.shared_bytes and pixels.loader == "raw":
        pixels = pixels._replace(loader="each")
    shared_bytes = _shared_bytes(p, tile, pixels, dY)
    return WeightPlan(
        False, *tile[:3], parts, chunk, tiles_k, tiles, pixels, dY, shared_bytes, block, 0, 0, parts * tiles, 1, cost
    )


def in_pairs(weight: WeightPlan, gpu: Gpu) -> WeightPlan:
    """The same by pairs of blocks, where the copy engine brings all and each tile has a neighbour."""
    if not weight.wgmma or weight.pixels.chunk or weight.tiles_k % 2:
        return weight
    work = weight.splits * weight.tiles
    pair = pair_of(work, gpu)
    return weight._replace(pair=pair, blocks=min(work, gpu.multiprocessors // pair * pair))


class Copied(NamedTuple):
    weight: WeightPlan  # of a piece
    sums: SumsPlan
    piece: int
    row: int


def copied_plan(
    p: PatchProblem, gpu: Gpu, tf32: bool, images_at: int, bias: bool, pos: bool, prefix: bool
) -> Copied | None:
    """dW by wgmma from copies of dY, and the sums that leave them, of as many images at a time as there is room for;
    None where wgmma can't, or where there is none for two: one of several may lie where no tensor map begins."""
    row = -(-p.D // 8) * 8
    of_copies, grad = replace(p, T=0, out_dtype=p.compute_dtype), Grad(0, (p.rows * row, row, 1))
    if p.B * p.rows == 0 or no_wgmma(of_copies, gpu, images_at, grad):
        return None
    image_bytes = p.rows * row * p.compute_dtype.itemsize
    most = min(p.B, SCRATCH_BYTES // image_bytes)
    while most >= min(p.B, 2):
        piece = -(-p.B // -(-p.B // most))  # all of them alike
        weight = weight_plan(replace(of_copies, B=piece), gpu, tf32, images_at, grad)
        sums = sums_plan(replace(p, B=piece), gpu, bias, pos, prefix, copies=True)
        if not weight.wgmma:
            return None
        if _fits(_part_sizes(p, weight, sums, bias), piece * image_bytes):
            return Copied(weight, sums, piece, row)
        most = piece * 7 // 8
    return None


def _fits(parts: dict[str, int], copies: int) -> bool:
    return sum(parts.values()) + copies <= SCRATCH_BYTES


def _part_sizes(p: PatchProblem, weight: WeightPlan | None, sums: SumsPlan | None, bias: bool) -> dict[str, int]:
    """Bytes of what Plan says of the same names."""
    row = p.D * p.sum_dtype.itemsize
    return {
        "weight_parts": weight.splits * p.K * row if weight else 0,
        "table_parts": sums.splits * sums.table_rows * row if sums else 0,
        "bias_parts": sums.splits * sums.blocks * row if sums and bias else 0,
    }


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


def sums_plan(p: PatchProblem, gpu: Gpu, bias: bool, pos: bool, prefix: bool, copies: bool = False) -> SumsPlan:
    first = 0 if prefix or (pos and p.pos_rows > p.N) else p.T
    last = p.T + p.N if bias or pos or copies else p.T
    stored = p.T + p.N if pos else p.T
    rows, octets = stored - first, -(-p.D // 8)
    lanes = next(n for n in (1, 2, 4, 8, 16, 32) if n == 32 or n >= octets)
    tiles_d = -(-octets // lanes)
    blocks = -(-(last - first) // (SUMS_THREADS // lanes))
    part_bytes = max(1, rows * p.D * p.sum_dtype.itemsize)
    most = max(1, min(-(-p.B // 4), (COPIES_TABLE_BYTES if copies else TABLE_BYTES) // part_bytes))
    enough = -(-4 * gpu.multiprocessors // max(1, blocks * tiles_d))
    chunk = -(-p.B // min(most, enough))
    return SumsPlan(first, last, stored, rows, -(-p.B // chunk), chunk, lanes, blocks, tiles_d)


def make_plan(
    p: PatchProblem, gpu: Gpu, tf32: bool, images_at: int, grad: Grad, *,
    weight: bool, bias: bool, pos: bool, prefix: bool, images: tuple[int, ...] | None, d_images_at: int = 0,
    pairs: bool = False,
) -> Plan:  # fmt: skip
    """For the gradients that are asked for; `images`: the strides of theirs, which is at `d_images_at`, modulo 16."""
    scratch_bytes = 0

    def take(size: int) -> int:
        nonlocal scratch_bytes
        at = scratch_bytes
        scratch_bytes += -(-size // 256) * 256
        return at

    of_weight = weight_plan(p, gpu, tf32, images_at, grad) if weight else None
    sums = sums_plan(p, gpu, bias, pos, prefix) if bias or pos or prefix else None
    piece, copy_row = p.B, 0
    if of_weight and not of_weight.wgmma and (copied := copied_plan(p, gpu, tf32, images_at, bias, pos, prefix)):
        cost = -(-p.B // copied.piece) * copied.weight.cost + COPY_COST * p.B * p.rows * p.D
        if cost < of_weight.cost:
            of_weight, sums, piece, copy_row = copied
    if of_weight and pairs:
        of_weight = in_pairs(of_weight, gpu)
    of_images = wgmma_images = None
    packed = 0
    if images and no_wgmma_images(p, gpu, images, d_images_at, grad):
        of_images = images_plan(p, tf32, images, grad)
        packed = of_images.packed
    elif images:
        wgmma_images = wgmma_images_plan(p, gpu, images)
        packed = wgmma_images.weight_row * p.D
    indexed = p.n_keep is not None and (bias or pos or copy_row > 0 or of_images is not None)
    return Plan(
        of_weight, sums, of_images, wgmma_images, indexed, piece, copy_row,
        **{name: take(size) for name, size in _part_sizes(p, of_weight, sums, bias).items()},
        copies=take(piece * p.rows * copy_row * p.compute_dtype.itemsize),
        packed=take(packed * p.compute_dtype.itemsize),
        heads=take(p.B * p.N * 4) if indexed else 0,
        nexts=take(p.B * p.rows * 4) if indexed else 0,
        scratch_bytes=scratch_bytes,
    )  # fmt: skip
