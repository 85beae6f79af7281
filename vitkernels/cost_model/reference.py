"""The passes of the reference on a CPU: pieces of the patch matrix that stay in the cores' caches."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from math import prod

import torch

from ..backends.reference import unfold
from ..problem import PatchProblem
from .traffic import INDEX, Algorithm, Pass, Sizes


def forward(p: PatchProblem) -> Algorithm:
    """Memory as ever; `requested` is what the operators of all pieces read and write, most of it from the caches."""
    p = replace(p, device=torch.device("cpu"))
    sizes, way = Sizes.of(p), unfold.way_of(p)
    dtype, size, passes = way.dtype, way.dtype.itemsize, []
    weight, bias = p.D * p.K * size, p.D * size * p.has_bias
    if dtype != p.weight_dtype:
        passes.append(Pass("weight and bias to the product's dtype", sizes.weight + sizes.bias, weight + bias))
    elif way.p.C < p.C and p.weight_strides[1] != 1:
        passes.append(Pass("weight in the pixels' order", sizes.weight, weight))
    p = way.p
    prefix = p.B * p.T * p.D * p.out_dtype.itemsize
    if p.T:
        table = p.T * p.D * p.weight_dtype.itemsize * (p.pos_rows > p.N) * (p.B if p.pos_per_image else 1)
        passes.append(Pass("prefix", sizes.prefix + table, prefix))
    requests = _requests(way, weight, bias)
    first = max(0, p.pos_rows - p.N) * p.D * p.weight_dtype.itemsize * (p.B if p.pos_per_image else 1)
    read = sizes.images + weight + bias + sizes.position - first + sizes.keep
    passes.append(Pass("pieces", read, sizes.tokens - prefix, p.flops, 0, requests))
    largest = (way.images[0].stop if way.images else 0) * (way.spans[0].stop + way.room) * way.columns * size
    name = str(dtype).removeprefix("torch.")
    return Algorithm(
        tuple(passes), 0, f"{len(way.images) * len(way.spans)} pieces of {largest / 1e6:.2f} MB at most, in {name}"
    )


def _requests(way: unfold.Way, weight: int, bias: int) -> dict[str, int]:
    p, dtype = way.p, way.dtype
    s, size, w = p.image_dtype.itemsize, dtype.itemsize, p.weight_dtype.itemsize
    batches, pieces = len(way.images), len(way.images) * len(way.spans)
    elements, staged = p.B * p.rows * p.K, way.windows is None
    whole = p.B * p.C * p.F * p.H * p.W
    padded = p.B * p.C * prod(n + 2 * pad for n, pad in zip((p.F, p.H, p.W), p.pad, strict=True)) * size
    # In place: x − m and ·a with a value of each channel, or of a line where channels lie side by side; or ·scale
    turns, constants = (2, p.C) if p.normalised else (int(p.scale != 1), 0)
    if p.normalised and len(p.centred[0]) != p.C:
        constants = p.W if staged else p.P[2]
    constants *= p.sum_dtype.itemsize
    moved = elements * size if staged else elements * s
    requests = {
        "images": whole * (s + size) * staged + (whole * size + padded) * any(p.pad),
        "normalise": turns * (2 * size * (whole if staged else elements) + constants * (batches if staged else pieces)),
        "kept patches": 0 if p.n_keep is None else 2 * moved,
        "patches": 0 if way.as_they_are else moved + elements * size,
        "keep": 0 if p.n_keep is None else p.B * p.rows * INDEX,
    }
    found = Counter(requests)
    if way.has_bias_in_table and p.pos_rows:
        found["table"] = p.N * p.D * (w + size) + bias
        w = size
    for b, n in itertools.product(way.images, way.spans):
        images, rows = b.stop - b.start, n.stop - n.start
        M = images * rows * p.D
        room = images * way.room
        found["product"] += (images * rows + room) * (p.K + p.D) * size + weight
        if p.pos_rows:
            each = images if p.pos_per_image else 1
            found["position"] += each * rows * p.D * w
            if p.n_keep is not None:  # gathered first: at most the table, for each piece
                found["position"] += (M - each * rows * p.D) * w + (M + min(p.N, images * rows) * p.D) * w
        if way.in_place and (room or p.T == 0 or images == 1):
            found["product"] += bias * (not way.has_bias_in_table and dtype == torch.float32)
            found["tokens"] += 2 * M * size * (p.pos_rows > 0 or way.has_bias_in_table)
            found["position"] += bias * (way.has_bias_in_table and not p.pos_rows)
        elif way.is_all:
            found["product"] += bias
            found["tokens"] += 2 * M * size * (p.pos_rows > 0)
        elif way.is_small:
            found["product"] += M * size  # it starts at position and bias, which are added first
            found["tokens"] += bias + M * size
        else:
            found["product"] += bias * (not way.has_bias_in_table)
            found["tokens"] += M * size + M * p.out_dtype.itemsize
    return {name: n for name, n in found.items() if n}
