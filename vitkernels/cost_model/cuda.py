"""The passes of the CUDA C++ kernels by csrc/forward/plan.h's and backward_plan.h's arithmetic, for a dense weight and
tensors that begin on 16 bytes. tests/test_cost_model.py holds it to the plans themselves.

Not among the requests: the constants of a normalisation, which the first-level cache has.
"""

from __future__ import annotations

from math import gcd, prod
from typing import NamedTuple

import torch

from ..backends.reference import unfold
from ..backends.triton.forward_plan import View, blocks_of, product_of, scaling, view_of
from ..gpu import Gpu
from ..problem import PatchProblem
from .traffic import Pass, Road, Sizes, gathered

PACK_ROWS = 4096  # plan.h
WEIGHT_BYTES, TABLE_BYTES = 20 << 20, 8 << 20  # backward_plan.h


class Tile(NamedTuple):
    BM: int
    BN: int
    rate: float
    hopper: bool = False
    step: int = 0  # of k


MMA = (Tile(128, 128, 1.0), Tile(32, 64, 0.45))
PLAIN = (Tile(64, 64, 1.0),)
HOPPER = (Tile(128, 256, 1.0, True), Tile(128, 128, 0.8, True))


def chunk_of(bytes_in_common: int, most: int = 16) -> int:
    return gcd(bytes_in_common, 16, most)


def _alignment(p: PatchProblem, v: View) -> int:
    counts = (p.B, v.C, p.F, p.H)
    return gcd(16, *(step * p.image_dtype.itemsize for step, n in zip(v.strides[:4], counts, strict=True) if n > 1))


def _other_float(p: PatchProblem) -> bool:
    return p.image_dtype not in (p.compute_dtype, torch.uint8, torch.float32)


def no_copy(p: PatchProblem, v: View, tf32: bool) -> tuple[str, int]:
    """Why pixels can't be copied asynchronously; and how many bytes at a time they can."""
    size = p.image_dtype.itemsize
    if p.compute_dtype == torch.float64 or _other_float(p):
        return "pixels are of another float type than the product", 0
    if v.strides[4] != 1:
        return f"pixels of a row are {v.strides[4]} apart", 0
    chunk = chunk_of(gcd(v.P[2] * size, v.S[2] * size), _alignment(p, v))
    if any(p.pad):
        if scaling(p, product_of(p, tf32))[0]:
            return "padding, of normalised pixels", 0
        chunk = chunk_of(gcd(v.pad[2] * size, v.W * size), chunk)
    return (f"patches begin at multiples of {chunk} bytes, of 4 at least they must" if chunk < 4 else ""), chunk


def no_rows(p: PatchProblem, v: View, product: str) -> tuple[str, int]:
    """Why whole rows of the image can't be brought."""
    chunk = _alignment(p, v)
    reasons = (
        (product in ("fp32", "fp64"), "no tensor cores in the product"),
        (_other_float(p), "pixels are of another float type than the product"),
        (v.strides[4] != 1, f"pixels of a row are {v.strides[4]} apart"),
        (p.n_keep is not None, "a keep list"),
        (any(p.pad), "padding"),
        (v.P[2] % 2 or v.S[2] % 2, "patches of an odd number of pixels in a row, or an odd stride"),
        (chunk < 2, "rows begin at odd addresses"),
    )
    return next((text for wrong, text in reasons if wrong), ""), chunk


def no_patches(p: PatchProblem, v: View, product: str) -> str:
    """Why the copy engine can't cut the image into patches."""
    size = p.image_dtype.itemsize
    b, c, _f, h, w = v.strides
    reasons = (
        (product != "half", "the product is not of 16 bits"),
        (_other_float(p), "pixels are of another float type than the product"),
        (p.F != 1, f"{p.F} frames"),
        (p.n_keep is not None, "a keep list"),
        (any(p.pad), "padding"),
        (w != 1, f"pixels of a row are {w} apart"),
        (v.C > 1 and c != p.H * h, f"channels are {c} apart, not H·row"),
        (p.B > 1 and (b <= 0 or b * size % 16 != 0), f"images {b * size} bytes apart, no multiple of 16"),
        (h <= 0 or h * size % 16 != 0, f"rows {h * size} bytes apart, no multiple of 16"),
        (v.S[2] * size % 16 != 0, f"patches {v.S[2] * size} bytes apart, no multiple of 16"),
        (v.P[2] % 16 != 0, f"patch rows of {v.P[2]} elements, no multiple of 16"),
    )
    return next((text for wrong, text in reasons if wrong), "")


def roads(p: PatchProblem, mode: str, gpu: Gpu, tf32: bool) -> tuple[dict[str, Road], dict[str, str]]:
    """Name -> road on this GPU, and name -> why there is none."""
    if mode == "images":
        return {}, {"cuda": "the images' gradient is not modelled"}
    if mode == "backward":
        return {"cuda": backward(p, gpu, tf32)}, {}
    product, v = product_of(p, tf32), view_of(p)
    hopper = gpu.arch == 90 and product == "half"
    patches_reason = no_patches(p, v, product) if hopper else "wgmma in 16 bits is sm_90's"
    rows_reason, rows_chunk = no_rows(p, v, product)
    copy_reason, copy_chunk = no_copy(p, v, tf32)
    cores = product in ("half", "tf32")
    tiles = {
        "patches": HOPPER,
        "rows": (HOPPER if hopper and rows_chunk >= 4 else ()) + MMA,
        "copy": MMA if cores else PLAIN,
        "gather": MMA[1:] if cores else PLAIN,
    }
    reasons = {"patches": patches_reason, "rows": rows_reason, "copy": copy_reason}
    chunks = {"patches": 16, "rows": rows_chunk, "copy": copy_chunk, "gather": 0}
    found, refused = {}, {}
    for road, some in tiles.items():
        if reason := reasons.get(road):
            refused[f"cuda {road}"] = reason
        else:
            sized = [_stepped(p, v, road, tile) for tile in some]
            best = min(sized, key=lambda tile: _cost(p, v, gpu, road, chunks[road], tile))
            found[f"cuda {road}"] = _forward(p, v, road, chunks[road], best, gpu)
    return found, refused


def _stepped(p: PatchProblem, v: View, road: str, tile: Tile) -> Tile:
    """With `sized`'s step of k."""
    if road == "rows":
        least = 16 // gcd(v.P[2], 16)
        wide = least * v.P[2]
        return tile._replace(step=wide * max(1, 64 // wide) if wide <= 128 else 64)
    if road == "patches":
        rows = max(1, 64 // v.P[2])
        while p.P[1] % rows:
            rows -= 1
        return tile._replace(step=rows * v.P[2])
    plain = tile in PLAIN
    return tile._replace(step=16 if plain else 64 if p.compute_dtype.itemsize == 2 and tile.BM < 128 else 32)


def _tiles(p: PatchProblem, road: str, tile: Tile) -> tuple[int, int]:
    tiles_m = -(-p.B * p.rows // tile.BM)
    if road == "patches":
        tiles_m = prod(-(-n // s) for n, s in zip((p.B, *p.G[1:]), blocks_of(p, tile.BM), strict=True))
    return tiles_m, -(-p.D // tile.BN)


def _cost(p: PatchProblem, v: View, gpu: Gpu, road: str, chunk: int, tile: Tile) -> float:
    """plan.h's cost_of, of stages that fit."""
    wide = chunk == 16
    rates = {"gather": 0.15, "copy": 1.0 if wide else 0.6, "rows": 0.9 if wide else 0.7, "patches": 1.6}
    rate = tile.rate * (1.4 if road == "rows" and tile.hopper else rates[road])
    waves = -(-prod(_tiles(p, road, tile)) // gpu.multiprocessors)
    return waves * (-(-p.K // tile.step) * tile.step + 128) * tile.BM * tile.BN / rate


def weight_of(p: PatchProblem, v: View, tile: Tile) -> tuple[bool, int, int]:
    """Whether it is packed, the length of its rows then, and the bytes copied at a time."""
    size = p.compute_dtype.itemsize
    chunk = chunk_of(p.K * size)
    narrow = chunk < 4 or (chunk < 16 and (tile.hopper or p.B * p.rows >= PACK_ROWS))
    block = (64 if tile.step % 64 == 0 else 16) if tile.hopper else 1
    there = p.weight_dtype == p.compute_dtype and not (v.channels_last and p.C > 1)
    if there and not narrow and p.K % block == 0:
        return False, p.K, chunk
    block = max(block, 16 // size)
    return True, -(-p.K // block) * block, 16


def _forward(p: PatchProblem, v: View, road: str, chunk: int, tile: Tile, gpu: Gpu) -> Road:
    sizes, size, w = Sizes.of(p), p.compute_dtype.itemsize, p.weight_dtype.itemsize
    packed, row, weight_chunk = weight_of(p, v, tile)
    tiles_m, tiles_n = _tiles(p, road, tile)
    passes = [Pass("weight packed", sizes.weight, p.D * row * size)] * packed
    M, pixel = p.B * p.rows, p.image_dtype.itemsize
    if road == "patches":
        pixels = M * p.K * pixel
    elif road == "rows":
        pixels = _image_rows(p, v, tile, chunk)
    else:
        pixels = gathered(p, tiles_m * tile.BM) * pixel
    span = (64 if tile.step % 64 == 0 else 16) * size if tile.hopper else weight_chunk
    lanes = 4 if tile.hopper else 8  # that load the same bias for a slab of 16 rows
    prefixed = p.B * p.T * p.D * w
    requests = {
        "images": pixels * tiles_n,
        "weight": tiles_m * p.D * (-(-p.K * size // span) * span),
        "bias": tiles_m * tile.BM // 16 * lanes * p.D * w * p.has_bias,
        "position": (M * p.D * w) * (p.pos_rows > 0) + prefixed * (p.pos_rows > p.N),
        "prefix": prefixed,
        "tokens": sizes.tokens,
    }
    read = sizes.images + p.D * row * size + sizes.bias + sizes.position + sizes.prefix + sizes.keep
    main = Pass("patch embedding", read, sizes.tokens, p.flops, 1, {name: n for name, n in requests.items() if n})
    unit = "wgmma" if tile.hopper else "multiply-adds" if tile in [t._replace(step=tile.step) for t in PLAIN] else "mma"
    blocks = min(tiles_m * tiles_n, gpu.multiprocessors) if tile.hopper else tiles_m * tiles_n
    note = f"{unit} in tiles of {tile.BM}×{tile.BN}, {tiles_m * tiles_n} by {blocks} blocks"
    return Road((*passes, main), 0, note + ", the weight packed first" * packed)


def _image_rows(p: PatchProblem, v: View, tile: Tile, chunk: int) -> int:
    """Bytes of whole rows for all tiles of patches: each tile's runs of neighbours, from a multiple of `chunk` on."""
    G, M, size, total = p.G[2], p.B * p.rows, p.image_dtype.itemsize, 0
    step, wide = v.S[2] * size, v.P[2] * size

    def run(begin: int, patches_: int) -> int:
        ahead = begin * step % chunk
        line = v.W * size - begin * step + ahead  # what is left of the image's row
        return min(-(-((patches_ - 1) * step + wide + ahead) // chunk) * chunk, line)

    def of_tile(first: int, rows: int) -> int:
        found = 0
        while rows > 0:
            n = min(rows, G - first)
            found, rows, first = found + run(first, n), rows - n, 0
        return found

    full, rest = divmod(M, tile.BM)
    period = G // gcd(G, tile.BM)
    for i in range(min(period, full)):
        total += of_tile(i * tile.BM % G, tile.BM) * -(-(full - i) // period)
    if rest:
        total += of_tile(full * tile.BM % G, rest)
    steps = -(-p.K // tile.step)
    lines = p.K // v.P[2]
    if tile.step % v.P[2]:  # a row that two steps need is copied twice
        ends = [(min(s * tile.step + tile.step, p.K) - 1) // v.P[2] - s * tile.step // v.P[2] + 1 for s in range(steps)]
        lines = sum(ends)
    return total * lines


# The backward


def weight_splits(p: PatchProblem, gpu: Gpu, product: str) -> tuple[int, bool, int]:
    """Parts of dW, whether wgmma makes them, and tiles: backward_plan.h's weight_plan."""
    size, v = unfold.sum_dtype(p).itemsize, view_of(p)
    M, best = p.B * p.rows, (float("inf"), 1, False, 1)

    def consider(steps: int, step: int, tiles: int, multiply_adds: float, begin: int, hopper: bool) -> None:
        nonlocal best
        most = min(steps, WEIGHT_BYTES // (p.D * p.K * size), 4 * gpu.multiprocessors // tiles)
        for splits in range(1, max(1, most) + 1):
            each = -(-steps // splits)
            n = -(-steps // each)
            waves = -(-tiles * n // gpu.multiprocessors)
            cost = waves * (each * step + begin) * multiply_adds + 5.0 * p.D * p.K * n
            if cost < best[0]:
                best = cost, n, hopper, tiles

    BK = 32 if product == "half" else 16
    shapes = ((64, 64, 1.0), (32, 32, 0.6)) if product == "fp64" else ((128, 128, 1.0), (64, 64, 0.6))
    for BM, BN, rate in shapes:
        consider(-(-M // BK), BK, -(-p.D // BM) * -(-p.K // BN), BM * BN / rate, 4 * BK, False)
    by_engine = gpu.arch == 90 and not no_patches(p, v, product) and p.P[1] >= 8
    if by_engine and p.out_dtype == p.compute_dtype and p.D % 8 == 0:
        steps = prod(-(-n // s) for n, s in zip((p.B, *p.G[1:]), blocks_of(p, 64), strict=True))
        tiles_k = v.C * (v.P[2] // 16) * -(-p.P[1] // 8)
        for channels, rate in ((256, 1.6), (128, 1.3)):
            stage = 64 * (128 * p.image_dtype.itemsize + channels * 2)
            if (gpu.shared_bytes - 1024) // stage >= 2:
                consider(steps, 64, tiles_k * -(-p.D // channels), channels * 128 / rate, 128, True)
    return best[1:]


def sums(p: PatchProblem, gpu: Gpu, size: int) -> tuple[int, int, int]:
    """Rows of a part of the table, parts, and parts of the bias: backward_plan.h's sums_plan."""
    pos = p.pos_rows > 0 and not p.pos_per_image
    first = 0 if p.T or (pos and p.pos_rows > p.N) else p.T
    last, stored = (p.T + p.N if p.has_bias or pos else p.T), (p.T + p.N if pos else p.T)
    octets, lanes = -(-p.D // 8), 1
    while lanes < 32 and lanes < octets:
        lanes *= 2
    blocks = -(-(last - first) // (256 // lanes))
    rows = stored - first
    most = max(1, min(-(-p.B // 4), TABLE_BYTES // max(1, rows * p.D * size)))
    enough = -(-4 * gpu.multiprocessors // max(1, blocks * -(-octets // lanes)))
    splits = -(-p.B // -(-p.B // min(most, enough)))
    return rows, splits, splits * blocks


def backward(p: PatchProblem, gpu: Gpu, tf32: bool) -> Road:
    sizes, product, size = Sizes.of(p), product_of(p, tf32), unfold.sum_dtype(p).itemsize
    splits, hopper, tiles = weight_splits(p, gpu, product)
    weight_parts = splits * p.D * p.K * size
    rows, table_splits, bias_rows = sums(p, gpu, size)
    pos = p.pos_rows > 0 and not p.pos_per_image
    has_sums = p.has_bias or pos or p.T > 0
    table_parts = (table_splits * rows + bias_rows * p.has_bias) * p.D * size * has_sums
    indexed = p.n_keep is not None and (p.has_bias or pos)
    index = (p.B * p.N + p.B * p.rows) * 4 * indexed
    passes = [Pass("index of the kept patches", sizes.keep, index)] * indexed
    if p.pos_per_image:
        one = p.B * p.rows * p.D * p.out_dtype.itemsize
        passes.append(Pass("position gradients, one by one", one, sizes.position))
    passes.append(Pass("parts of dW", sizes.images + sizes.tokens + sizes.keep, weight_parts, p.flops))
    if has_sums:
        passes.append(Pass("sums over images", sizes.tokens + index, table_parts))
    w = p.weight_dtype.itemsize
    written = sizes.weight + sizes.bias + (p.pos_rows * pos + p.T) * p.D * w
    passes.append(Pass("sum of the parts", weight_parts + table_parts, written))
    unit = "wgmma" if hopper else "tensor cores by warp" if product in ("half", "tf32") else "multiply-adds"
    return Road(tuple(passes), 0, f"{unit}, {tiles} tiles of dW in {splits} parts")
