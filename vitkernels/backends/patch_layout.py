"""Where a problem's patches lie in the image, and what the kernels of both languages ask of it: arithmetic alone."""

from __future__ import annotations

from math import gcd, prod
from typing import NamedTuple

import torch

from ..problem import PatchProblem, Triple


class PatchLayout(NamedTuple):
    """The image as a kernel reads it. A channels-last image is one channel of rows W·C wide: (y, x, c) in memory
    order is (y, x') with x' = x·C + c, so its pixels are read as wide as those of a planar image."""

    C: int
    W: int
    P: Triple
    S: Triple
    pad: Triple
    strides: tuple[int, int, int, int, int]  # b, c, f, h, w
    channels_last: bool


def layout_of(p: PatchProblem, strides: tuple[int, ...] | None = None) -> PatchLayout:
    """Of the problem's images, or of their gradient in its own strides."""
    b, c, f, h, w = strides or p.image_strides
    S = within_image(p)
    if p.C > 1 and c == 1 and w == p.C:
        wide = lambda v: (v[0], v[1], v[2] * p.C)  # noqa: E731
        return PatchLayout(1, p.W * p.C, wide(p.P), wide(S), wide(p.pad), (b, 0, f, h, 1), True)
    return PatchLayout(p.C, p.W, p.P, S, p.pad, (b, c, f, h, w), False)


def within_image(p: PatchProblem) -> Triple:
    """The stride; one past the image is as good as one that ends with it."""
    t, y, x = (min(s, max(n, size + e)) for s, n, size, e in zip(p.S, p.P, (p.F, p.H, p.W), p.pad, strict=True))
    return t, y, x


def weight_in_order(p: PatchProblem, channels_last: bool) -> bool:
    """Whether rows of the weight are the product's operands as they lie: of its type, their elements side by side in
    the order in which patches are read."""
    P_t, P_h, P_w = p.P
    dense = (1, P_h * P_w * p.C, P_w * p.C, p.C) if channels_last else (P_t * P_h * P_w, P_h * P_w, P_w, 1)
    strides = zip((p.C, *p.P), p.weight_strides[1:], dense, strict=True)
    return p.weight_dtype == p.compute_dtype and all(n == 1 or s == d for n, s, d in strides)


def product_of(p: PatchProblem, tf32: bool) -> str:
    if p.compute_dtype == torch.float32:
        return "tf32" if tf32 else "fp32"
    return "fp64" if p.compute_dtype == torch.float64 else "half"


def scaling(p: PatchProblem, product: str) -> tuple[bool, bool]:
    """Whether pixels are normalised one by one, or else whether the sum is scaled.

    The scale of all channels is a factor of the sum. One that differs by channel, or that leaves fp32's range (or its
    precision, in an fp64 problem), is applied to the pixels.
    """
    normalised = p.normalised or (p.scale != 1 and (product == "fp64" or not 1e-4 <= abs(p.scale) <= 1e4))
    return normalised, not normalised and p.scale != 1


def row_alignment(p: PatchProblem, layout: PatchLayout, images_at: int) -> int:
    """The largest power of two, up to 16, that divides where every row of the image begins, in bytes."""
    counts, size = (p.B, layout.C, p.F, p.H), p.image_dtype.itemsize
    return gcd(16, images_at, *(s * size for s, n in zip(layout.strides[:4], counts, strict=True) if n > 1))


MOST_IN_GROUP = 8  # csrc/common/patch_layout.h


def group_of(p: PatchProblem, layout: PatchLayout) -> int:
    """Patches of a line from one that begins on 16 bytes, as a tensor map must, to the next that does."""
    return 16 // gcd(16, layout.S[2] * p.image_dtype.itemsize)


def no_copy_engine(p: PatchProblem, layout: PatchLayout, images_at: int, group: int = 1) -> list[str]:
    """Why tensor maps, one for every `group` patches of a line, can't describe the image's patches; none: they can.
    `images_at`: their address, modulo 16."""
    b, c, _f, h, w = layout.strides
    size = p.image_dtype.itemsize
    reasons = (
        (p.F != 1, f"{p.F} frames"),
        (p.n_keep is not None, "a keep list"),
        (any(p.pad), f"padding {p.pad[1:]}"),
        (w != 1, f"pixels of a row are {w} apart"),
        (layout.C > 1 and c != p.H * h, f"channels are {c} apart, not H·row = {p.H * h}"),
        (images_at % 16 != 0, "images do not start on 16 bytes"),
        (h <= 0 or h * size % 16 != 0, f"rows are {h * size} bytes apart, no multiple of 16"),
        (p.B > 1 and (b <= 0 or b * size % 16 != 0), f"images are {b * size} bytes apart, no multiple of 16"),
        (layout.S[2] * size * group % 16 != 0, f"patches are {layout.S[2] * size} bytes apart, no multiple of 16"),
        (group > MOST_IN_GROUP, f"one of {group} patches begins on 16 bytes, of {MOST_IN_GROUP} at least it must"),
        (
            p.G[2] % group != 0,
            f"{p.G[2]} patches in a line, no multiple of the {group} of which one begins on 16 bytes",
        ),
    )
    return [text for wrong, text in reasons if wrong]


def padded_row(layout: PatchLayout) -> int:
    """Elements of a patch's row as the copy engine brings it for wgmma, zeros behind its own."""
    return -(-layout.P[2] // 16) * 16


def grid_of(p: PatchProblem) -> Triple:
    """Images, lines, columns: of the grids of all frames, or of one line of those patches that an image keeps."""
    return (p.B, p.G[0] * p.G[1], p.G[2]) if p.n_keep is None else (p.B, 1, p.rows)


def blocks_of(p: PatchProblem, BM: int, most: int | None = None, group: int = 1) -> Triple:
    """BM patches as images × lines × columns of `grid_of`, at most so many of one image, and whole groups of columns:
    the block that leaves the fewest patches empty."""
    sides = [1 << i for i in range(BM.bit_length())]
    shapes = [(BM // (y * x), y, x) for y in sides for x in sides if y * x <= (most or BM) and x % group == 0]

    def covered(shape: Triple) -> Triple:
        total = prod(-(-n // s) * s for n, s in zip(grid_of(p), shape, strict=True))
        return total, -shape[2], -shape[1]  # among equals the widest: neighbours share the cache lines of their rows

    return min(shapes, key=covered)


def blocks_in(p: PatchProblem, block: Triple) -> int:
    return prod(-(-n // s) for n, s in zip(grid_of(p), block, strict=True))
