"""The definition: what a patch embedding is, in plain PyTorch, for any device and dtype.

    out[:, :T] = prefix                          + pos_embed[:T]    where pos_embed has T+N rows
    out[:, T:] = patches(images) · Wᵀ + bias     + pos_embed[-N:]   of every patch, or of those in keep

It is evaluated piece by piece, so that one piece's patches stay in the cache (CPU) or in a bounded buffer (GPU);
the pieces are all that is here for speed. Gradients by the same formulas: gradients.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F

from .problem import PatchProblem


def why_not(p: PatchProblem) -> list[str]:
    return []  # it is the definition: it takes every problem


def forward(
    p: PatchProblem,
    images: torch.Tensor,  # [B, C, F, H, W]
    weight: torch.Tensor,  # [D, C, P_t, P_h, P_w]
    bias: torch.Tensor | None,  # [D]
    pos_embed: torch.Tensor | None,  # [1|B, N|T+N, D]
    prefix: torch.Tensor | None,  # [1|B, T, D]
    keep: torch.Tensor | None,  # [B, N_keep]
) -> torch.Tensor:  # [B, T+N, D]
    dtype = product_dtype(p)
    out = images.new_empty(p.out_shape, dtype=p.out_dtype)
    if prefix is not None:
        extra = pos_embed[:, : p.T] if pos_embed is not None and p.pos_rows > p.N else prefix.new_zeros(())
        out[:, : p.T] = prefix.to(sum_dtype(p)) + extra
    W = weight.reshape(p.D, p.K).to(dtype).t()  # [K, D]
    shared: dict[tuple[int, int], torch.Tensor | None] = {}  # bias + position of a piece, where images share it
    for b, n, x in pieces(p, images, keep, dtype):  # x [b·n, K]
        tokens = out[b, p.T + n.start : p.T + n.stop]  # [b, n, D]
        images_here, rows_here = tokens.shape[:2]
        if p.pos_per_image or (keep is not None and p.pos_rows):
            base = _base(p, bias, pos_embed, b, n, keep, dtype)
        else:
            key = (images_here, n.start)
            if key not in shared:
                shared[key] = _base(p, bias, pos_embed, slice(0, images_here), n, None, dtype)
            base = shared[key]
        in_place = dtype == p.out_dtype and (images_here == 1 or p.T + p.rows == rows_here)
        y = tokens.view(-1, p.D) if in_place else x.new_empty(x.shape[0], p.D)
        torch.mm(x, W, out=y) if base is None else torch.addmm(base, x, W, out=y)
        if not in_place:
            tokens.copy_(y.view(tokens.shape))
    return out


def _base(p, bias, pos_embed, b: slice, n: slice, keep, dtype: torch.dtype) -> torch.Tensor | None:
    """What is added to the product of one piece: bias + position, [b·n, D], the bias alone, [D], or nothing."""
    if pos_embed is None:
        return None if bias is None else bias.to(dtype)
    pos = pos_embed[:, p.pos_rows - p.N :]  # [1|B, N, D]
    images_here = b.stop - b.start
    if p.pos_per_image:
        pos = pos[b]
    if keep is not None:
        index = keep[b, n].long()
        pos = pos[torch.arange(pos.shape[0], device=pos.device)[:, None], index]
    else:
        pos = pos[:, n]
    pos = pos.to(sum_dtype(p))
    base = (pos if bias is None else pos + bias).to(dtype)
    return base.expand(images_here, -1, -1).reshape(-1, p.D)


def pieces(
    p: PatchProblem, images: torch.Tensor, keep: torch.Tensor | None, dtype: torch.dtype
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Images b, patches n of each, and their normalised pixels [b·n, K]. The buffer is reused by the next piece."""
    image_bytes = max(1, p.rows * p.K * dtype.itemsize)
    step = max(1, _piece_bytes(p.device.type) // image_bytes)
    lines = p.rows if keep is not None else p.G[1]  # what a large image is cut along: its kept patches, or grid rows
    cut = max(1, lines * _piece_bytes(p.device.type) // (image_bytes if keep is not None else image_bytes // p.G[0]))
    line = 1 if keep is not None else p.G[2]
    spans = [slice(0, p.rows)]
    if image_bytes > _piece_bytes(p.device.type):
        frames = 1 if keep is not None else p.G[0]
        spans = [
            slice((t * lines + y) * line, (t * lines + min(y + cut, lines)) * line)
            for t in range(frames)
            for y in range(0, lines, cut)
        ]
    buffer = None
    for first in range(0, p.B if p.rows else 0, step):
        b = slice(first, min(first + step, p.B))
        grid = windows(p, images[b], dtype)  # [b, G_t, G_h, G_w, C, P_t, P_h, P_w]
        for n in spans:
            part = _part(p, grid, n, None if keep is None else keep[b, n])
            if buffer is None:
                buffer = images.new_empty(part.numel(), dtype=dtype)
            x = buffer[: part.numel()].view(part.shape)
            x.copy_(part)
            if not any(p.pad):
                _normalise(p, x, 3)
            yield b, n, x.view(-1, p.K)


def windows(p: PatchProblem, images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A view of the images' patches, [b, G_t, G_h, G_w, C, P_t, P_h, P_w]; zeros are padded to normalised pixels."""
    if any(p.pad):
        images = _normalise(p, images.to(dtype, copy=True), 3)
        images = F.pad(images, [size for pad in reversed(p.pad) for size in (pad, pad)])
    for dim, (P, S) in enumerate(zip(p.P, p.S, strict=True), start=2):
        images = images.unfold(dim, P, S)
    return images.permute(0, 2, 3, 4, 1, 5, 6, 7)


def _part(p: PatchProblem, grid: torch.Tensor, n: slice, keep: torch.Tensor | None) -> torch.Tensor:
    """Patches n of every image in the grid, [b, ..., C, P_t, P_h, P_w]."""
    if keep is not None:
        t, y, x = torch.unravel_index(keep.long(), p.G)
        return grid[torch.arange(grid.shape[0], device=grid.device)[:, None], t, y, x]
    if n.stop - n.start == p.N:
        return grid
    t, line = divmod(n.start // p.G[2], p.G[1])
    return grid[:, t, line : line + (n.stop - n.start) // p.G[2]]


def _normalise(p: PatchProblem, x: torch.Tensor, after: int) -> torch.Tensor:
    """(x·scale − mean)/std in place; the channel is the dimension before the last `after`."""
    if p.normalised:
        m, a = centred(p, x.dtype).view(2, p.C, *(1,) * after)
        return x.sub_(m).mul_(a)
    return x if p.scale == 1 else x.mul_(p.scale)


def centred(p: PatchProblem, dtype: torch.dtype) -> torch.Tensor:
    """[2, C]: the m and a of `PatchProblem.centred`, on the problem's device."""
    m, a = p.centred
    if p.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # A copy from the host can't be captured, and memory of the graph's pool must not outlive it in our cache.
        values = torch.empty(2 * p.C, dtype=dtype, device=p.device)
        for slot, value in zip(values, m + a, strict=True):
            slot.fill_(value)
        return values.view(2, p.C)
    return _centred(tuple(m), tuple(a), dtype, p.device)


@lru_cache(maxsize=256)
def _centred(m: tuple[float, ...], a: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor([m, a], dtype=dtype, device=device)


def product_dtype(p: PatchProblem) -> torch.dtype:
    """The operands' dtype: on a CPU halves are multiplied as fp32, which PyTorch does several times faster there."""
    return sum_dtype(p) if p.device.type == "cpu" else p.compute_dtype


def sum_dtype(p: PatchProblem) -> torch.dtype:
    return torch.float64 if p.compute_dtype == torch.float64 else torch.float32


def _piece_bytes(device_type: str) -> int:
    """A piece's patches: what the second-level caches of the cores hold; on a GPU, enough to fill it."""
    return (1 << 20) * torch.get_num_threads() if device_type == "cpu" else 1 << 28
