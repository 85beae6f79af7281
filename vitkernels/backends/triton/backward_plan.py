"""Which launches a problem's gradients take, with which tiles, and every argument of their kernels but the data.

Pure arithmetic, as forward_plan.py is for the forward.
"""

from __future__ import annotations

from math import gcd, prod
from typing import Any, NamedTuple

import torch

from ...gpu import Gpu
from ...problem import PatchProblem
from .. import split_k
from ..patch_layout import blocks_in, blocks_of, layout_of, no_copy_engine, product_of, scaling
from ..split_k import TABLE_BYTES
from . import config_cache, configs
from .configs import Choice, Config
from .forward_plan import Order, by_axis, settles, vector_of

FINISH = Config(0, 0, 512, 4, 1)  # BK elements of a table in one program of finish_kernel
KEPT = Config(64, 64, 16, 8, 3)  # BM patches × BN channels, BK kept patches at a step
SUMS = Config(0, 0, 16, 4, 1)  # of reduce_kernel, where there is no product in it
BLOCK = 128  # elements of a patch that the copy engine brings at a step: BN of weight_descriptor's tiles


class Launch(NamedTuple):
    kernel: str
    config: Config
    grid: int
    scalars: dict[str, int | float]
    constants: dict[str, Any]  # dtypes as torch's
    descriptors: dict[str, tuple[list[int], list[int], list[int]]] | None = None  # name -> shape, strides, block


class Grad(NamedTuple):
    """The gradient of the tokens, [B, T + rows, D], as a kernel reads it."""

    dtype: torch.dtype
    strides: tuple[int, ...]
    aligned: bool  # images and it begin on 16 bytes, and the driver has refused no tensor map


def dense(p: PatchProblem, dtype: torch.dtype | None = None) -> Grad:
    """As PyTorch makes it, in the tokens' dtype unless another is named."""
    return Grad(dtype or p.out_dtype, ((p.T + p.rows) * p.D, p.D, 1), True)


class Wanted(NamedTuple):
    """What one read of dY has to give. A table of each image's own is not among it: that is a copy of dY's rows."""

    weight: bool
    bias: bool
    pos: bool
    prefix: bool


class Reduction(NamedTuple):
    weight: Launch | None  # of dW by the copy engine; None: reduce's programs gather it
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


def no_weight_descriptor(p: PatchProblem, gpu: Gpu, product: str, grad: Grad) -> list[str]:
    """Why the copy engine can't bring dY and the patches for dW; none: it can."""
    layout, (b, n, d), size = layout_of(p), grad.strides, grad.dtype.itemsize
    reasons = [
        (not configs.rows(gpu.arch, "weight_descriptor", product), f"no such kernel for {product} on sm_{gpu.arch}"),
        *((True, reason) for reason in no_copy_engine(p, layout, 0 if grad.aligned else 8)),
        (d != 1, f"channels of the tokens' gradient are {d} apart"),
        (n <= 0 or n * size % 16 != 0, f"its rows are {n * size} bytes apart, no multiple of 16"),
        (p.B > 1 and (b <= 0 or b * size % 16 != 0), f"its images are {b * size} bytes apart, no multiple of 16"),
        (
            block_of_patch(p) is None,
            f"a patch of {layout.P[1]} rows of {layout.P[2]} is not cut into blocks of {BLOCK}",
        ),
    ]
    return [text for wrong, text in reasons if wrong]


def block_of_patch(p: PatchProblem) -> tuple[int, int] | None:
    """(RK, XK): BLOCK elements of a patch as RK rows of XK pixels, which are 16 bytes or more."""
    P = layout_of(p).P
    XK = gcd(P[2], BLOCK)
    RK = gcd(P[1], BLOCK // XK)
    return (RK, XK) if RK * XK == BLOCK and XK * p.image_dtype.itemsize >= 16 else None


def weight_kernels(p: PatchProblem, gpu: Gpu, product: str, grad: Grad) -> dict[str, tuple[Config, ...]]:
    """The kernels that can take dW, the one to take first, and their tiles."""
    kernels = {"weight": weight_tiles(p, gpu, grad.dtype, product)}
    if no_weight_descriptor(p, gpu, product, grad):
        return kernels
    return {"weight_descriptor": configs.rows(gpu.arch, "weight_descriptor", product), **kernels}


def weight_tiles(p: PatchProblem, gpu: Gpu, grad_dtype: torch.dtype, product: str) -> tuple[Config, ...]:
    v, kind = layout_of(p), product
    if product == "half" and (p.n_keep is not None or grad_dtype.itemsize > 2 or p.image_dtype != p.compute_dtype):
        kind = "crowded"
    elif product == "half" and gcd(vector_of(p, v)[0], v.P[2], v.S[2]) * p.image_dtype.itemsize < 16:
        kind = "narrow"
    return configs.rows(gpu.arch, "weight", kind) or configs.rows(gpu.arch, "weight", product)


def operands(p: PatchProblem, grad_dtype: torch.dtype, direction: str) -> tuple[int, int]:
    """Bytes of an element of dY, as it is multiplied, and of what it is multiplied with."""
    right = p.image_dtype if direction == "weight" else p.compute_dtype
    return max(grad_dtype.itemsize, p.compute_dtype.itemsize), right.itemsize


def measured_tile(
    p: PatchProblem, gpu: Gpu, product: str, sizes: tuple[int, int], direction: str, kernels: tuple[str, ...]
) -> Choice | None:
    key = config_cache.key(p, product, "weight_descriptor" in kernels, direction)
    return config_cache.remembered(gpu, key, kernels, lambda c: configs.staged(c, gpu, *sizes) == c)


def split_of(p: PatchProblem, kernel: str, c: Config, gpu: Gpu) -> split_k.Split:
    """The cheapest of the patches among the programs of a tile, in steps of BK patches or of a block of them."""
    steps = blocks_in(p, blocks_of(p, c.BK)) if kernel == "weight_descriptor" else -(-p.B * p.rows // c.BK)
    return split_k.cheapest(p, gpu, -(-p.D // c.BM) * -(-p.K // c.BN), steps, c.BM * c.BN * c.BK / c.rate)


def weight_choices(p: PatchProblem, gpu: Gpu, product: str, grad: Grad) -> dict[str, Config]:
    """The kernels that can take dW, the one to take first, and of each the cheapest of its tiles."""
    sizes = operands(p, grad.dtype, "weight")
    return {
        kernel: min((configs.staged(c, gpu, *sizes) for c in tiles), key=lambda c: split_of(p, kernel, c, gpu))
        for kernel, tiles in weight_kernels(p, gpu, product, grad).items()
    }


def sums_of(p: PatchProblem, gpu: Gpu, grad_dtype: torch.dtype, wanted: Wanted, warps: int) -> Sums:
    kept = p.n_keep is not None
    first = 0 if wanted.prefix or (wanted.pos and p.pos_rows > p.N) else p.T
    last = p.T + p.rows if wanted.bias or (wanted.pos and not kept) else p.T
    rows = (p.T + p.N if wanted.pos else p.T) - first
    size = p.sum_dtype.itemsize
    BI, BR, BD = 16 // grad_dtype.itemsize, warps, (512 if p.D > 128 else 256) // grad_dtype.itemsize
    blocks = -(-(last - first) // BR)
    tiles = blocks * -(-p.D // BD)
    kept_tiles = -(-p.N // KEPT.BM) * -(-p.D // KEPT.BN) if wanted.pos and kept else 0
    most = max(1, min(-(-p.B // BI), TABLE_BYTES // max(1, rows * p.D * size)))
    chunk = -(-p.B // min(most, -(-4 * gpu.multiprocessors // max(1, kept_tiles or tiles))))
    stored = last if wanted.pos and not kept else p.T
    return Sums(first, last, stored, rows, blocks, tiles, kept_tiles, -(-p.B // chunk), chunk, BI, BR, BD)


def reduction(
    p: PatchProblem, gpu: Gpu, grad: Grad, wanted: Wanted, tf32: bool, interpreted: bool = False,
    choice: Choice | None = None,
) -> Reduction:  # fmt: skip
    """The launches that give the gradients of weight, bias, position table and prefix."""
    product, v, weight = product_of(p, tf32), layout_of(p), None
    c, splits, chunk, weight_programs, padded_K = SUMS, 0, 0, 0, p.K
    if wanted.weight:
        choices, sizes = weight_choices(p, gpu, product, grad), operands(p, grad.dtype, "weight")
        choice = choice or measured_tile(p, gpu, product, sizes, "weight", tuple(choices))
        kernel, c = choice or next(iter(choices.items()))
        c = configs.staged(c, gpu, *sizes)
        if kernel == "weight_descriptor":
            c = c._replace(BN=BLOCK)  # whatever a file says
        _, splits, steps = split_of(p, kernel, c, gpu)
        programs = splits * -(-p.D // c.BM) * -(-p.K // c.BN)
        if kernel == "weight_descriptor":
            weight, c = _weight_descriptor(p, gpu, grad, product, interpreted, c, programs, steps), SUMS
        else:
            weight_programs, chunk, padded_K = programs, steps * c.BK, -(-p.K // c.BN) * c.BN
    gathered = weight_programs > 0
    sums = sums_of(p, gpu, grad.dtype, wanted, c.warps)
    vec, (b, ch, f, h, w) = vector_of(p, v)
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
            "NORMALISED": normalised and gathered, "HAS_KEEP": p.n_keep is not None,
            "WEIGHT": gathered, "SUMS": sums.tiles > 0, "TABLE": sums.rows > 0, "BIAS": wanted.bias,
            "COMPUTE": p.compute_dtype, "SUM": p.sum_dtype, "PRECISION": "tf32" if product == "tf32" else "ieee",
            "SETTLE": settles(gpu, product, grad.dtype != p.compute_dtype), "INTERPRETED": interpreted,
            "BM": c.BM, "BN": c.BN, "BK": c.BK, "BI": sums.BI, "BR": sums.BR, "BD": sums.BD,
        },
    )  # fmt: skip
    parts: dict[str, tuple[int, ...]] = {
        "weight_parts": (splits, p.D, p.K), "table_parts": (sums.splits, sums.rows, p.D),
        "bias_parts": (sums.splits * sums.blocks, p.D) if wanted.bias else (0,),
    }  # fmt: skip
    kept = _kept(p, gpu, grad.dtype, sums, interpreted)
    finish = _finish(p, wanted, sums, splits, scaled, interpreted)
    return Reduction(weight, reduce, kept, finish, parts, Order(v.channels_last, None), padded_K)


def _weight_descriptor(
    p: PatchProblem, gpu: Gpu, grad: Grad, product: str, interpreted: bool, c: Config, programs: int, chunk: int
) -> Launch:
    """dW, both operands by the copy engine. Measured on an H200 beside the sums of dY, of which a launch of their own
    takes 22 µs: 145 µs for ViT-B/16, B = 256, where the gathering kernel takes 439 with them."""
    v, block = layout_of(p), blocks_of(p, c.BK)
    cut = block_of_patch(p)
    assert cut is not None, p
    RK, XK = cut
    _, gh, gw = p.G
    b, _c, _f, h, _w = v.strides
    grad_b, grad_n, _ = grad.strides
    if p.B == 1:  # one image has no next
        b, grad_b = gh * v.S[1] * h, gh * gw * grad_n
    return Launch(
        "weight_descriptor_kernel", c,
        grid=programs,
        scalars={"B": p.B, "H": p.H, "D": p.D, "G_h": gh, "G_w": gw, "chunk": chunk},
        constants={
            "C": v.C, "P_h": v.P[1], "P_w": v.P[2], "NORMALISED": scaling(p, product)[0], "COMPUTE": p.compute_dtype,
            "SUM": p.sum_dtype, "PRECISION": "ieee",
            "SETTLE": settles(gpu, product, True),  # dY is transposed in registers
            "INTERPRETED": interpreted, "BB": block[0], "BY": block[1], "BX": block[2], "BM": c.BM, "RK": RK, "XK": XK,
        },
        descriptors={
            "image_desc": ([p.B, gh, gw, v.C * p.H, v.P[2]], [b, v.S[1] * h, v.S[2], h, 1], [*block, RK, XK]),
            "grad_desc": ([p.B, gh, gw, p.D], [grad_b, gw * grad_n, grad_n, 1], [*block, c.BM]),
        },
    )  # fmt: skip


def _kept(p: PatchProblem, gpu: Gpu, grad_dtype: torch.dtype, sums: Sums, interpreted: bool) -> Launch:
    """The position table's gradient under a keep list: a product of dY with zeros and ones."""
    # Times zeros and ones, dY is exact in its own dtype.
    exact = grad_dtype if grad_dtype.itemsize < p.sum_dtype.itemsize == 4 else p.sum_dtype
    return Launch(
        "kept_kernel", KEPT,
        grid=sums.kept * sums.splits,
        scalars={
            "B": p.B, "N": p.N, "T": p.T, "D": p.D, "rows": p.rows, "chunk": sums.chunk, "first_row": sums.first,
            "table_rows": sums.rows,
        },
        constants={
            "COMPUTE": exact, "SUM": p.sum_dtype, "INTERPRETED": interpreted,
            "SETTLE": settles(gpu, "half" if exact.itemsize == 2 else "fp32", True),
            "BM": KEPT.BM, "BN": KEPT.BN, "BK": KEPT.BK,
        },
    )  # fmt: skip


def _finish(p: PatchProblem, wanted: Wanted, sums: Sums, splits: int, scaled: bool, interpreted: bool) -> Launch:
    """The sum of the parts."""
    v = layout_of(p)
    weight_blocks = -(-p.D * p.K // FINISH.BK) if wanted.weight else 0
    table_blocks = -(-sums.rows * p.D // FINISH.BK)
    return Launch(
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
            "SCALED": scaled, "SUM": p.sum_dtype, "INTERPRETED": interpreted, "BS": 8, "BE": FINISH.BK,
        },
    )  # fmt: skip


def cells_of(p: PatchProblem) -> int:
    """Cells of one image, as images_kernel counts them; 0 where pixels are bytes, which have no gradient."""
    sides = zip((p.F, p.H, p.W), p.pad, p.S, strict=True)
    return prod(-(-(n + pad) // S) for n, pad, S in sides) if p.image_dtype.is_floating_point else 0


def image_launch(
    p: PatchProblem, strides: tuple[int, ...], gpu: Gpu, grad_dtype: torch.dtype, tf32: bool,
    interpreted: bool = False, choice: Config | None = None,
) -> tuple[Launch, Order]:  # fmt: skip
    """The launch that gives the images' gradient, in these strides; and the order in which it reads the weight."""
    product, v = product_of(p, tf32), layout_of(p, strides)
    vec, (b, ch, f, h, w) = vector_of(p, v)
    cells = [-(-(n + pad) // S) for n, pad, S in zip((p.F, p.H, v.W), v.pad, v.S, strict=True)]
    overlap = [-(-P // S) for P, S in zip(v.P, v.S, strict=True)]
    M, columns = p.B * prod(cells), v.C * prod(v.S)

    sizes = operands(p, grad_dtype, "images")
    found = measured_tile(p, gpu, product, sizes, "images", ("images",))
    c = (
        choice
        or (found and found[1])
        or min(configs.rows(gpu.arch, "images", product), key=lambda c: configs.waves(M, columns, c, gpu))
    )
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
            "NORMALISED": normalised, "SCALED": scaled, "COMPUTE": p.compute_dtype, "SUM": p.sum_dtype,
            "PRECISION": "tf32" if product == "tf32" else "ieee",
            "SETTLE": settles(gpu, product, grad_dtype != p.compute_dtype), "INTERPRETED": interpreted,
            "BM": c.BM, "BN": c.BN, "BK": c.BK,
        },
    )  # fmt: skip
    return launch, Order(v.channels_last, None)
