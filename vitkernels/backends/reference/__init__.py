"""The definition: what a patch embedding is, in plain PyTorch, for any device and dtype.

    out[:, :T] = prefix                          + pos_embed[:T]    where pos_embed has T+N rows
    out[:, T:] = patches(images) · Wᵀ + bias     + pos_embed[-N:]   of every patch, or of those in keep

It is evaluated piece by piece (unfold.py). Gradients by the same formulas: gradients.py.
"""

from __future__ import annotations

import os
from functools import lru_cache

import torch
import torch.nn.functional as F

from ...problem import PatchProblem, in_grid
from ..common import empty
from .gradients import backward as backward
from .unfold import columns_of, is_small, linear_of, pieces


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
    dtype = product_dtype(p)
    keep, outside = in_grid(p, keep)
    if pos_embed is not None and pos_embed.ndim == 2:
        pos_embed = pos_embed[None]
    out = empty(images, p.out_shape, p.out_dtype)
    if prefix is not None:
        first = out.narrow(1, 0, p.T)
        if pos_embed is None or p.pos_rows == p.N:
            first.copy_(prefix)
        else:
            torch.add(prefix.to(p.sum_dtype), pos_embed.narrow(1, 0, p.T).expand(p.B, -1, -1), out=first)
    W = weight.reshape(p.D, p.K).to(dtype).contiguous()  # oneDNN reads past the strides of either
    columns = columns_of(p, dtype)
    if columns > p.K:
        W = F.pad(W, (0, columns - p.K))
    bias = bias if bias is None else bias.to(dtype).contiguous()
    for b, n, x in pieces(p, images, keep, dtype, columns):  # x [b·n, K, or more with zeros]
        tokens = out.narrow(1, p.T + n.start, n.stop - n.start)  # [b, n, D]
        if b.stop - b.start < p.B:
            tokens = tokens[b]
        positions = None if pos_embed is None else _positions(p, pos_embed, b, n, keep)
        if positions is not None and dtype == p.out_dtype and is_small(p, b, n, dtype):
            if bias is None:
                tokens.copy_(positions)
            else:
                torch.add(positions, bias, out=tokens)
            tokens.squeeze(0).addmm_(x, W.t())
        else:
            _add(linear_of(p.on_cpu, dtype)(x, W, bias), positions, tokens)
    if outside is not None:
        out[:, p.T :].masked_fill_(outside[:, :, None], float("nan"))
    return out


def _add(products: torch.Tensor, positions: torch.Tensor | None, tokens: torch.Tensor) -> None:
    products = products.view(tokens.shape)
    if positions is None:
        tokens.copy_(products)
    elif products.dtype == tokens.dtype:
        torch.add(products, positions, out=tokens)
    else:  # into another dtype, it would make the sum aside first
        tokens.copy_(products.add_(positions))


def _positions(p, pos_embed, b: slice, n: slice, keep) -> torch.Tensor:
    """What is added to the tokens of one piece, [1|b, n, D]."""
    first = p.pos_rows - p.N
    if p.pos_per_image:
        pos_embed = pos_embed[b]
    if keep is None:
        return pos_embed.narrow(1, first + n.start, n.stop - n.start)
    pos, kept = pos_embed[:, first:], keep[b, n].long()  # [1|b, N, D], [b, n]
    if not p.pos_per_image:
        return pos[0].index_select(0, kept.reshape(-1)).view(*kept.shape, p.D)
    return pos[torch.arange(pos.shape[0], device=pos.device)[:, None], kept]


def product_dtype(p: PatchProblem) -> torch.dtype:
    """The operands' dtype: a CPU without instructions for bf16 (any, for fp16) multiplies halves faster as fp32."""
    native = p.compute_dtype == torch.bfloat16 and p.out_dtype.itemsize == 2 and _has_bf16()
    if p.on_cpu and not native:
        return p.sum_dtype
    return p.compute_dtype


@lru_cache(maxsize=1)
def _has_bf16() -> bool:
    """Whether oneDNN has bf16 instructions: the CPU's, unless the environment takes them away."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    older = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")
    return torch.cpu._is_avx512_bf16_supported() and limit not in older
