"""Images on their way through the views and the copy that cut them into patches for a Linear: none is made, and the
Linear's result is `Pending` tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .pending import Elsewhere, Pending, Source


class Pixels:
    """Images [B,C,H,W]; then a view of them [B,G_h,G_w,…] with C, P_h and P_w in any order; then patches [B,N,K].

    For anything else the plain call is right.
    """

    def __init__(self, images: torch.Tensor, backend: str):
        if images.ndim != 4 or not images.is_floating_point() or not images.is_contiguous():
            raise Elsewhere(f"{list(images.shape)} {images.dtype}, or not contiguous")
        self.images, self.backend = images, backend
        self.like = torch.empty(images.shape, device="meta")  # of the same sizes and order
        self.cut: torch.Tensor | None = None  # the view that is copied to patches

    def __getattr__(self, name: str) -> Any:
        if name in ("shape", "ndim", "dim", "size"):
            return getattr(self.like, name)
        if name in ("view", "permute") and self.cut is None:
            return lambda *args: self._with(getattr(self.like, name)(*args), None)
        if name in ("reshape", "flatten"):
            cut = self.like if self.cut is None else self.cut
            return lambda *args: self._with(getattr(self.like, name)(*args).contiguous(), cut)
        raise Elsewhere(f"images are cut by {name}")

    def _with(self, like: torch.Tensor, cut: torch.Tensor | None) -> Pixels:
        new = Pixels.__new__(Pixels)
        new.images, new.backend, new.like, new.cut = self.images, self.backend, like, cut
        return new

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.linear and not kwargs and isinstance(args[0], cls):
            return args[0]._projected(*args[1:])
        raise Elsewhere(f"images go to {getattr(func, '__name__', func)}")

    def _projected(self, matrix: torch.Tensor, bias: torch.Tensor | None = None) -> Pending:
        """By a matrix [D,K], of patches in raster order."""
        images, cut = self.images, self.cut
        B, C, H, W = images.shape
        same_dtype = images.dtype == matrix.dtype or torch.is_autocast_enabled(images.device.type)
        if cut is None or cut.ndim != 6 or not same_dtype:
            raise Elsewhere("images are not cut into patches")
        P_h, P_w = max(cut.stride(1) // W, 1), max(cut.stride(2), 1)
        axes = list(zip(cut.shape, cut.stride(), strict=True))
        element = [(C, H * W), (P_h, W), (P_w, 1)]
        raster = axes[:3] == [(B, C * H * W), (H // P_h, P_h * W), (W // P_w, P_w)]
        N = (H // P_h) * (W // P_w)
        if not raster or sorted(axes[3:]) != sorted(element) or self.like.shape != (B, N, matrix.shape[1]):
            raise Elsewhere("images are not cut into patches in raster order")
        weight = matrix.unflatten(1, cut.shape[3:]).permute(0, *(1 + axes[3:].index(axis) for axis in element))
        return Pending.tokens(Source(images, weight, bias, (P_h, P_w), (0, 0), (H // P_h, W // P_w), self.backend))
