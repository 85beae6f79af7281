"""The passes of the reference on a CPU: pieces of the patch matrix that stay in the cores' caches."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch

from ..backends import reference
from ..backends.reference import unfold
from ..problem import PatchProblem
from .traffic import INDEX, Algorithm, Pass, Sizes


def forward(p: PatchProblem) -> Algorithm:
    """Memory as ever; `requested` is what the operators of all pieces read and write, most of it from the caches."""
    p = replace(p, device=torch.device("cpu"))
    sizes, dtype = Sizes.of(p), reference.product_dtype(p)
    size, passes = dtype.itemsize, []
    weight, bias = p.D * p.K * size, p.D * size * p.has_bias
    if dtype != p.weight_dtype:
        passes.append(Pass("weight and bias to the product's dtype", sizes.weight + sizes.bias, weight + bias))
    prefix = p.B * p.T * p.D * p.out_dtype.itemsize
    if p.T:
        table = p.T * p.D * p.weight_dtype.itemsize * (p.pos_rows > p.N) * (p.B if p.pos_per_image else 1)
        passes.append(Pass("prefix", sizes.prefix + table, prefix))
    step, spans = unfold._cut(p, unfold._piece_rows(p, dtype, torch.get_num_threads()))
    batches = -(-p.B // max(1, step)) if p.rows else 0
    requests = _requests(p, dtype, step, spans, batches, weight, bias)
    first = max(0, p.pos_rows - p.N) * p.D * p.weight_dtype.itemsize * (p.B if p.pos_per_image else 1)
    read = sizes.images + weight + bias + sizes.position - first + sizes.keep
    passes.append(Pass("pieces", read, sizes.tokens - prefix, p.flops, 0, requests))
    largest = min(step, p.B) * max(n.stop - n.start for n in spans) * p.K * size
    name = str(dtype).removeprefix("torch.")
    return Algorithm(tuple(passes), 0, f"{batches * len(spans)} pieces of {largest / 1e6:.2f} MB at most, in {name}")


def _requests(
    p: PatchProblem, dtype, step: int, spans: list[slice], batches: int, weight: int, bias: int
) -> dict[str, int]:
    s, size, pieces = p.image_dtype.itemsize, dtype.itemsize, batches * len(spans)
    elements, M, taken = p.B * p.rows * p.K, p.B * p.rows * p.D, p.B * p.rows * INDEX
    staged = unfold.is_staged(p, spans)
    whole = p.B * p.C * p.F * p.H * p.W
    padded = p.B * p.C * prod(n + 2 * pad for n, pad in zip((p.F, p.H, p.W), p.pad, strict=True)) * size
    # In place: x − m and ·a with a value of each channel, or ·scale
    turns, constants = (2, p.C * p.sum_dtype.itemsize) if p.normalised else (int(p.scale != 1), 0)
    moved = elements * size if staged else elements * s
    requests = {
        "images": whole * (s + size) * staged + (whole * size + padded) * any(p.pad),
        "normalise": turns * (2 * size * (whole if staged else elements) + constants * (batches if staged else pieces)),
        "kept patches": 0 if p.n_keep is None else 2 * moved,
        "patches": 0 if unfold.is_matrix(p, dtype, spans) else moved + elements * size,
        "product": elements * size + pieces * (weight + bias) + M * size,
        "tokens": M * size + M * p.out_dtype.itemsize,
    }
    if p.pos_rows and dtype == p.out_dtype:  # where the sum starts at position and bias, which are added first
        alone = batches if step == 1 or p.B == 1 else int(p.B % step == 1)
        few = [n.stop - n.start for n in spans if unfold.is_small(p, slice(0, 1), n, dtype)] * alone
        Ms = sum(few) * p.D
        requests["product"] += Ms * size - len(few) * bias
        requests["tokens"] += len(few) * bias - Ms * p.out_dtype.itemsize
    if p.pos_rows:
        w, per_batch = p.weight_dtype.itemsize, p.B if p.pos_per_image else batches
        kept = 0
        if p.n_keep is not None:  # gathered first: at most the table, for each piece
            each = [min(p.N, min(step, p.B) * (n.stop - n.start)) for n in spans]
            kept = M * w + batches * sum(each) * p.D * w
        requests["position"] = M * w + kept if p.n_keep is not None else per_batch * p.rows * p.D * w
    return {name: n for name, n in requests.items() if n} | ({"keep": taken} if p.n_keep is not None else {})
