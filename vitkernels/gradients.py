"""The gradients of the definition (reference.py), by the same formulas, summed in fp32 (fp64 for fp64).

No atomics: the same inputs give the same bits.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import torch

from .problem import PatchProblem, in_grid
from .reference import centred, pieces, sum_dtype, windows

Needs = tuple[bool, bool, bool, bool, bool]  # images, weight, bias, pos_embed, prefix


def backward(
    p: PatchProblem,
    grad: torch.Tensor,  # [B, T+N, D]
    images: torch.Tensor,  # [B, C, F, H, W]
    weight: torch.Tensor,  # [D, C, P_t, P_h, P_w]
    bias: torch.Tensor | None,  # [D]
    pos_embed: torch.Tensor | None,  # [1|B, N|T+N, D]
    prefix: torch.Tensor | None,  # [1|B, T, D]
    keep: torch.Tensor | None,  # [B, N_keep]
    needs: Needs,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of images, weight, bias, pos_embed and prefix, each in its input's shape and dtype."""
    dtype = sum_dtype(p)
    d_prefix, d_tokens = grad[:, : p.T], grad[:, p.T :]
    keep, outside = in_grid(p, keep)
    if outside is not None:
        d_tokens = d_tokens.masked_fill(outside[:, :, None], 0)
    return (
        _d_images(p, d_tokens, images, weight, keep) if needs[0] else None,
        _d_weight(p, d_tokens, images, weight, keep) if needs[1] else None,
        d_tokens.sum((0, 1), dtype=dtype).to(bias.dtype) if needs[2] and bias is not None else None,
        _d_pos_embed(p, d_prefix, d_tokens, pos_embed, keep) if needs[3] and pos_embed is not None else None,
        _per_image_or_sum(d_prefix, prefix, dtype) if needs[4] and prefix is not None else None,
    )


def _d_weight(p, d_tokens, images, weight, keep) -> torch.Tensor:
    dtype = sum_dtype(p)
    total = images.new_zeros((p.D, p.K), dtype=dtype)
    for b, n, x in pieces(p, images, keep, dtype):  # x [b·n, K]
        total.addmm_(d_tokens[b, n].to(dtype).reshape(-1, p.D).t(), x)
    return total.view(weight.shape).to(weight.dtype)


def _d_pos_embed(p, d_prefix, d_tokens, pos_embed, keep) -> torch.Tensor:
    dtype = sum_dtype(p)
    if keep is not None:
        d_tokens = _scattered(p, d_tokens, keep, per_image=p.pos_per_image)
    parts = (d_prefix, d_tokens)
    table = torch.cat([g.to(dtype) if p.pos_per_image else g.sum(0, keepdim=True, dtype=dtype) for g in parts], 1)
    return table[:, table.shape[1] - p.pos_rows :].to(pos_embed.dtype).contiguous()


def _d_images(p, d_tokens, images, weight, keep) -> torch.Tensor:
    dtype = sum_dtype(p)
    W = weight.reshape(p.D, p.K).to(dtype)
    if keep is not None:
        d_tokens = _scattered(p, d_tokens, keep, per_image=True)
    size = [s + 2 * pad for s, pad in zip((p.F, p.H, p.W), p.pad, strict=True)]
    raw = replace(p, n_keep=None, pad=(0, 0, 0), F=size[0], H=size[1], W=size[2])
    overlap = [-(-P // S) for P, S in zip(p.P, p.S, strict=True)]  # windows that share a pixel, (t, y, x)
    out = torch.empty(images.shape, dtype=images.dtype, device=images.device)
    for b in range(p.B):
        d_image = images.new_zeros((1, p.C, *size), dtype=dtype)
        grid = windows(raw, d_image)  # [1, G_t, G_h, G_w, C, P_t, P_h, P_w], a view
        d_x = (d_tokens[b].to(dtype) @ W).view(grid.shape)
        if p.normalised:
            d_x *= centred(p, dtype)[1].view(p.C, 1, 1, 1)
        elif p.scale != 1:
            d_x *= p.scale
        for first in product(*map(range, overlap)):  # windows `overlap` apart share no pixel: one such set at a time
            apart = (slice(None), *(slice(f, None, o) for f, o in zip(first, overlap, strict=True)))
            grid[apart].add_(d_x[apart])
        inner = (0, slice(None), *(slice(pad, pad + s) for pad, s in zip(p.pad, (p.F, p.H, p.W), strict=True)))
        out[b] = d_image[inner]
    return out


def _scattered(p, d_tokens, keep, *, per_image: bool) -> torch.Tensor:
    """Gradients of the kept patches at their place among all N, [B|1, N, D]; a patch kept twice is added twice."""
    images = p.B if per_image else 1
    index = keep.long()
    if per_image:
        index = index + torch.arange(p.B, device=index.device)[:, None] * p.N
    total = d_tokens.new_zeros((images * p.N, p.D), dtype=sum_dtype(p))
    source, index = d_tokens.to(total.dtype).reshape(-1, p.D), index.reshape(-1)
    # Each is the deterministic one on its device: index_add_ is atomic on a GPU, index_put_ on many CPU threads.
    if total.is_cuda:
        total.index_put_((index,), source, accumulate=True)
    else:
        total.index_add_(0, index, source)
    return total.view(images, p.N, p.D)


def _per_image_or_sum(d_prefix, prefix, dtype) -> torch.Tensor:
    if prefix.shape[0] == 1:
        return d_prefix.sum(0, keepdim=True, dtype=dtype).to(prefix.dtype)
    return d_prefix.to(prefix.dtype, copy=True).contiguous()
