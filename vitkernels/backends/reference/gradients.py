"""The gradients of the definition (__init__.py), by the same formulas, summed in fp32 (fp64 for fp64).

No atomics: the same inputs give the same bits.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
import torch.nn.functional as F

from ...problem import PatchProblem
from ..common import Grads, canonical, centred, each_or_sum, masked, position, scattered
from .unfold import images_at_once, linear_of, padded, pieces, product, windows


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
        shared = grad.sum(0, keepdim=True, dtype=p.sum_dtype)
    if d_pos is not None:
        position(p, grad if p.pos_per_image else shared, index, d_pos)
    if d_prefix is not None:
        each_or_sum(p, (grad if d_prefix.shape[0] > 1 else shared)[:, : p.T], d_prefix)
    if d_bias is not None:
        d_bias.copy_(shared[:, p.T :].sum(0, dtype=p.sum_dtype).sum(0))


def _weight(p, d_tokens, images, keep, out) -> None:
    (_weight_on_cpu if p.device.type == "cpu" else _weight_on_gpu)(p, d_tokens, images, keep, out)


def _weight_on_cpu(p, d_tokens, images, keep, out) -> None:
    dtype = p.sum_dtype
    total, buffer = images.new_zeros((p.D, p.K), dtype=dtype), None
    linear = linear_of(p.device.type, dtype)
    for b, n, x in pieces(p, images, keep, dtype, upright=True):  # x [K, b·n]
        dy = d_tokens[b, n].flatten(0, 1).t()  # [D, b·n]
        if buffer is None:  # the first piece is the largest
            buffer = x.new_empty(dy.numel())
        total += linear(buffer[: dy.numel()].view(dy.shape).copy_(dy), x, None)
    out.copy_(total.view(out.shape))


def _weight_on_gpu(p, d_tokens, images, keep, out) -> None:
    """In the product's own dtype, from rows as they are read: a transposed copy would cost more than the product."""
    dtype, total = p.sum_dtype, None
    for b, n, x in pieces(p, images, keep, p.compute_dtype):  # x [b·n, K, or more with zeros]
        dy = d_tokens[b, n].reshape(-1, p.D).to(p.compute_dtype)
        part = product(dy.t(), x, dtype)
        total = part if total is None else total.add_(part)
    if total is None:
        out.zero_()
    else:
        out.copy_(total[:, : p.K].reshape(out.shape))


def _images(p, d_tokens, weight, keep, out) -> None:
    dtype = p.sum_dtype
    gpu = p.device.type != "cpu"
    W = weight.reshape(p.D, p.K).to(p.compute_dtype if gpu else dtype)
    more = 0 if gpu else padded(p.D, "cpu", dtype) - p.D
    W = W.contiguous() if gpu else F.pad(W.t(), (0, more)) if more else W.t().contiguous()
    linear = linear_of(p.device.type, dtype)
    if keep is not None:
        d_tokens = scattered(p, d_tokens, keep, per_image=True)
    size = [s + 2 * pad for s, pad in zip((p.F, p.H, p.W), p.pad, strict=True)]
    raw = replace(p, n_keep=None, pad=(0, 0, 0), F=size[0], H=size[1], W=size[2])
    overlap = [-(-P // S) for P, S in zip(p.P, p.S, strict=True)]  # windows that share a pixel, (t, y, x)
    each = images_at_once(p)
    for first in range(0, p.B, each):
        b = slice(first, min(first + each, p.B))
        d_image = out.new_zeros((b.stop - b.start, p.C, *size), dtype=dtype)
        grid = windows(raw, d_image)  # [b, G_t, G_h, G_w, C, P_t, P_h, P_w], a view
        dy = d_tokens[b].reshape(-1, p.D).to(W.dtype)
        dy = F.pad(dy, (0, more)) if more else dy
        d_x = (product(dy, W, dtype) if gpu else linear(dy.contiguous(), W, None)).view(grid.shape)
        if p.normalised:
            d_x *= centred(p, dtype)[1].view(p.C, 1, 1, 1)
        elif p.scale != 1:
            d_x *= p.scale
        for corner in itertools.product(
            *map(range, overlap)
        ):  # windows `overlap` apart share no pixel: one such set at a time
            apart = (slice(None), *(slice(f, None, o) for f, o in zip(corner, overlap, strict=True)))
            grid[apart].add_(d_x[apart])
        inner = (slice(None), slice(None), *(slice(n, n + s) for n, s in zip(p.pad, (p.F, p.H, p.W), strict=True)))
        out[b] = d_image[inner]
