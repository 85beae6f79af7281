"""How a problem becomes a launch of csrc/forward: by which loader (forward_loaders.py) and tile, of those that can.

Arithmetic alone, on a problem, a GPU's figures and where tensors begin: the extension launches what is planned here,
the cost model reads it, and neither a GPU nor the extension is needed to ask.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch

from ...gpu import Gpu
from ...problem import PatchProblem, Triple
from ..patch_layout import (
    PatchLayout,
    blocks_in,
    blocks_of,
    group_of,
    layout_of,
    padded_row,
    product_of,
    scaling,
    weight_in_order,
)
from .forward_loaders import (
    BY_BLOCKS,
    LOADERS,
    STORING,
    no_copied,
    no_copy,
    no_own_positions,
    no_padded_rows,
    no_patches,
    no_rows,
    no_stores,
    own_positions,
    product_step,
    shared_positions,
)

PACK_ROWS = 4096  # patches from which narrow copies of the weight cost more than packing it: a guess
CORNER_BYTES = 24  # csrc/common/patch_layout.h's Corner


class Tile(NamedTuple):
    BM: int  # patches
    BN: int  # channels
    threads: int
    # Of the largest tile's: on an H200 (_rate) wgmma's of 128 channels had 0.62 to 0.86 of it. Those of 192, for D of
    # 192 and 384, and of 64, for few patches, came later: guesses, by the bytes that a multiply-add needs.
    rate: float


# Of the rate at which tensor cores multiply 16 bits, as H100's data sheet has it; float32 takes three products of TF32,
# or multiply-adds: 3,833 µs on an H200 (results.json, forward and backward less the backward) where 16 bits' took 93.
PRODUCTS = {("half", True): 1.0, ("half", False): 1.0, ("tf32", True): 0.5, ("tf32", False): 0.5, ("fp32", True): 0.16,
            ("fp32", False): 0.12}  # fmt: skip

# As csrc instantiates them, large to small: mma.sync, multiply-adds (sm80.cuh), wgmma (sm90.cuh)
MMA_TILES = (Tile(128, 128, 256, 1.0), Tile(32, 64, 128, 0.55))
PLAIN_TILES = (Tile(64, 64, 128, 1.0),)
WIDEST, WIDE, NARROW, NARROWEST = (
    Tile(128, 256, 384, 1.0), Tile(128, 192, 384, 0.9), Tile(128, 128, 384, 0.7), Tile(128, 64, 384, 0.45),
)  # fmt: skip

# Blocks that share the weight's stages. The product of ViT-B/16, B = 256, took an H200 93 µs in tiles of 256 channels,
# 150 in those of 128, which reads the L2 at 7.4 and 6.2 TB/s: pairs read two thirds to three quarters of that. A guess.
SHARED = 1.1
# Parts of k -> what it costs to exchange their sums, as so many of k: two meetings of the cluster, and reading each
# other's shared memory at some 14 bytes a cycle. Guesses.
EXCHANGES = {1: 0, 2: 400, 4: 500}
# In a model of a multiprocessor (two warpgroups that share its tensor cores, 4 stages, tokens stored in 800 to 2,000
# cycles) a tile takes 0.93 to 0.95 of the time with two steps between them, 0.95 to 0.98 with one or three. A guess.
LAG = 2
STORED = 32  # channels of one store of tokens in 16 bits

TABLE = 16 * 256  # positions × channels of a tile, at most, in the table that STORING loaders add from


class Plan(NamedTuple):
    """csrc/forward/plan.h's ForwardPlan, field by field."""

    loader: str
    wgmma: bool  # by a producer and consumers; otherwise mma.sync or plain multiply-adds
    BM: int
    BN: int
    threads: int
    step_k: int
    steps: int
    lag: int  # STORING: steps that one warpgroup stays behind the other: one multiplies while the other stores
    stages: int
    chunk: int  # bytes copied at a time
    stage_rows: int  # rows, by blocks: rows of the image in a stage
    slot_bytes: int  # rows: bytes of one row of all patches
    segment_bytes: int  # rows: bytes of one row of the patches in a line of the grid
    segments: int
    block: Triple  # by blocks: images × grid lines × grid columns of a tile
    group: int  # engine: patches of a line that one tensor map each brings
    cluster: int  # blocks of one: two share the stages of the weight, of which each brings half for both
    splits: int  # or they divide the steps of a tile, and each adds up a part of its channels
    a_bytes: int
    b_pitch: int
    stage_bytes: int
    table_bytes: int
    shared_bytes: int
    pack: bool  # the weight is first brought into the patches' order, the operands' type and `weight_row`
    weight_row: int
    weight_chunk: int
    tf32_terms: int  # of an element of the weight where wgmma multiplies TF32; 2: three products, which are float32's
    tiles_n: int
    tiles: int
    blocks: int
    scratch_bytes: int
    cost: float
    how: str


def _weight(
    p: PatchProblem, layout: PatchLayout, weight_at: int, wgmma: bool, step_k: int, K: int, terms: int
) -> tuple[bool, int, int]:
    """Whether it is packed first, the elements of its rows, and the bytes of one copy. It is read where it lies if its
    rows are in the patches' order, of the operands' type, and can be copied 4 bytes at a time, and if patches are not
    padded, to K elements. What wgmma multiplies as TF32 is rounded to it."""
    size = p.compute_dtype.itemsize
    row = p.weight_strides[0] if p.D > 1 else p.K
    chunk = gcd(row * size, p.K * size, weight_at, 16)
    narrow = chunk < 4 or (chunk < 16 and (wgmma or p.B * p.rows >= PACK_ROWS))
    block = (128 if step_k * size % 128 == 0 else 32) // size if wgmma else 1  # of one box of the copy engine
    in_order = weight_in_order(p, layout.channels_last) and row >= p.K and p.K == K and not terms
    if in_order and not narrow and K % block == 0 and row % block == 0:
        return False, row, chunk
    return True, max(terms, 1) * _round_up(K, max(block, 16 // size)), 16


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


class Stage(NamedTuple):
    """What a loader keeps of the patches."""

    step_k: int
    a_bytes: int
    table_bytes: int = 0
    rows: int = 0
    slot_bytes: int = 0
    segment_bytes: int = 0
    segments: int = 0


def _stage(p: PatchProblem, layout: PatchLayout, product: str, loader: str, tile: Tile, chunk: int) -> Stage:
    pixel, value, P_w = p.image_dtype.itemsize, p.compute_dtype.itemsize, layout.P[2]
    if loader == "rows":
        least = 16 // gcd(P_w, 16)  # rows that make a multiple of the tensor cores' step
        if least * P_w <= 128:
            rows = least * max(1, 64 // (least * P_w))
            step_k = rows * P_w
        else:  # a row that two steps need is copied twice
            step_k = 64
            rows = (step_k + P_w - 2) // P_w + 1
        line = min(p.G[2], tile.BM)
        segment = _round_up(((line - 1) * layout.S[2] + P_w) * pixel + 2 * chunk, 16)
        segments = -(-(tile.BM - 1) // p.G[2]) + 1
        slot = segments * segment
        return Stage(step_k, rows * slot, _round_up(segments * 16, 128), rows, slot, segment, segments)
    if loader in BY_BLOCKS:
        P_w = padded_row(layout)
        rows = max(1, 128 // value // P_w)
        if loader == "engine" and group_of(p, layout) == 1:  # one copy brings them all, of one channel
            rows = next(n for n in range(rows, 0, -1) if p.P[1] % n == 0)
        _, lines, columns = _block(p, loader, tile)
        table_rows = lines * columns if shared_positions(p) else 1  # the bias
        table = _round_up(table_rows * (tile.BN + 8) * 4, 128) if loader in STORING else 0
        return Stage(rows * P_w, rows * P_w * tile.BM * pixel, table, rows=rows)
    step_k = 16 if not product_step(product) else 64 if value == 2 and tile.BM < 128 else 32
    row = step_k * (value if loader == "gather" else pixel) + 16
    return Stage(step_k, tile.BM * row, _round_up(tile.BM * CORNER_BYTES, 128))


def _block(p: PatchProblem, loader: str, tile: Tile) -> Triple:
    in_table = loader in STORING and shared_positions(p)
    return blocks_of(p, tile.BM, TABLE // tile.BN if in_table else tile.BM, _group(p, loader))


def _group(p: PatchProblem, loader: str) -> int:
    return group_of(p, layout_of(p)) if loader == "engine" else 1


def _plan(
    p: PatchProblem, gpu: Gpu, layout: PatchLayout, product: str, loader: str, wgmma: bool, tile: Tile, chunk: int,
    weight_at: int, cluster: int, splits: int,
) -> Plan | None:  # fmt: skip
    """A loader with a tile; None where fewer than two stages fit, or clusters are of no use."""
    value, total = p.compute_dtype.itemsize, p.sum_dtype.itemsize
    s = _stage(p, layout, product, loader, tile, chunk)
    block, group, K = (0, 0, 0), 0, p.K
    if loader in BY_BLOCKS:
        block, group, K = _block(p, loader, tile), _group(p, loader), p.K // layout.P[2] * padded_row(layout)
    terms = {"tf32": 1, "fp32": 2}.get(product, 0) if wgmma else 0
    pack, row, weight_chunk = _weight(p, layout, weight_at, wgmma, s.step_k, K, terms)
    steps, align = -(-K // s.step_k), 1024 if wgmma else 128
    b_pitch = s.step_k if wgmma else s.step_k + 16 // value
    a_bytes = _round_up(s.a_bytes, align)
    stage = a_bytes + _round_up(max(terms, 1) * tile.BN * b_pitch * value, align)
    # The epilogue's staging: sums of 16 rows of each warp on their way to tokens. With wgmma it has a place of its own,
    # as the next tile is copied meanwhile, and less padding, which leaves room for 4 stages. What the copy engine
    # stores are tokens, twice 64 bytes of a row.
    staging = 8 * 16 * (64 + 4) * total if wgmma else tile.threads // 32 * 16 * (32 + 8) * total
    if loader in STORING:
        staging = 8 * 2 * 16 * 64
    if wgmma:  # and barriers; sm90.cuh's constants
        staging += 1024 + (s.step_k * 8 if layout.channels_last and scaling(p, product)[0] else 0)
    beside = staging + s.table_bytes if wgmma else s.table_bytes
    room, half = gpu.shared_bytes - beside, (gpu.shared_bytes + 1024) // 2 - 1024 - beside
    if not wgmma and half // stage >= 3:
        room = half  # for two blocks on a multiprocessor; 1024 bytes of each are CUDA's
    stages = min(6 if wgmma else 4, room // stage, max(2, -(-steps // splits) + 1))
    shared_bytes = beside + max(stages * stage, 0 if wgmma else staging)
    if stages < 2 or shared_bytes > gpu.shared_bytes or cluster > gpu.multiprocessors:
        return None
    if splits > 1 and (2 * splits > steps or stages * stage < tile.BM * tile.BN * 4 or tile.BN // splits < STORED):
        return None
    tiles_n = -(-p.D // tile.BN)
    tiles_m = blocks_in(p, block) if loader in BY_BLOCKS else -(-p.B * p.rows // tile.BM)
    tiles = tiles_n * _round_up(tiles_m, cluster // splits)
    unit = "wgmma" if wgmma else "mma.sync" if product_step(product) else "multiply-adds"
    unit += " (three products of TF32)" if terms == 2 else ""
    at_a_time = "" if loader in ("gather", "engine") else f" ({chunk} bytes at a time)"
    pairs = "pairs of " * (cluster > splits)
    how = f"{LOADERS[loader]}{at_a_time}, {unit} in {pairs}tiles of {tile.BM}×{tile.BN}"
    how += f", each by {splits} blocks" * (splits > 1)
    how += ", the weight packed first" * pack
    resident = 1 if wgmma else min(512 // tile.threads, (gpu.shared_bytes + 1024) // (shared_bytes + 1024))
    at_once = gpu.multiprocessors // cluster * cluster * resident
    if splits > 1 and tiles * splits > at_once * 8 // 9:  # clusters of 4 leave up to 2 in 18 multiprocessors idle
        return None
    blocks = min(tiles * splits, at_once) if wgmma else tiles
    lag = LAG if loader in STORING and tiles >= 2 * blocks and min(stages, steps) >= 2 * LAG else 0
    plan = Plan(
        loader, wgmma, tile.BM, tile.BN, tile.threads, s.step_k, steps, lag, stages, chunk, s.rows, s.slot_bytes,
        s.segment_bytes, s.segments, block, group, cluster, splits, a_bytes, b_pitch, stage, s.table_bytes,
        shared_bytes, pack, row, weight_chunk, terms, tiles_n, tiles, blocks, p.D * row * value * pack, 0.0, how,
    )  # fmt: skip
    rate, waits = tile.rate * _rate(p, product, loader, wgmma, chunk), loader in STORING and own_positions(p)
    return plan._replace(cost=_cost(plan, at_once, resident, rate, waits))


def _cost(f: Plan, at_once: int, resident: int, rate: float, waits: bool) -> float:
    """In the time that one multiprocessor takes for a multiply-add of wgmma's largest tile. A tile begins and ends with
    the latency of some 128 of k (250 were measured where threads store what wgmma multiplied; 192, where its positions
    are loaded at the end, is a guess), two stages hide less of the memory's, and a tile takes as long alone as with all
    that its multiprocessor has room for. Pairs spare the L2, which is what is short where all multiprocessors read."""
    if f.stages == 2:
        rate *= 0.8
    if f.cluster > f.splits:
        rate *= SHARED if f.tiles >= at_once else 0.98
    ends = EXCHANGES[f.splits] + (250 if f.loader == "copied" else 192 if waits else 128)
    return -(-f.tiles // at_once) * resident * (-(-f.steps // f.splits) * f.step_k + ends) * f.BM * f.BN / rate


def _rate(p: PatchProblem, product: str, loader: str, wgmma: bool, chunk: int) -> float:
    """Of the rate at which wgmma multiplies operands that the copy engine brings: from the times of every kernel on an
    H200 (the notes of benchmarks/results/nvidia-h200/results.json, ViT-B/16 and ViT-L/14 at B = 256). 0.4 is without
    the share of the epilogue that there was; 0.08 is a guess, and so are those of copied patches."""
    of_product = PRODUCTS.get((product, wgmma), PRODUCTS["fp32", False])
    if loader in BY_BLOCKS:
        direct = p.image_dtype == p.compute_dtype and not scaling(p, product)[0]
        rate = of_product * (1.0 if direct else 0.4)
        return rate if loader == "engine" else rate * (0.8 if chunk == 16 else 0.5)
    if loader == "copy":
        return of_product * (0.2 if chunk == 16 else 0.13)
    if loader == "rows":
        return of_product * (0.2 if wgmma else 0.11 if chunk == 16 else 0.08)
    return of_product * 0.043  # gather


def _clusters(loader: str, tile: Tile) -> list[tuple[int, int]]:
    """Blocks of a cluster, and in how many parts of k they divide a tile."""
    found = [(1, 1)] + [(2, 1)] * (loader in STORING)
    return found + [(n, n) for n in EXCHANGES if n > 1 and loader == "engine" and tile in (NARROW, NARROWEST)]


def candidates(
    p: PatchProblem, gpu: Gpu, tf32: bool, images_at: int = 0, weight_at: int = 0, pos_at: int = 0
) -> tuple[list[Plan], dict[str, str]]:  # fmt: skip
    """Every loader with every tile that can take the problem, and why the other loaders can't. Tensors begin at these
    addresses, modulo 16."""
    product, layout = product_of(p, tf32), layout_of(p)
    wgmma = gpu.arch == 90 and p.rows > 0  # its blocks are those of tiles, and there are none
    copy, copy_chunk = no_copy(p, layout, product, images_at)
    rows, row_chunk = no_rows(p, layout, product, images_at)
    patches = no_patches(p, layout, product, images_at) if wgmma else "wgmma is for sm_90, and patches"
    copied, copied_chunk = no_copied(p, layout, product, images_at) if wgmma else (patches, 0)
    copied, stores = copied or no_padded_rows(p, layout), no_stores(p)
    # By wgmma from 8 bits to 16 alone: other pixels that begin at even ones are copied.
    bytes_to_half = product == "half" and p.image_dtype == torch.uint8
    wide: tuple[Tile, ...] = () if product == "fp32" else (WIDEST, WIDE)  # whose sums take twice the registers
    by_engine, stored, stored_tiles = patches or stores, copied or stores, wide or (NARROW,)
    if own_positions(p):
        stored_tiles = tuple(tile for tile in stored_tiles if p.D % tile.BN == 0)
        by_engine = by_engine or "positions per image"
        stored = stored or no_own_positions(p, pos_at)
        if not stored and not stored_tiles:
            stored = f"each patch has positions of its own, and D = {p.D} is no multiple of a tile's channels"
    rows_tiles = (WIDEST, NARROW) if wgmma and row_chunk >= 4 and bytes_to_half else ()
    offers: list[tuple[str, bool, tuple[Tile, ...], int, str]] = [
        ("engine", True, (*wide, NARROW, NARROWEST), 16, by_engine),
        ("stored", True, stored_tiles, copied_chunk, stored),
        ("copied", True, (NARROW,), copied_chunk, copied),  # with the widest its epilogue took three times as long
        ("rows", True, rows_tiles, row_chunk, rows),
        ("copy", False, MMA_TILES if product_step(product) else PLAIN_TILES, copy_chunk, copy),
        ("rows", False, MMA_TILES, row_chunk, rows),
        ("gather", False, MMA_TILES[1:] if product_step(product) else PLAIN_TILES, 0, ""),
    ]
    plans = [
        plan
        for loader, by_wgmma, tiles, chunk, reason in offers if not reason
        for tile in tiles for cluster in _clusters(loader, tile)
        if (plan := _plan(p, gpu, layout, product, loader, by_wgmma, tile, chunk, weight_at, *cluster))
    ]  # fmt: skip
    taken, small = {plan.loader for plan in plans}, f"no two stages fit {gpu.shared_bytes} bytes of shared memory"
    return plans, {loader: reason or small for loader, *_, reason in offers if loader not in taken}


def make_plan(*arguments: object, **more: object) -> Plan:
    """The cheapest of `candidates`."""
    return min(candidates(*arguments, **more)[0], key=lambda plan: plan.cost)  # type: ignore[arg-type]
