"""Which launches a problem's gradients take, with which tiles, and every argument of their kernels but the data.

Pure arithmetic, as plan.py is for the forward.
"""

from __future__ import annotations

from math import gcd, prod
from typing import Any, NamedTuple

import torch

from ...gpu import Gpu
from ...problem import PatchProblem
from ..reference import unfold
from . import configs
from .configs import Config
from .forward_plan import Order, by_axis, product_of, scaling, settles, vector_of, view_of

# What a call needs beside its gradients: several parts of dW, or of the table, have at most so many bytes together.
WEIGHT_BYTES = 20 << 20
TABLE_BYTES = 8 << 20

FINISH = Config(0, 0, 512, 4, 1)  # BK elements of a table in one program of finish_kernel
KEPT = Config(64, 64, 16, 8, 3)  # BM patches × BN channels, BK kept patches at a step
SUMS = Config(0, 0, 16, 4, 1)  # of reduce_kernel, where there is no product in it


class Launch(NamedTuple):
    kernel: str
    config: Config
    grid: int
    scalars: dict[str, int | float]
    constants: dict[str, Any]  # dtypes as torch's


class Wanted(NamedTuple):
    """What one read of dY has to give. A table of each image's own is not among it: that is a copy of dY's rows."""

    weight: bool
    bias: bool
    pos: bool
    prefix: bool


class Reduction(NamedTuple):
    reduce: Launch
    kept: Launch
    finish: Launch
    parts: dict[str, tuple[int, ...]]  # name -> shape
    order: Order
    padded_K: int


class Sums(NamedTuple):
    """How dY is summed over images: the token rows from `first` to `last`, of which those before `stored` go to the
    table's `rows`, in `tiles` programs for each of `splits` parts of `chunk` images; `kept` more for a keep list."""

    first: int
    last: int
    stored: int
    rows: int
    blocks: int
    tiles: int
    kept: int
    splits: int
    chunk: int
    BI: int
    BR: int
    BD: int


def weight_tiles(p: PatchProblem, gpu: Gpu, grad_dtype: torch.dtype, product: str) -> tuple[Config, ...]:
    v, kind = view_of(p), product
    if product == "half" and (p.n_keep is not None or grad_dtype.itemsize > 2 or p.image_dtype != p.compute_dtype):
        kind = "crowded"
    elif product == "half" and gcd(vector_of(p, v)[0], v.P[2], v.S[2]) * p.image_dtype.itemsize < 16:
        kind = "narrow"
    return configs.rows(gpu.arch, "weight", kind) or configs.rows(gpu.arch, "weight", product)


def operands(p: PatchProblem, grad_dtype: torch.dtype, road: str) -> tuple[int, int]:
    """Bytes of an element of dY, as it is multiplied, and of what it is multiplied with."""
    right = p.image_dtype if road == "weight" else p.compute_dtype
    return max(grad_dtype.itemsize, p.compute_dtype.itemsize), right.itemsize


def measured_tile(p: PatchProblem, gpu: Gpu, product: str, sizes: tuple[int, int], road: str) -> Config | None:
    found = configs.remembered(
        gpu, configs.key(p, product, False, road), (road,), lambda c: configs.staged(c, gpu, *sizes) == c
    )
    return found and found[1]


def gradient_candidates(p: PatchProblem, gpu: Gpu, product: str, road: str) -> list[tuple[str, Config]]:
    """(road, tile) to try for "weight" or "images": the one that the table picks first, then by promise."""
    sizes = operands(p, p.out_dtype, road)
    if road == "weight":
        tiles = weight_tiles(p, gpu, p.out_dtype, product)
        cost = picks = lambda c: splits_of(p, c, gpu)[0]
    else:
        tiles = configs.rows(gpu.arch, "images", product)
        M, columns = p.B * cells_of(p), p.C * prod(p.S)
        depth = p.D * prod(-(-P // S) for P, S in zip(p.P, p.S, strict=True))
        picks = lambda c: configs.waves(M, columns, c, gpu)  # noqa: E731
        cost = lambda c: configs.estimate(M, columns, depth, c, gpu, product, *sizes)  # noqa: E731
    tiles = tuple(configs.staged(c, gpu, *sizes) for c in tiles)
    near = [c for tile in tiles for c in configs.variants(tile) if configs.staged(c, gpu, *sizes) == c]
    return configs.ranked((road, min(tiles, key=picks)), [(road, c) for c in near], lambda choice: cost(choice[1]))


def splits_of(p: PatchProblem, c: Config, gpu: Gpu) -> tuple[float, int]:
    """Cost and number of the parts into which the patches are split, so that all multiprocessors have tiles of dW.

    In multiply-adds of one multiprocessor: a program's are its own, and some four steps to begin; each part is written
    and read once more, which takes as long as some 5 multiply-adds an element (H100: 8 bytes at 4 TB/s).
    """
    tiles = -(-p.D // c.BM) * -(-p.K // c.BN)
    steps = -(-p.B * p.rows // c.BK)
    most = max(
        1, min(steps, WEIGHT_BYTES // (p.D * p.K * unfold.sum_dtype(p).itemsize), 4 * gpu.multiprocessors // tiles)
    )

    def cost(splits: int) -> float:
        waves = -(-tiles * splits // gpu.multiprocessors)
        return waves * (-(-steps // splits) + 4) * c.BM * c.BN * c.BK / c.rate + 5 * p.D * p.K * splits

    return min((cost(s), s) for s in range(1, most + 1))


def sums_of(p: PatchProblem, gpu: Gpu, grad_dtype: torch.dtype, wanted: Wanted, warps: int) -> Sums:
    kept = p.n_keep is not None
    first = 0 if wanted.prefix or (wanted.pos and p.pos_rows > p.N) else p.T
    last = p.T + p.rows if wanted.bias or (wanted.pos and not kept) else p.T
    rows = (p.T + p.N if wanted.pos else p.T) - first
    size = unfold.sum_dtype(p).itemsize
    BI, BR, BD = 16 // grad_dtype.itemsize, warps, (512 if p.D > 128 else 256) // grad_dtype.itemsize
    blocks = -(-(last - first) // BR)
    tiles = blocks * -(-p.D // BD)
    kept_tiles = -(-p.N // KEPT.BM) * -(-p.D // KEPT.BN) if wanted.pos and kept else 0
    most = max(1, min(-(-p.B // BI), TABLE_BYTES // max(1, rows * p.D * size)))
    chunk = -(-p.B // min(most, -(-4 * gpu.multiprocessors // max(1, kept_tiles or tiles))))
    stored = last if wanted.pos and not kept else p.T
    return Sums(first, last, stored, rows, blocks, tiles, kept_tiles, -(-p.B // chunk), chunk, BI, BR, BD)


def reduction(
    p: PatchProblem, gpu: Gpu, grad_dtype: torch.dtype, wanted: Wanted, tf32: bool, interpreted: bool = False,
    choice: Config | None = None,
) -> Reduction:  # fmt: skip
    """The launches that give the gradients of weight, bias, position table and prefix."""
    product, v, sum_dtype = product_of(p, tf32), view_of(p), unfold.sum_dtype(p)
    c, splits, chunk = choice or SUMS, 0, 0
    if wanted.weight:
        sizes = operands(p, grad_dtype, "weight")
        choice = choice or measured_tile(p, gpu, product, sizes, "weight")
        tiles = (choice,) if choice else weight_tiles(p, gpu, grad_dtype, product)
        c = min((configs.staged(c, gpu, *sizes) for c in tiles), key=lambda c: splits_of(p, c, gpu))
        chunk = -(-p.B * p.rows // (splits_of(p, c, gpu)[1] * c.BK)) * c.BK
        splits = -(-p.B * p.rows // chunk)
    weight_programs = splits * -(-p.D // c.BM) * -(-p.K // c.BN) if wanted.weight else 0
    sums = sums_of(p, gpu, grad_dtype, wanted, c.warps)
    vec, (b, ch, f, h, w) = vector_of(p, v)
    padded_K = -(-p.K // c.BN) * c.BN if wanted.weight else p.K
    normalised, scaled = scaling(p, product)
    reduce = Launch(
        "reduce_kernel", c,
        grid=weight_programs + sums.tiles * sums.splits,
        scalars={
            "B": p.B, "F": p.F, "H": p.H, "W": v.W, "T": p.T, "D": p.D, "rows": p.rows,
            "G_t": p.G[0], "G_h": p.G[1], "G_w": p.G[2],
            "image_b": b, "image_c": ch, "image_f": f, "image_h": h, "image_w": w,
            "weight_programs": weight_programs, "weight_chunk": chunk,
            "sums_chunk": sums.chunk, "first_row": sums.first, "last_row": sums.last, "table_stop": sums.stored,
            "table_rows": sums.rows,
        },
        constants={
            **by_axis(P=v.P, S=v.S, pad=v.pad), "K": p.K, "K_PAD": padded_K, "VEC": vec,
            "NORMALISED": normalised and wanted.weight, "HAS_KEEP": p.n_keep is not None,
            "WEIGHT": wanted.weight, "SUMS": sums.tiles > 0, "TABLE": sums.rows > 0, "BIAS": wanted.bias,
            "COMPUTE": p.compute_dtype, "SUM": sum_dtype, "PRECISION": "tf32" if product == "tf32" else "ieee",
            "SETTLE": settles(gpu, product, grad_dtype != p.compute_dtype), "INTERPRETED": interpreted,
            "BM": c.BM, "BN": c.BN, "BK": c.BK, "BI": sums.BI, "BR": sums.BR, "BD": sums.BD,
        },
    )  # fmt: skip
    # Times zeros and ones, dY is exact in its own dtype.
    exact = grad_dtype if grad_dtype.itemsize < sum_dtype.itemsize == 4 else sum_dtype
    kept = Launch(
        "kept_kernel", KEPT,
        grid=sums.kept * sums.splits,
        scalars={
            "B": p.B, "N": p.N, "T": p.T, "D": p.D, "rows": p.rows, "chunk": sums.chunk, "first_row": sums.first,
            "table_rows": sums.rows,
        },
        constants={
            "COMPUTE": exact, "SUM": sum_dtype, "SETTLE": settles(gpu, "half" if exact.itemsize == 2 else "fp32", True),
            "INTERPRETED": interpreted, "BM": KEPT.BM, "BN": KEPT.BN, "BK": KEPT.BK,
        },
    )  # fmt: skip
    weight_blocks = -(-p.D * p.K // FINISH.BK) if wanted.weight else 0
    table_blocks = -(-sums.rows * p.D // FINISH.BK)
    finish = Launch(
        "finish_kernel", FINISH,
        grid=weight_blocks + table_blocks + (-(-p.D // (FINISH.BK // 16)) if wanted.bias else 0),
        scalars={
            "D": p.D, "weight_splits": splits, "sums_splits": sums.splits, "bias_splits": sums.splits * sums.blocks,
            "weight_size": p.D * p.K, "table_size": sums.rows * p.D,
            "pos_from": p.T + p.N - p.pos_rows - sums.first, "prefix_stop": p.T,
            "weight_programs": weight_blocks, "table_programs": table_blocks, "scale": p.scale,
        },
        constants={
            **by_axis(P=v.P), "K": p.K, "CHANNELS": p.C if v.channels_last else 1, "WEIGHT": wanted.weight,
            "TABLE": sums.rows > 0, "POS": wanted.pos, "PREFIX": wanted.prefix, "BIAS": wanted.bias,
            "SCALED": scaled, "SUM": sum_dtype, "INTERPRETED": interpreted, "BS": 8, "BE": FINISH.BK,
        },
    )  # fmt: skip
    parts: dict[str, tuple[int, ...]] = {
        "weight_parts": (splits, p.D, p.K), "table_parts": (sums.splits, sums.rows, p.D),
        "bias_parts": (sums.splits * sums.blocks, p.D) if wanted.bias else (0,),
    }  # fmt: skip
    return Reduction(reduce, kept, finish, parts, Order(v.channels_last, None), padded_K)


def cells_of(p: PatchProblem) -> int:
    """Cells of one image, as images_kernel counts them; 0 where pixels are bytes, which have no gradient."""
    sides = zip((p.F, p.H, p.W), p.pad, p.S, strict=True)
    return prod(-(-(n + pad) // S) for n, pad, S in sides) if p.image_dtype.is_floating_point else 0


def image_launch(
    p: PatchProblem, strides: tuple[int, ...], gpu: Gpu, grad_dtype: torch.dtype, tf32: bool,
    interpreted: bool = False, choice: Config | None = None,
) -> tuple[Launch, Order]:  # fmt: skip
    """The launch that gives the images' gradient, in these strides; and the order in which it reads the weight."""
    product, v = product_of(p, tf32), view_of(p, strides)
    vec, (b, ch, f, h, w) = vector_of(p, v)
    # A stride past the image is as good as one that ends with it.
    t, y, x = (min(S, max(P, n + pad)) for S, P, n, pad in zip(v.S, v.P, (p.F, p.H, v.W), v.pad, strict=True))
    v = v._replace(S=(t, y, x))
    cells = [-(-(n + pad) // S) for n, pad, S in zip((p.F, p.H, v.W), v.pad, v.S, strict=True)]
    overlap = [-(-P // S) for P, S in zip(v.P, v.S, strict=True)]
    M, columns = p.B * prod(cells), v.C * prod(v.S)

    sizes = operands(p, grad_dtype, "images")
    choice = choice or measured_tile(p, gpu, product, sizes, "images")
    c = choice or min(configs.rows(gpu.arch, "images", product), key=lambda c: configs.waves(M, columns, c, gpu))
    c = configs.staged(c, gpu, *sizes)
    normalised, scaled = scaling(p, product)
    launch = Launch(
        "images_kernel", c,
        grid=-(-M // c.BM) * -(-columns // c.BN),
        scalars={
            "B": p.B, "F": p.F, "H": p.H, "W": v.W, "D": p.D, "Q_t": cells[0], "Q_h": cells[1], "Q_w": cells[2],
            "G_t": p.G[0], "G_h": p.G[1], "G_w": p.G[2],
            "image_b": b, "image_c": ch, "image_f": f, "image_h": h, "image_w": w,
            "scale": p.scale, "steps": prod(overlap) * -(-p.D // c.BK),
        },
        constants={
            **by_axis(P=v.P, S=v.S, pad=v.pad, J=overlap),
            "C": v.C, "CHANNELS": p.C if v.channels_last else 1, "K": p.K, "VEC": vec,
            "NORMALISED": normalised, "SCALED": scaled, "COMPUTE": p.compute_dtype, "SUM": unfold.sum_dtype(p),
            "PRECISION": "tf32" if product == "tf32" else "ieee",
            "SETTLE": settles(gpu, product, grad_dtype != p.compute_dtype), "INTERPRETED": interpreted,
            "BM": c.BM, "BN": c.BN, "BK": c.BK,
        },
    )  # fmt: skip
    return launch, Order(v.channels_last, None)
