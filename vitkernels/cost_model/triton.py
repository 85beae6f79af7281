"""The passes of the Triton kernels, from the very plans that run (backends/triton/*_plan.py)."""

from __future__ import annotations

from math import prod
from typing import Any

from ..backends.patch_layout import blocks_in, product_of
from ..backends.triton import configs
from ..backends.triton.backward_plan import KEPT, Wanted, cells_of, dense, image_launch, reduction
from ..backends.triton.forward_plan import Order, Plan, kernels_of, make_plan, no_descriptor
from ..gpu import Gpu
from ..problem import PatchProblem
from .traffic import INDEX, Algorithm, Pass, Sizes, gathered


def algorithms(p: PatchProblem, mode: str, gpu: Gpu, tf32: bool) -> tuple[dict[str, Algorithm], dict[str, str]]:
    """Name -> algorithm on this GPU, and name -> why there is none. The backward has one, which gathers."""
    if mode != "forward":
        return {"triton": backward(p, gpu, tf32) if mode == "backward" else images(p, gpu, tf32)}, {}
    product = product_of(p, tf32)
    reasons, names = no_descriptor(p, gpu, product, True), kernels_of(p, gpu, product, True)
    taken = make_plan(p, gpu, True, tf32)  # with the tile that was measured, where one was
    plans = {
        name: taken if name == taken.kernel
        else make_plan(p, gpu, True, tf32, choice=(name, configs.default(p, name, product, gpu)))
        for name in names
    }  # fmt: skip
    found = {f"triton {name}": forward(p, plan) for name, plan in plans.items()}
    refused = {"triton descriptor": "; ".join(reasons)} if reasons else {}
    return found, refused


def forward(p: PatchProblem, plan: Plan) -> Algorithm:
    sizes, c = Sizes.of(p), plan.config
    centred = 2 * plan.padded_K * p.sum_dtype.itemsize * bool(plan.constants["NORMALISED"])
    weight = p.D * plan.weight_columns * p.compute_dtype.itemsize
    main = Pass(
        "patch embedding",
        sizes.images + weight + sizes.bias + sizes.position + sizes.prefix + sizes.keep + centred, sizes.tokens,
        p.flops, requested=_forward_requests(p, plan, centred),
    )  # fmt: skip
    packing = pack(p, plan.order, plan.weight_columns)
    temporary = ", the weight packed first" if packing else ""
    tile = f"tiles of {c.BM}×{c.BN}×{c.BK}, {plan.grid} programs{temporary}"
    return Algorithm((*packing, main), note=tile)


def _forward_requests(p: PatchProblem, plan: Plan, centred: int) -> dict[str, int]:
    c, M, size, learnt = plan.config, p.B * p.rows, p.compute_dtype.itemsize, p.weight_dtype.itemsize
    tiles_n = -(-p.D // c.BN)
    if plan.kernel == "descriptor":
        block = [int(plan.constants[side]) for side in ("BB", "BY", "BX")]  # type: ignore[call-overload]
        tiles_m = prod(-(-n // s) for n, s in zip((p.B, *p.G[1:]), block, strict=True))
        pixels, columns = M * p.K, plan.weight_columns
    else:
        tiles_m = -(-M // c.BM)
        pixels, columns = gathered(p, tiles_m * c.BM), p.K if plan.weight_columns < plan.padded_K else plan.padded_K
    rows = tiles_m * c.BM  # those past the end load a position, too
    prefixed = p.B * p.T * p.D * learnt
    requests = {
        "images": pixels * tiles_n * p.image_dtype.itemsize,
        "weight": tiles_m * p.D * columns * size,
        "bias": tiles_m * p.D * learnt * p.has_bias,
        "position": rows * p.D * learnt * (p.pos_rows > 0) + prefixed * (p.pos_rows > p.N),
        "prefix": prefixed,
        "keep": rows * tiles_n * INDEX * (p.n_keep is not None) * (2 + bool(plan.constants["BASE_FIRST"])),
        "centred": tiles_m * tiles_n * centred,
        "tokens": prod(p.out_shape) * p.out_dtype.itemsize,
    }
    return {name: size for name, size in requests.items() if size}


def pack(p: PatchProblem, order: Order, columns: int) -> list[Pass]:
    """launch.packed: the weight in the kernel's dtype, order and width; nothing where it is that already."""
    size, passes = p.compute_dtype.itemsize, []
    weight = p.D * p.K * size
    if p.compute_dtype != p.weight_dtype:
        passes.append(Pass("weight to the product's dtype", p.D * p.K * p.weight_dtype.itemsize, weight))
    if (order.channels_last and p.C > 1) or order.steps is not None:
        passes.append(Pass("weight in the image's order", weight, weight))
    if columns > p.K:  # zeros everywhere, then the weight over them
        passes.append(Pass("weight with zeros behind its rows", weight, p.D * columns * size + weight, 0, 2))
    return passes


def backward(p: PatchProblem, gpu: Gpu, tf32: bool) -> Algorithm:
    """The gradients of all that is learnt: parts of them from one read of images and dY, and their sum in order."""
    sizes = Sizes.of(p)
    wanted = Wanted(True, p.has_bias, p.pos_rows > 0 and not p.pos_per_image, p.T > 0)
    plan = reduction(p, gpu, dense(p), wanted, tf32)
    size, w = p.sum_dtype.itemsize, p.weight_dtype.itemsize
    parts = {name: prod(shape) * size for name, shape in plan.parts.items()}
    centred = 2 * plan.padded_K * size * bool((plan.weight or plan.reduce).constants["NORMALISED"])
    dY = sizes.tokens
    table = _table_rows(p, wanted) * p.D * w
    requests = _backward_requests(p, plan, wanted)
    passes = []
    if p.pos_per_image:
        rows = p.B * p.rows * p.D * p.out_dtype.itemsize
        passes.append(Pass("position gradients, one by one", rows, sizes.position))
    from_kept = parts["table_parts"] * p.N // max(1, plan.parts["table_parts"][1]) if plan.kept.grid else 0
    in_one = plan.weight is None
    if not in_one:
        tokens = p.B * p.rows * p.D * p.out_dtype.itemsize
        passes.append(
            Pass("parts of the weight's gradient", sizes.images + tokens + centred, parts["weight_parts"], p.flops,
                 requested=requests["weight"])
        )  # fmt: skip
    passes.append(
        Pass("parts of the gradients" if in_one else "parts of the sums",
             in_one * (sizes.images + centred) + dY + sizes.keep,
             sum(parts.values()) - from_kept - (not in_one) * parts["weight_parts"], in_one * p.flops,
             requested=requests["reduce"])
    )  # fmt: skip
    if plan.kept.grid:
        kept_dY = p.B * p.rows * p.D * p.out_dtype.itemsize
        passes.append(
            Pass("position of the kept", kept_dY + sizes.keep, from_kept,
                 2 * p.B * p.rows * p.N * p.D, requested=requests["kept"])
        )  # fmt: skip
    passes.append(
        Pass("sum of the parts", sum(parts.values()), sizes.weight + sizes.bias + table, requested=requests["finish"])
    )
    splits = plan.parts["weight_parts"][0]
    one = plan.weight or plan.reduce
    c = one.config
    note = f"tiles of {c.BM}×{c.BN}×{c.BK} in {splits} parts, {one.grid} programs"
    return Algorithm(tuple(passes), note=note)


def _table_rows(p: PatchProblem, wanted: Wanted) -> int:
    return p.pos_rows * wanted.pos + p.T * wanted.prefix


def _backward_requests(p: PatchProblem, plan: Any, wanted: Wanted) -> dict[str, dict[str, int]]:
    one, scalars, kept = plan.weight or plan.reduce, plan.reduce.scalars, p.n_keep is not None
    c, size, g, M, by_engine = (
        one.config,
        p.sum_dtype.itemsize,
        p.out_dtype.itemsize,
        p.B * p.rows,
        plan.weight is not None,
    )
    steps, tiles_d, tiles_k = -(-M // c.BK), -(-p.D // c.BM), -(-p.K // c.BN)
    if by_engine:
        steps = blocks_in(p, tuple(one.constants[side] for side in ("BB", "BY", "BX")))
    weight_parts, table_parts, bias_parts = (
        prod(plan.parts[name]) * size for name in ("weight_parts", "table_parts", "bias_parts")
    )
    first, last = int(scalars["first_row"]), int(scalars["last_row"])
    BR, BD = plan.reduce.constants["BR"], plan.reduce.constants["BD"]
    blocks, across = -(-(last - first) // BR), -(-p.D // BD)
    listed = max(0, min(p.rows, first + blocks * BR - p.T)) if blocks else 0  # kept patches that blocks of rows look up
    from_kept = plan.parts["table_parts"][0] * p.N * p.D * size if plan.kept.grid else 0
    w = p.weight_dtype.itemsize
    pixels = M * p.K if by_engine else gathered(p, M if kept else steps * c.BK)
    weight = {
        "images": tiles_d * pixels * p.image_dtype.itemsize,
        "dY": tiles_k * M * p.D * g,
        "keep": tiles_d * tiles_k * steps * c.BK * INDEX * kept,
        "centred": tiles_d * tiles_k * steps * 2 * c.BN * size * bool(one.constants["NORMALISED"]),
        "parts": weight_parts,
    }
    sums = {
        "dY": (last - first) * p.B * p.D * g, "keep": across * p.B * listed * INDEX * kept,
        "parts": table_parts - from_kept + bias_parts,
    }  # fmt: skip
    reduce = sums if by_engine else {name: n + sums.get(name, 0) for name, n in weight.items()}
    finish = {
        "parts": weight_parts + table_parts + bias_parts,
        "gradients": (p.D * p.K + p.D * p.has_bias + _table_rows(p, wanted) * p.D) * w,
    }
    tiles_n, tiles_D = -(-p.N // KEPT.BM), -(-p.D // KEPT.BN)
    of_kept = {"keep": tiles_n * tiles_D * M * INDEX, "dY": tiles_n * M * p.D * g, "parts": from_kept}
    found = {"weight": weight, "reduce": reduce, "kept": of_kept, "finish": finish}
    return {kernel: {name: n for name, n in requests.items() if n} for kernel, requests in found.items()}


def images(p: PatchProblem, gpu: Gpu, tf32: bool) -> Algorithm:
    """The images' gradient. A keep list's dY is put back to its place among all patches first, in fp32."""
    sizes, strides = Sizes.of(p), p.image_strides
    dY, g, passes = p.B * p.rows * p.D * p.out_dtype.itemsize, p.out_dtype, []
    if p.n_keep is not None:
        g = p.sum_dtype
        table, kept = p.B * p.N * p.D * g.itemsize, p.B * p.rows * p.D * g.itemsize
        passes = [
            Pass("dY without what is out of the grid", sizes.tokens + sizes.keep, sizes.tokens),
            Pass("zeros", 0, table),
            *[Pass("dY to fp32", dY, kept)] * (p.out_dtype != g),
            Pass("dY among all patches", 2 * kept + sizes.keep, kept),
        ]
        dY = table
    launch, order = image_launch(p, strides, gpu, g, tf32)
    c = launch.config
    columns, M = int(p.C * prod(launch.constants[f"S_{a}"] for a in "thw")), p.B * cells_of(p)
    if order.channels_last:
        columns //= p.C
    passes += pack(p, order, p.K)
    weight = p.D * p.K * p.compute_dtype.itemsize
    written = p.B * p.C * p.F * p.H * p.W * p.image_dtype.itemsize
    tile = f"tiles of {c.BM}×{c.BN}×{c.BK}, {launch.grid} programs over {M} cells of {columns} pixels"
    passes.append(Pass("images' gradient", dY + weight, written, 2 * p.B * p.N * p.K * p.D))
    return Algorithm(tuple(passes), note=tile)
