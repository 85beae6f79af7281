"""The definition: what a patch embedding is, in plain PyTorch, for any device and dtype.

    out[:, :T] = prefix                          + pos_embed[:T]    where pos_embed has T+N rows
    out[:, T:] = patches(images) · Wᵀ + bias     + pos_embed[-N:]   of every patch, or of those in keep

It is evaluated piece by piece, so that one piece's patches stay in the cache (CPU) or in a bounded buffer (GPU);
the pieces are all that is here for speed. Gradients by the same formulas: gradients.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F

from .problem import PatchProblem, in_grid


def why_not(p: PatchProblem) -> list[str]:
    return []  # it is the definition: it takes every problem


def how(p: PatchProblem) -> str:
    return f"multiplying in {str(product_dtype(p)).removeprefix('torch.')}, piece by piece"


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
    keep, outside = in_grid(p, keep)
    out = images.new_empty(p.out_shape, dtype=p.out_dtype)
    if prefix is not None:
        extra = pos_embed[:, : p.T] if pos_embed is not None and p.pos_rows > p.N else prefix.new_zeros(())
        out[:, : p.T] = prefix.to(sum_dtype(p)) + extra
    W = weight.reshape(p.D, p.K).to(dtype).contiguous()  # oneDNN reads past the strides of either
    bias = bias if bias is None else bias.to(dtype).contiguous()
    linear = _linear(p.device.type, dtype)
    for b, n, x in pieces(p, images, keep, dtype):  # x [b·n, K]
        tokens = out[b, p.T + n.start : p.T + n.stop]  # [b, n, D]
        y = linear(x, W, bias).view(tokens.shape)
        if pos_embed is None:
            tokens.copy_(y)
        else:
            torch.add(y, _positions(p, pos_embed, b, n, keep), out=tokens)
    if outside is not None:
        out[:, p.T :].masked_fill_(outside[:, :, None], float("nan"))
    return out


def _linear(device_type: str, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """x·Wᵀ + bias. For fp32 by what Inductor calls: oneDNN multiplies up to 2.2 × faster than MKL, which F.linear
    takes, on a CPU that isn't Intel's."""
    if device_type == "cpu" and dtype == torch.float32 and _has_onednn() and torch.backends.mkldnn.enabled:
        return lambda x, W, bias: torch.ops.mkldnn._linear_pointwise(x, W, bias, "none", [], "")
    return F.linear


def _positions(p, pos_embed, b: slice, n: slice, keep) -> torch.Tensor:
    """What is added to the tokens of one piece, [1|b, n, D]."""
    pos = pos_embed[:, p.pos_rows - p.N :]  # [1|B, N, D]
    if p.pos_per_image:
        pos = pos[b]
    if keep is None:
        return pos[:, n]
    return pos[torch.arange(pos.shape[0], device=pos.device)[:, None], keep[b, n].long()]


def pieces(
    p: PatchProblem, images: torch.Tensor, keep: torch.Tensor | None, dtype: torch.dtype
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Images b, patches n of each, and their normalised pixels [b·n, K]. The buffers are reused by the next piece."""
    step, spans = _cut(p, dtype, _piece_bytes(p.device.type))
    # Read in the order of memory and normalised first, an image's patches are then gathered from the cache.
    staged = any(p.pad) or (p.B > 1 and keep is None and len(spans) == 1 and p.image_strides[-1] == 1)
    grid = None if staged else windows(p, images)  # [B, G_t, G_h, G_w, C, P_t, P_h, P_w]
    block = images.new_empty((min(step, p.B), *images.shape[1:]), dtype=dtype) if staged else None
    buffer = None
    for first in range(0, p.B if p.rows else 0, max(1, step)):
        b = slice(first, min(first + step, p.B))
        if block is not None:
            here = _normalise(p, block[: b.stop - b.start].copy_(images[b]), 3)
        for n in spans:
            part = _part(p, windows(p, here) if grid is None else grid[b], n, None if keep is None else keep[b, n])
            if buffer is None:
                buffer = images.new_empty(part.numel(), dtype=dtype)
            x = buffer[: part.numel()].view(part.shape)
            x.copy_(part)
            if not staged:
                _normalise(p, x, 3)
            yield b, n, x.view(-1, p.K)


@lru_cache(maxsize=256)
def _cut(p: PatchProblem, dtype: torch.dtype, piece_bytes: int) -> tuple[int, list[slice]]:
    """Images in a piece, and the patches of an image that make one: all of them, unless one image is too large."""
    image_bytes = max(1, p.rows * p.K * dtype.itemsize)
    if image_bytes <= piece_bytes:
        most = piece_bytes // image_bytes
        return -(-p.B // max(1, -(-p.B // most))), [slice(0, p.rows)]  # pieces of like size
    # Cut along the list of kept patches, or along the lines of the grid, frame by frame.
    frames, lines, line = (1, p.rows, 1) if p.n_keep is not None else p.G
    step = max(1, lines * frames * piece_bytes // image_bytes)
    starts = [(t, y) for t in range(frames) for y in range(0, lines, step)]
    return 1, [slice((t * lines + y) * line, (t * lines + min(y + step, lines)) * line) for t, y in starts]


def windows(p: PatchProblem, images: torch.Tensor) -> torch.Tensor:
    """The patches of normalised images, [b, G_t, G_h, G_w, C, P_t, P_h, P_w], a view where nothing is padded."""
    if any(p.pad):
        images = F.pad(images, [size for pad in reversed(p.pad) for size in (pad, pad)])
    b, c, *sides = images.stride()
    steps = [side * step for side, step in zip(sides, p.S, strict=True)]
    return images.as_strided((images.shape[0], *p.G, p.C, *p.P), (b, *steps, c, *sides))


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
        # Rounded to 16 bits, m and a would err alike for every pixel, and that does not cancel in the sum.
        m, a = centred(p, sum_dtype(p)).view(2, p.C, *(1,) * after)
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
    """The operands' dtype: a CPU without instructions for bf16 (any, for fp16) multiplies halves faster as fp32."""
    native = p.compute_dtype == torch.bfloat16 and p.out_dtype.itemsize == 2 and _has_bf16()
    if p.device.type == "cpu" and not native:
        return sum_dtype(p)
    return p.compute_dtype


@lru_cache(maxsize=1)
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@lru_cache(maxsize=1)
def _has_bf16() -> bool:
    """Whether oneDNN has bf16 instructions: the CPU's, unless the environment takes them away."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    older = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")
    return torch.cpu._is_avx512_bf16_supported() and limit not in older


def sum_dtype(p: PatchProblem) -> torch.dtype:
    return torch.float64 if p.compute_dtype == torch.float64 else torch.float32


def _piece_bytes(device_type: str) -> int:
    """A piece's patches: what the second-level caches of the cores hold; on a GPU, enough to fill it."""
    return (1 << 21) * torch.get_num_threads() if device_type == "cpu" else 1 << 28
