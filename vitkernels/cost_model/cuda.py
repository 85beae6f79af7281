"""The passes of the CUDA C++ kernels, from the very plans that run (backends/cuda/forward_plan.py, backward_plan.py),
for a dense weight and tensors that begin on 16 bytes.

Not among the requests: the constants of a normalisation, which the first-level cache has.
"""

from __future__ import annotations

from math import gcd

from ..backends.cuda import backward_plan
from ..backends.cuda.backward_operands import Grad
from ..backends.cuda.forward_loaders import BY_BLOCKS, LOADERS, STORING, shared_positions
from ..backends.cuda.forward_plan import PLAIN_TILES, Plan, candidates
from ..backends.patch_layout import layout_of, product_of
from ..gpu import Gpu
from ..problem import PatchProblem
from .traffic import Algorithm, Pass, Sizes, gathered


def algorithms(p: PatchProblem, mode: str, gpu: Gpu, tf32: bool) -> tuple[dict[str, Algorithm], dict[str, str]]:
    """Name -> algorithm on this GPU, and name -> why there is none."""
    if mode == "images":
        return {}, {"cuda": "the images' gradient is not modelled"}
    if mode == "backward":
        return {"cuda": backward(p, gpu, tf32)}, {}
    plans, reasons = candidates(p, gpu, tf32)
    found = {}
    for loader in LOADERS:
        if offered := [plan for plan in plans if plan.loader == loader]:
            found[f"cuda {loader}"] = forward(p, min(offered, key=lambda plan: plan.cost))
    return found, {f"cuda {loader}": reason for loader, reason in reasons.items()}


def forward(p: PatchProblem, plan: Plan) -> Algorithm:
    sizes, size, w = Sizes.of(p), p.compute_dtype.itemsize, p.weight_dtype.itemsize
    tiles_m = plan.tiles // plan.tiles_n
    M, pixel = p.B * p.rows, p.image_dtype.itemsize
    if plan.loader in BY_BLOCKS:
        pixels = M * p.K * pixel
    elif plan.loader == "rows":
        pixels = _image_rows(p, plan)
    else:
        pixels = gathered(p, tiles_m * plan.BM) * pixel
    span = (128 if plan.step_k * size % 128 == 0 else 32) if plan.wgmma else plan.weight_chunk
    prefixed = p.B * p.T * p.D * w
    asked = tiles_m * plan.splits // plan.cluster  # a pair of tiles asks for the weight once
    if plan.loader in STORING and shared_positions(p):  # a tile's once
        biases = positions = tiles_m * plan.block[1] * plan.block[2]
    elif plan.loader in STORING:
        biases, positions = tiles_m, M
    else:  # lanes that load the same bias for 16 staged rows; each row's own position
        biases, positions = tiles_m * plan.BM // 16 * (4 if plan.wgmma else 8), M
    requests = {
        "images": pixels * plan.tiles_n,
        "weight": asked * p.D * (-(-(plan.weight_row if plan.pack else p.K) * size // span) * span),
        "bias": biases * p.D * w * p.has_bias,
        "position": positions * p.D * w * (p.pos_rows > 0) + prefixed * (p.pos_rows > p.N),
        "prefix": prefixed,
        "tokens": sizes.tokens,
    }
    packing = [Pass("weight packed", sizes.weight, plan.scratch_bytes)] * plan.pack
    weight = p.D * plan.weight_row * size
    read = sizes.images + weight + sizes.bias + sizes.position + sizes.prefix + sizes.keep
    main = Pass(
        "patch embedding", read, sizes.tokens, p.flops * (3 if plan.tf32_terms == 2 else 1), 1,
        {name: n for name, n in requests.items() if n}, product="tf32" if plan.tf32_terms else "",
    )  # fmt: skip
    unit = "wgmma" if plan.wgmma else "multiply-adds" if plan.BM == PLAIN_TILES[0].BM else "mma"
    pairs = "pairs of " * (plan.cluster > plan.splits)
    note = f"{unit} in {pairs}tiles of {plan.BM}×{plan.BN}, {plan.tiles} by {plan.blocks} blocks"
    note += ", three products of TF32" * (plan.tf32_terms == 2)
    return Algorithm((*packing, main), 0, note + ", the weight packed first" * plan.pack)


def _image_rows(p: PatchProblem, plan: Plan) -> int:
    """Bytes of whole rows for all tiles of patches: each tile's runs of neighbours, from a multiple of `chunk` on."""
    v, chunk = layout_of(p), plan.chunk
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

    full, rest = divmod(M, plan.BM)
    period = G // gcd(G, plan.BM)
    for i in range(min(period, full)):
        total += of_tile(i * plan.BM % G, plan.BM) * -(-(full - i) // period)
    if rest:
        total += of_tile(full * plan.BM % G, rest)
    lines = p.K // v.P[2]
    if plan.step_k % v.P[2]:  # a row that two steps need is copied twice
        firsts = range(0, p.K, plan.step_k)
        lines = sum((min(k + plan.step_k, p.K) - 1) // v.P[2] - k // v.P[2] + 1 for k in firsts)
    return total * lines


def backward(p: PatchProblem, gpu: Gpu, tf32: bool) -> Algorithm:
    sizes, total = Sizes.of(p), p.sum_dtype.itemsize
    pos = p.pos_rows > 0 and not p.pos_per_image
    plan = backward_plan.make_plan(
        p, gpu, tf32, 0, Grad(0, ((p.T + p.rows) * p.D, p.D, 1)), weight=True, bias=p.has_bias, pos=pos,
        prefix=p.T > 0, images=None,
    )  # fmt: skip
    weight, sums = plan.weight, plan.sums
    assert weight is not None
    weight_parts, table_parts = weight.splits * p.D * p.K * total, 0
    index = (p.B * p.N + p.B * p.rows) * 4 * plan.indexed
    passes = [Pass("index of the kept patches", sizes.keep, index)] * plan.indexed
    if p.pos_per_image:
        one = p.B * p.rows * p.D * p.out_dtype.itemsize
        passes.append(Pass("position gradients, one by one", one, sizes.position))
    # Of each piece's images but the first's, the parts are read and written once more.
    pieces, copies = -(-p.B // plan.piece), p.B * p.rows * plan.copy_row * p.compute_dtype.itemsize
    if sums:
        table_parts = (sums.splits * sums.table_rows + sums.splits * sums.blocks * p.has_bias) * p.D * total
        read, written = sizes.tokens + index + (pieces - 1) * table_parts, pieces * table_parts + copies
        passes.append(Pass("sums over images" + " and copies of dY" * (copies > 0), read, written, 0, pieces))
    read = sizes.images + (copies or sizes.tokens) + sizes.keep + (pieces - 1) * weight_parts
    passes.append(Pass("parts of dW", read, pieces * weight_parts, p.flops, pieces))
    w = p.weight_dtype.itemsize
    written = sizes.weight + sizes.bias + (p.pos_rows * pos + p.T) * p.D * w
    passes.append(Pass("sum of the parts", weight_parts + table_parts, written))
    by_warps = "tensor cores by warp" if product_of(p, tf32) in ("half", "tf32") else "multiply-adds"
    unit = "wgmma" if weight.wgmma else by_warps
    note = f"{unit}, {weight.tiles} tiles of dW in {weight.splits} parts"
    return Algorithm(tuple(passes), 0, note + f", {plan.piece} images at a time" * (pieces > 1))
