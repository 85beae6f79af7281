"""The definition: what a patch embedding is, in plain PyTorch, for any device and dtype.

    out[:, :T] = prefix                          + pos_embed[:T]    where pos_embed has T+N rows
    out[:, T:] = patches(images) · Wᵀ + bias     + pos_embed[-N:]   of every patch, or of those in keep

It is evaluated piece by piece (unfold.py). Gradients by the same formulas: gradients.py.
"""

from __future__ import annotations

import torch

from ...problem import PatchProblem, in_grid
from ..common import empty
from .gradients import backward as backward
from .products import packed, product_dtype
from .unfold import Way, pieces, way_of


def why_not(p: PatchProblem) -> list[str]:
    return []  # it is the definition: it takes every problem


def how(p: PatchProblem) -> str:
    return f"multiplying in {str(product_dtype(p)).removeprefix('torch.')}, piece by piece"


def forward(
    p: PatchProblem,
    images: torch.Tensor,  # [B, C, F, H, W], or without F
    weight: torch.Tensor,  # [D, C, P_t, P_h, P_w], or without P_t
    bias: torch.Tensor | None,  # [D]
    pos_embed: torch.Tensor | None,  # [1|B, N|T+N, D], or without 1
    prefix: torch.Tensor | None,  # [1|B, T, D], or without 1
    keep: torch.Tensor | None,  # [B, N_keep]
) -> torch.Tensor:  # [B, T+N, D]
    keep, outside = in_grid(p, keep)
    way = way_of(p)
    if way.p.C < p.C:
        weight = weight.movedim(1, -1)
        images = images.as_strided((p.B, 1, p.F, p.H, way.p.W), way.p.image_strides)
    p = way.p
    own = table = None  # what is added to the prefix [(1|B,) T, D], and to the patches [(1|B,) N, D]
    if pos_embed is not None:
        own, table = pos_embed.split_with_sizes((p.pos_rows - p.N, p.N), -2)
    W, bias, table = _operands(way, weight, bias, table)
    if way.packs:
        W = packed(W, way.images[0].stop * way.spans[0].stop)
    if way.is_all:
        ((b, n, x),) = pieces(way, images, keep)  # x [B·N, columns]
        out = way.linear(x, W, bias).resize_(p.out_shape)  # a view could not be changed in place where it is learnt
        if table is not None:
            out.add_(_positions(p, table, b, n, keep))
        patches = out
    else:
        out = empty(images, p.out_shape, p.out_dtype)
        first, patches = out.split_with_sizes((p.T, p.rows), 1)
        is_one = len(way.images) * len(way.spans) == 1
        for b, n, x in pieces(way, images, keep):  # x [b·n or b·(T+N), columns]
            tokens = patches if is_one else patches[b, n]  # [b, n, D]
            positions = None if table is None else _positions(p, table, b, n, keep)
            if way.room or (way.in_place and tokens.is_contiguous()):
                here = (out[b] if way.room else tokens).view(-1, p.D)
                torch.mm(x, W.t(), out=here) if bias is None else torch.addmm(bias, x, W.t(), out=here)
                if positions is not None:
                    tokens.add_(positions)
            elif positions is not None and way.is_small:
                if bias is None:
                    tokens.copy_(positions)
                else:
                    torch.add(positions, bias, out=tokens.view(positions.shape))
                tokens.squeeze(0).addmm_(x, W.t())
            else:
                _add(way.linear(x, W, bias), positions, tokens)
    if prefix is not None and p.T:
        if own is None or p.pos_rows == p.N:
            first.copy_(prefix)
        else:
            if prefix.dtype != p.out_dtype:
                prefix = prefix.to(p.sum_dtype)  # the sum is rounded once
            torch.add(prefix, own.expand(p.B, -1, -1), out=first)
    if outside is not None:
        patches.masked_fill_(outside[:, :, None], float("nan"))
    return out


def _operands(way: Way, weight, bias, table) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """W [D, columns], bias [D], and what is added to the patches [(1|B,) N, D], as `way` multiplies and adds them."""
    p, dtype = way.p, way.dtype
    W = weight.view(p.D, p.K) if weight.is_contiguous() else weight.reshape(p.D, p.K)
    if way.columns > p.K:
        narrow, W = W, empty(weight, (p.D, way.columns), dtype)
        W[:, : p.K].copy_(narrow)
        W[:, p.K :].zero_()
    elif W.dtype != dtype or not W.is_contiguous():
        W = W.to(dtype).contiguous()  # oneDNN reads past the strides of this and the bias
    if bias is not None and not (bias.dtype == dtype and bias.is_contiguous()):
        bias = bias.to(dtype).contiguous()
    if p.on_cpu and table is not None and table.dtype != dtype == p.out_dtype:  # a sum of two dtypes takes 25 × as long
        table = table.to(dtype)
    if not way.in_place or bias is None:
        return W, bias, table
    if dtype == torch.bfloat16:
        W[:, p.K] = bias  # times the ones in the patches' column: rounded with the product, as others round it
    elif way.has_bias_in_table:
        table = bias.expand(p.N, p.D) if table is None else table + bias
    else:
        return W, bias, table
    return W, None, table


def _add(products: torch.Tensor, positions: torch.Tensor | None, tokens: torch.Tensor) -> None:
    n = tokens.shape[:2].numel()
    products = (products if len(products) == n else products[:n]).view(tokens.shape)
    if positions is None:
        tokens.copy_(products)
    elif products.dtype == tokens.dtype:
        torch.add(products, positions, out=tokens)
    elif products.dtype.itemsize < tokens.dtype.itemsize:
        tokens.copy_(products).add_(positions)
    else:  # into another dtype, it would make the sum aside first
        tokens.copy_(products.add_(positions))


def _positions(p, table, b: slice, n: slice, keep) -> torch.Tensor:
    """What is added to the tokens of one piece, [(1|b,) n, D]."""
    if p.pos_per_image:
        table = table[b]
    if keep is None:
        return table if n.stop - n.start == p.N else table.narrow(-2, n.start, n.stop - n.start)
    kept = keep[b, n].long()  # [b, n]
    if not p.pos_per_image:
        return table.view(p.N, p.D).index_select(0, kept.reshape(-1)).view(*kept.shape, p.D)
    return table[torch.arange(table.shape[0], device=table.device)[:, None], kept]
