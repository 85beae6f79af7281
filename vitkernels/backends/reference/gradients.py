"""The gradients of the definition (__init__.py), by the same formulas, summed in fp32 (fp64 for fp64).

No atomics: the same inputs give the same bits.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
import torch.nn.functional as F

from ...problem import PatchProblem
from ..common import Grads, canonical, centred, each_or_sum, empty, masked, position, scattered
from .products import add_product, is_zen5s, mkl_is_slow, padded, padded_rows, product, product_dtype
from .unfold import copy_lines, images_at_once, pieces, way_of, windows

SUMMED_AT_ONCE = 1_250_000  # elements of tokens' gradients: eight images of ViT-B/16
AT_ONCE_BYTES = 256 << 20  # of patches and tokens' gradient in bfloat16, at most, whose product is not cut in pieces


def backward(
    p: PatchProblem,
    grad: torch.Tensor,  # [B, T+N, D]
    images: torch.Tensor,  # [B, C, F, H, W]
    weight: torch.Tensor,  # [D, C, P_t, P_h, P_w]
    bias: torch.Tensor | None,  # [D]
    pos_embed: torch.Tensor | None,  # [1|B, N|T+N, D]
    prefix: torch.Tensor | None,  # [1|B, T, D]
    keep: torch.Tensor | None,  # [B, N_keep]
    grads: Grads,  # of images, weight, bias, pos_embed and prefix, to be written; None: nobody asks
) -> None:
    images, weight, _, _, _, keep = canonical(images, weight, None, None, None, keep)
    d_images, d_weight, d_bias, d_pos, d_prefix, _ = canonical(*grads)
    grad, index = masked(p, grad, keep)
    if d_images is not None:
        _images(p, grad[:, p.T :], weight, index, d_images)
    if d_weight is not None:
        _weight(p, grad[:, p.T :], images, index, d_weight)
    shared = grad  # what tables of all images are summed from: where no patch moves, the sum over images, made once
    if index is None and any(g is not None for g in (d_pos, d_prefix, d_bias)):
        shared = _sum_of_images(p, grad)
    if d_pos is not None:
        position(p, grad if p.pos_per_image else shared, index, d_pos)
    if d_prefix is not None:
        each_or_sum(p, (grad if d_prefix.shape[0] > 1 else shared)[:, : p.T], d_prefix)
    if d_bias is not None:
        d_bias.copy_((shared if index is None else _sum_of_images(p, grad))[0, p.T :].sum(0))


def _sum_of_images(p, grad) -> torch.Tensor:  # [1, T+N, D]
    """On a CPU PyTorch converts what it sums before it does: some images at a time, that the caches hold. 32 of
    ViT-B/16 in bfloat16 take 1,110 µs together and 620 by eights (2 cores of an AMD EPYC, Zen 5)."""
    each = max(1, SUMMED_AT_ONCE // max(1, grad[:1].numel()))
    if not p.on_cpu or grad.dtype == p.sum_dtype or p.B <= each:
        return grad.sum(0, keepdim=True, dtype=p.sum_dtype)
    sums = (some.sum(0, keepdim=True, dtype=p.sum_dtype) for some in grad.split(each))
    total = next(sums)
    for some in sums:
        total += some
    return total


def _weight(p, d_tokens, images, keep, out) -> None:
    if not p.on_cpu:
        _weight_on_gpu(p, d_tokens, images, keep, out)
    elif product_dtype(p) == torch.bfloat16 and p.B * p.rows * (p.K + p.D) * 2 <= AT_ONCE_BYTES:
        _weight_at_once(p, d_tokens, images, keep, out)
    else:
        _weight_on_cpu(p, d_tokens, images, keep, out)


def _weight_at_once(p, d_tokens, images, keep, out) -> None:
    """By one product in bf16, which sums in fp32 and rounds once: a sum of several would be rounded in each."""
    dtype = torch.bfloat16
    way = way_of(p, dtype)._replace(as_they_are=False)
    n = p.B * p.rows
    x, dy = (empty(images, (padded(n, True, dtype), columns), dtype) for columns in (way.columns, p.D))
    x[:, p.K :].zero_()
    x[n:].zero_()
    dy[n:].zero_()
    for _ in pieces(way, images, keep, x):
        pass
    dy[:n].view(d_tokens.shape).copy_(d_tokens)
    if out.dtype == dtype and out.is_contiguous() and way.columns == p.K:
        torch.mm(dy.t(), x, out=out.view(p.D, p.K))
    else:
        out.copy_(torch.mm(dy.t(), x)[:, : p.K].reshape(out.shape))


def _weight_on_cpu(p, d_tokens, images, keep, out) -> None:
    """Each piece's product is added to one sum. It lies as [K, D] where rows of K would begin anywhere and MKL
    multiplies, which they take a tenth longer."""
    dtype, buffer = p.sum_dtype, None
    way = way_of(p, dtype)
    columns = way.columns
    in_rows = columns % 16 == 0 or mkl_is_slow(dtype)
    in_place = out.dtype == dtype and out.is_contiguous() and columns == p.K and in_rows
    if in_place:
        total = out.zero_().view(p.D, p.K)
    elif in_rows:
        total = images.new_zeros((p.D, columns), dtype=dtype)  # [D, K, or more with zeros]
    else:
        total = images.new_zeros((columns, p.D), dtype=dtype).t()
    for b, n, x in pieces(way, images, keep):  # x [b·n, columns]
        dy = d_tokens[b, n]
        if dy.dtype != dtype or not dy.is_contiguous():
            if buffer is None:  # the first piece is the largest
                buffer = x.new_empty(dy.numel())
            dy = buffer[: dy.numel()].view(dy.shape).copy_(dy)
        add_product(total, dy.view(-1, p.D), x)
    if not in_place:
        out.copy_(total[:, : p.K].reshape(out.shape))


def _weight_on_gpu(p, d_tokens, images, keep, out) -> None:
    """In the product's own dtype, from rows as they are read: a transposed copy would cost more than the product."""
    dtype, total = p.sum_dtype, None
    way = way_of(p, p.compute_dtype)
    for b, n, x in pieces(way, images, keep):  # x [b·n, columns]
        dy = d_tokens[b, n].reshape(-1, p.D).to(p.compute_dtype)
        part = product(dy.t(), x, dtype)
        total = part if total is None else total.add_(part)
    if total is None:
        out.zero_()
    else:
        out.copy_(total[:, : p.K].reshape(out.shape))


def _images(p, d_tokens, weight, keep, out) -> None:
    apart = not any(p.pad) and all(s >= n for s, n in zip(p.S, p.P, strict=True))  # a pixel is in one patch at most
    once = apart and not p.normalised and p.scale == 1  # the product is the gradient, and may be rounded
    dtype = product_dtype(p) if p.on_cpu and once else p.sum_dtype
    W = weight.reshape(p.D, p.K).to(dtype if p.on_cpu else p.compute_dtype).contiguous()
    more = padded(p.D, True, dtype) - p.D if p.on_cpu else 0
    W = F.pad(W, (0, 0, 0, more)) if more else W
    if keep is not None:
        d_tokens = scattered(p, d_tokens, keep, per_image=True)
    if apart and p.N * p.K < p.C * p.F * p.H * p.W:
        out.zero_()
    each = images_at_once(p)
    for first in range(0, p.B, each):
        b = slice(first, min(first + each, p.B))
        dy = d_tokens[b].reshape(-1, p.D).to(W.dtype)
        rows = len(dy)
        below = padded_rows(rows) - rows if p.on_cpu and is_zen5s(dtype) else 0
        d_x = product(F.pad(dy, (0, more, 0, below)) if more or below else dy, W, dtype)
        d_x = d_x[:rows].view(-1, *p.G, p.C, *p.P)
        if p.normalised:
            d_x *= centred(p, dtype)[1].view(p.C, 1, 1, 1)
        elif p.scale != 1:
            d_x *= p.scale
        if apart:
            copy_lines(windows(p, out[b]), d_x)
        else:
            out[b] = _overlapped(p, d_x)


def _overlapped(p: PatchProblem, d_x: torch.Tensor) -> torch.Tensor:  # [b, G_t, G_h, G_w, C, P_t, P_h, P_w]
    """The images' gradient [b, C, F, H, W] where patches share pixels or hang over the edge."""
    size = [s + 2 * pad for s, pad in zip((p.F, p.H, p.W), p.pad, strict=True)]
    raw = replace(p, pad=(0, 0, 0), F=size[0], H=size[1], W=size[2])
    d_image = d_x.new_zeros((d_x.shape[0], p.C, *size))
    grid = windows(raw, d_image)  # as d_x, a view
    overlap = [-(-P // S) for P, S in zip(p.P, p.S, strict=True)]  # windows that share a pixel, (t, y, x)
    for corner in itertools.product(*map(range, overlap)):  # windows `overlap` apart share none: one such set at a time
        some = (slice(None), *(slice(f, None, o) for f, o in zip(corner, overlap, strict=True)))
        grid[some].add_(d_x[some])
    inside = (..., *(slice(n, n + s) for n, s in zip(p.pad, (p.F, p.H, p.W), strict=True)))
    return d_image[inside]
