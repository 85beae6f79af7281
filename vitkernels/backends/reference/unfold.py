"""An image in patches, piece by piece: what the definition (__init__.py) and its gradients (gradients.py) multiply.

The pieces are all that is here for speed: one piece's patches stay in the cache (CPU) or in a bounded buffer (GPU).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ... import cpu
from ...problem import Layout, PatchProblem, video_strides
from ..common import centred, empty
from .products import (
    by_one_thread,
    gains_by_packing,
    has_bias_in_table,
    has_onednn,
    is_zen5s,
    linear_of,
    may_have_amx,
    mkl_is_slow,
    onednn,
    padded,
    padded_rows,
    product_dtype,
)

GPU_BYTES = 3 << 27  # of a piece on a GPU, which it has to fill
WORDS = {8: torch.int64, 16: torch.complex128}  # bytes -> a dtype of as many


class Way(NamedTuple):
    """How images become patches, and how and where they are multiplied: all that does not depend on data."""

    p: PatchProblem  # as it is evaluated: of one channel where a pixel's channels lie side by side
    dtype: torch.dtype  # of patches and weight
    linear: Callable[..., torch.Tensor]  # x·Wᵀ + bias
    columns: int  # elements of a row of patches: K, a one (for a bias in the weight's column), zeros
    pads_rows: bool  # behind a piece's patches are other rows, as many as the library likes
    packs: bool  # the weight is brought into the library's order once for all pieces
    in_place: bool  # products are written where the tokens are
    has_bias_in_table: bool  # then, of positions
    is_small: bool  # the sum starts at what is added to it
    is_all: bool  # the one piece's products are the tokens
    images: tuple[slice, ...]  # b and n: a piece is of these images and of these patches of each; the first is
    spans: tuple[slice, ...]  # the largest
    windows: tuple[tuple[int, ...], tuple[int, ...]] | None  # of all images, sizes and strides; None: they are staged
    as_they_are: bool  # patches are multiplied where they lie
    room: int  # rows of zeros before the patches of each image: a piece's products are then all its tokens
    in_lines: bool  # kept patches are gathered line by line
    wide: torch.dtype  # what pixels are normalised in


def pieces(
    way: Way, images: torch.Tensor, keep: torch.Tensor | None, into: torch.Tensor | None = None
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Images b, patches n of each, and their normalised pixels [b·n, columns], or with `room` [b·(T+N), columns].

    The buffers are contiguous, and reused by the next piece; or they are the next rows of `into` [B·N, columns]. Where
    the way pads rows, there may be some more.
    """
    p, dtype, wide, staged = way.p, way.dtype, way.wide, way.windows is None
    grid = None if way.windows is None else images.as_strided(*way.windows)  # [B, G_t, G_h, G_w, C, P_t, P_h, P_w]
    block, buffer, done = None, into, 0
    for b in way.images:
        if grid is not None:
            here = grid if len(way.images) == 1 else grid[b]
        else:
            if block is None:
                block = images.new_empty((b.stop, *images.shape[1:]), dtype=wide)
            here = windows(p, _normalise(p, block[: b.stop - b.start].copy_(images[b]), block.ndim - 2))
        for n in way.spans:
            part = here
            if keep is not None:
                part = _lines(p, images[b], keep[b, n]) if way.in_lines else _kept(p, here, keep[b, n])
            elif n.stop - n.start < p.N:
                part = _part(p, here, n)
            if way.as_they_are:
                part = part if keep is None else _normalise(p, part, 3)  # kept patches are copies, gathered in a row
                yield b, n, part.reshape(-1, p.K).contiguous()
                continue
            sizes = (b.stop - b.start, way.room + n.stop - n.start, way.columns)
            rows = sizes[0] * sizes[1]
            with_others = padded_rows(rows) if way.pads_rows else rows
            if buffer is None:
                buffer = _buffer(way, images, sizes, with_others)
            piece = buffer if len(buffer) == with_others else buffer[done : done + with_others]
            done += 0 if into is None else rows
            x = piece if with_others == rows else piece[:rows]
            if way.room or way.columns > p.K:
                x = x.view(sizes)[:, way.room :, : p.K]
            x = x.view(part.shape)
            if staged or wide == dtype:
                copy_lines(x, part)
            if not staged and (p.normalised or p.scale != 1):
                normalised = _normalise(p, x if wide == dtype else part.to(wide, copy=True), 3)
                if wide != dtype:
                    x.copy_(normalised)
            yield b, n, piece


def copy_lines(to: torch.Tensor, of: torch.Tensor) -> None:
    """to.copy_(of) of patches [..., P_w]; where a line is as long as a word, by words: PyTorch begins anew for each
    line, which takes 1.5 to 2.9 × as long as to copy 4 pixels (2 cores of an AMD EPYC, Zen 5)."""
    n, word = to.shape[-1], WORDS.get(to.shape[-1] * to.element_size())
    if word and to.is_cpu and to.dtype == of.dtype and all(_are_words(t, n) for t in (to, of)):
        to, of = to.view(word), of.view(word)
    to.copy_(of)


def _are_words(t: torch.Tensor, n: int) -> bool:
    *steps, step = t.stride()
    return step == 1 and t.storage_offset() % n == 0 and all(s % n == 0 for s in steps)


def _buffer(way: Way, images, sizes: tuple[int, int, int], with_others: int) -> torch.Tensor:
    """For the patches of a piece, [b·(room + n), columns]: all around them is written here, once."""
    K, rows = way.p.K, sizes[0] * sizes[1]
    buffer = empty(images, (with_others, way.columns), way.dtype)
    if with_others > rows:
        buffer[rows:].zero_()
    if way.room or way.columns > K:
        around = buffer[:rows].view(sizes)
        around[:, : way.room].zero_()
        around[:, way.room :, K : K + 1].fill_(1)
        around[:, way.room :, K + 1 :].zero_()
    return buffer


def way_of(p: PatchProblem, summed: torch.dtype | None = None) -> Way:
    """Of the tokens; or of products in `summed`, that are added up."""
    rounds = (
        p.K % 32 > 0 and p.on_cpu and may_have_amx() and torch.backends.mkldnn.matmul.fp32_precision
    )  # see `padded`
    return _way_of(p, summed, torch.get_num_threads(), has_onednn(), rounds)


@lru_cache(maxsize=1024)
def _way_of(p: PatchProblem, summed: torch.dtype | None, threads: int, *_) -> Way:
    dtype = summed or product_dtype(p)
    if not summed:
        p = side_by_side(p) or p
    in_place = not summed and _lands_in_tokens(p, dtype, threads)
    has_bias_column = in_place and p.has_bias and dtype == torch.bfloat16
    columns = -(-(p.K + 1) // 32) * 32 if has_bias_column else padded(p.K, p.on_cpu, dtype)
    images, spans = _cut(p, dtype, _piece_rows(p, dtype, threads, in_place, summed is not None), threads)
    staged = any(p.pad) or (len(spans) == 1 and _gains_by_staging(p, dtype, summed is not None))
    as_they_are = columns == p.K and not staged and is_matrix(p, dtype)
    several = len(images) > 0 and images[0].stop > 1
    # Another pass over the tokens counts where rows are few; in bf16 oneDNN would multiply at a fraction of its speed.
    is_small = p.on_cpu and dtype == torch.float32 and not (several or spans[0].stop >= 1000 or mkl_is_slow(dtype))
    is_small = is_small and p.pos_rows > 0 and dtype == p.out_dtype
    by_zen5 = p.on_cpu and not (summed or in_place or is_small) and is_zen5s(dtype)
    packs = by_zen5 and gains_by_packing(p, dtype)
    is_all = len(images) * len(spans) == 1 and p.T == 0 and dtype == p.out_dtype and not (in_place or is_small)
    return Way(
        p,
        dtype,
        onednn if packs else linear_of(p.on_cpu, dtype),
        columns,
        by_zen5 and columns == p.K and not as_they_are,
        packs,
        in_place,
        in_place and has_bias_in_table(p, dtype),
        is_small,
        is_all,
        tuple(images),
        tuple(spans),
        None if staged else ((p.B, *p.G, p.C, *p.P), _steps(p, p.image_strides)),
        as_they_are,
        p.T if in_place and several and not as_they_are else 0,
        p.on_cpu and _lies_in_lines(p),
        _normalised_dtype(p, dtype),
    )


def side_by_side(p: PatchProblem) -> PatchProblem | None:
    """The same problem where a pixel's channels lie side by side: of one channel, in which a pixel is C long. Patches
    are then lines of P_w·C elements. The weight has to lie likewise (channels-last), or is copied."""
    b, c, f, h, w = p.image_strides
    free = p.weight_strides[1] == 1 or p.B * p.rows >= 2 * p.D
    if not (p.on_cpu and p.C > 1 and p.P != (1, 1, 1) and (c, w) == (1, p.C) and free):
        return None
    wider: dict[str, Any] = {name: (*getattr(p, name)[:2], getattr(p, name)[2] * p.C) for name in ("P", "S", "pad")}
    if p.normalised:  # `_normalise` repeats them along a line
        wider |= {"mean": p.mean or (0.0,) * p.C, "std": p.std or (1.0,) * p.C}
    layout = Layout(p.image_dtype, (b, p.W * p.C, f, h, 1))
    return replace(p, C=1, W=p.W * p.C, tensors=(layout, *p.tensors[1:]), **wider)


def _gains_by_staging(p: PatchProblem, dtype: torch.dtype, summed: bool) -> bool:
    """Whether it gains to copy images first, in memory's order, and normalise: patches then come from a CPU's cache.
    On Intel's that gains only where they are converted. For tokens on Zen 5 it does not in lines of 32 pixels (0.94 to
    0.97 × the time without) nor in float32 (0.93 to 1.0 ×), but with many patches in few channels (1.05 ×)."""
    whole = p.on_cpu and p.B > 1 and p.n_keep is None and p.image_strides[-1] == 1 and not _lies_in_rows(p)
    straight = p.P[2] >= 32 or (dtype == torch.float32 and (p.B * p.rows < 4096 or 2 * p.D > p.K))
    if whole and (cpu.is_intel() or (straight and is_zen5s(dtype) and not summed)):
        wide = _normalised_dtype(p, dtype)
        return p.image_dtype != wide and (wide != dtype or p.P[2] < 32)  # long lines are converted as fast on their way
    return whole


def is_matrix(p: PatchProblem, dtype: torch.dtype) -> bool:
    """Whether patches are multiplied where they lie: kept ones, which are gathered anyhow, and such as lie in rows."""
    plain = _lies_in_rows(p) and not p.normalised and p.scale == 1
    same = p.image_dtype == dtype == _normalised_dtype(p, dtype)
    return same and (plain or p.n_keep is not None)


def _lies_in_rows(p: PatchProblem) -> bool:
    """Patches are rows of a matrix in memory: a pixel is a patch, its channels side by side, as normed patches come; or
    an image is one patch, as those come that somebody cut before (Qwen2-VL)."""
    if p.P == (1, 1, 1):
        return p.image_strides[1] == 1
    return _is_dense(p, p.image_strides[1:]) and (p.F, p.H, p.W) == p.P and not any(p.pad)


def _is_dense(p: PatchProblem, strides: tuple[int, ...]) -> bool:
    """Whether these of the images' last axes are those of a contiguous tensor."""
    sizes = (p.B, p.C, p.F, p.H, p.W)[-len(strides) :]
    return all(n == 1 or s == prod(sizes[i + 1 :]) for i, (n, s) in enumerate(zip(sizes, strides, strict=True)))


def _cut(p: PatchProblem, dtype: torch.dtype, piece_rows: int, threads: int) -> tuple[list[slice], list[slice]]:
    """The images of each piece, and the patches of an image that make one: all, unless one image is too large."""
    if p.B * p.rows == 0:
        return [], [slice(0, 0)]
    step, spans = 1, _spans(p, piece_rows)
    if p.rows <= piece_rows:
        step = _alike(p.B, piece_rows // p.rows)
        least, most = by_one_thread(p, dtype, threads)
        if least <= step * p.rows < most:
            step = _alike(p.B, max(1, least // p.rows))
    return [slice(first, min(first + step, p.B)) for first in range(0, p.B, step)], spans


def _alike(B: int, most: int) -> int:
    """Images of a piece where all pieces have about as many."""
    return -(-B // max(1, -(-B // most)))


def _spans(p: PatchProblem, piece_rows: int) -> list[slice]:
    if p.rows <= piece_rows:
        return [slice(0, p.rows)]
    # Cut along the list of kept patches, or between frames, or along the lines of the grid, frame by frame.
    frames, lines, line = (1, p.rows, 1) if p.n_keep is not None else p.G
    if lines * line <= piece_rows:
        step = _alike(frames, piece_rows // (lines * line)) * lines * line
        return [slice(first, min(first + step, p.rows)) for first in range(0, p.rows, step)]
    step = _alike(lines, max(1, piece_rows // line))
    starts = [(t, y) for t in range(frames) for y in range(0, lines, step)]
    return [slice((t * lines + y) * line, (t * lines + min(y + step, lines)) * line) for t, y in starts]


def windows(p: PatchProblem, images: torch.Tensor) -> torch.Tensor:
    """The patches of normalised images, [b, G_t, G_h, G_w, C, P_t, P_h, P_w], a view where nothing is padded."""
    if any(p.pad):
        sides = p.pad[5 - images.ndim :]  # a picture's has no frames
        images = F.pad(images, [size for pad in reversed(sides) for size in (pad, pad)])
    return images.as_strided((images.shape[0], *p.G, p.C, *p.P), _steps(p, video_strides(images.stride())))


def _steps(p: PatchProblem, image_strides: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of windows [B, G_t, G_h, G_w, C, P_t, P_h, P_w]."""
    b, c, f, h, w = image_strides
    t, y, x = p.S
    return b, f * t, h * y, w * x, c, f, h, w


def _kept(p: PatchProblem, grid: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Patches `keep` [b, n] of the grid's images, [b, n, C, P_t, P_h, P_w]."""
    t, y, x = torch.unravel_index(keep.long(), p.G)
    return grid[torch.arange(grid.shape[0], device=grid.device)[:, None], t, y, x]


def _lies_in_lines(p: PatchProblem) -> bool:
    """Whether dense images are lines of P_w pixels, each of them of one patch."""
    return _is_dense(p, p.image_strides) and p.W % p.P[2] == 0 and p.S[2] == p.P[2] and not any(p.pad)


def _lines(p: PatchProblem, images: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """As `_kept`, by lines of P_w pixels, which takes a CPU a third of the time that pixels take one by one."""
    t, y, x = torch.unravel_index(keep.long(), p.G)
    image, line = torch.arange(len(images))[:, None], p.W // p.P[2]
    first = ((image * p.C * p.F + t * p.S[0]) * p.H + y * p.S[1]) * line + x  # [b, n]
    channel, frame, row = (torch.arange(n) for n in (p.C, p.P[0], p.P[1]))
    inside = ((channel[:, None, None] * p.F + frame[:, None]) * p.H + row) * line  # [C, P_t, P_h]
    index = first[:, :, None, None, None] + inside
    return images.reshape(-1, p.P[2]).index_select(0, index.reshape(-1)).view(*index.shape, p.P[2])


def _part(p: PatchProblem, grid: torch.Tensor, n: slice) -> torch.Tensor:
    """Patches n of every image in the grid, [b, ..., C, P_t, P_h, P_w]."""
    t, line = divmod(n.start // p.G[2], p.G[1])
    frame, count = p.G[1] * p.G[2], n.stop - n.start
    if count >= frame:
        return grid[:, t : t + count // frame]
    return grid[:, t, line : line + (n.stop - n.start) // p.G[2]]


def _normalise(p: PatchProblem, x: torch.Tensor, after: int) -> torch.Tensor:
    """(x·scale − mean)/std in place; the channel is the dimension before the last `after`."""
    if p.normalised:
        # Rounded to 16 bits, m and a would err alike for every pixel, and that does not cancel in the sum.
        m, a = centred(p, p.sum_dtype)
        if len(m) == p.C:
            m, a = m.view(p.C, *(1,) * after), a.view(p.C, *(1,) * after)
        else:  # of channels that lie side by side
            m, a = m.repeat(x.shape[-1] // len(m)), a.repeat(x.shape[-1] // len(a))
        return x.sub_(m).mul_(a)
    return x if p.scale == 1 else x.mul_(p.scale)


def _lands_in_tokens(p: PatchProblem, dtype: torch.dtype, threads: int) -> bool:
    """Whether a piece's product is written where its tokens are, and positions added there, on Intel's: then a piece
    has twice the rows. In bf16 the bias takes a column of the weight, which is copied: where that gains rows."""
    if not (p.on_cpu and cpu.is_intel() and p.B > 1 and dtype == p.out_dtype):
        return False
    if dtype == torch.bfloat16:
        rows = _piece_rows(p, dtype, threads)
        return not p.has_bias or padded(p.K, True, dtype) > p.K or (rows < p.B * p.rows and p.D >= p.K)
    return dtype == torch.float32 and not p.pos_per_image


def _normalised_dtype(p: PatchProblem, dtype: torch.dtype) -> torch.dtype:
    """What pixels are normalised in: rounded to 16 bits only once, and no operation has to convert on the side."""
    return p.sum_dtype if p.normalised or p.scale != 1 else dtype


def images_at_once(p: PatchProblem) -> int:
    """Whose gradient is made together: on a CPU of some 400 patches, with which the product is at full speed and which
    the caches hold; or as many as fill a GPU."""
    if p.on_cpu:
        return -(-400 // p.N)
    padded = prod(n + 2 * pad for n, pad in zip((p.F, p.H, p.W), p.pad, strict=True))
    return max(1, GPU_BYTES // (p.C * padded * p.sum_dtype.itemsize + p.N * p.K * p.sum_dtype.itemsize))


def _piece_rows(p: PatchProblem, dtype: torch.dtype, threads: int, in_place: bool = False, summed: bool = False) -> int:
    """Patches of a piece. On a CPU all that a piece needs (its images, patches, product and positions, and the weight
    where it is converted) stays within 3.75 MB a thread, which the caches hold. On a GPU a piece has to fill it."""
    most = 3_750_000 * max(2, threads) if p.on_cpu else GPU_BYTES
    weight = p.D * p.K * dtype.itemsize
    if summed:
        budget = most
    else:
        aside = weight * ((dtype != p.weight_dtype) + gains_by_packing(p, dtype))
        if p.on_cpu and cpu.is_intel():
            table = p.N * p.D * dtype.itemsize * (in_place and has_bias_in_table(p, dtype))
            aside += 2 * weight if dtype == torch.bfloat16 else table  # oneDNN's copies
        budget = max(most // 4, min(most // 2, weight), most - aside)
    kept, wide = p.n_keep is not None, _normalised_dtype(p, dtype)
    copied = kept or any(p.pad) or wide != dtype or _gains_by_staging(p, dtype, summed)
    row = p.K * (dtype.itemsize + wide.itemsize * copied) + p.D * dtype.itemsize * (2 if kept else 1 - in_place)
    return max(1, budget // row)
