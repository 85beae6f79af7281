"""The shapes that are timed: a `Case` has a name, and makes the arguments of `patch_embed`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

Call = dict[str, Any]  # the keyword arguments of patch_embed
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
PIXELS = {"uint8": torch.uint8, **DTYPES}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A shape to time: `batch` images of `chans` channels, square in `image` and `patch` (or (height, width))."""

    batch: int = 256
    image: int | tuple[int, int] = 224
    patch: int | tuple[int, int] = 16
    dim: int = 768
    dtype: str = "bf16"  # of the weights and tokens; "tf32" is fp32 with products allowed in TF32
    autocast: bool = False  # to dtype: weights, positions, prefix, pixels and tokens are in fp32, products in dtype
    pixels: str | None = None  # default: as weights. uint8 pixels are normalised with ImageNet's mean and std
    prefix: int = 1
    keep: float | None = None  # share of the patches that are embedded
    frames: int | None = None  # video, in tubelets of `tubelet` frames
    tubelet: int = 2
    chans: int = 3
    channels_last: bool = False

    @property
    def name(self) -> str:
        image, patch = ("x".join(map(str, _pair(v))) if v != _pair(v)[0] else str(v) for v in (self.image, self.patch))
        parts = [f"B{self.batch}", image, f"P{patch}", f"D{self.dim}", self.dtype]
        if self.frames is not None:
            parts[1] = f"{self.frames}f{image}"
            parts[2] = f"P{self.tubelet}x{patch}"
        if self.pixels not in (None, self.dtype):
            parts.append(str(self.pixels))
        parts += ["autocast"] * self.autocast
        if self.chans != 3:
            parts.append(f"C{self.chans}")
        if self.prefix != 1:
            parts.append(f"T{self.prefix}")
        if self.keep is not None:
            parts.append(f"keep{self.keep:g}")
        return "-".join(parts + ["hwc"] * self.channels_last)

    def call(self, device: torch.device | str, seed: int = 0) -> Call:
        """Fresh random arguments of patch_embed, of the magnitudes of a trained model."""
        g = torch.Generator(device).manual_seed(seed)
        video = self.frames is not None
        time_ = () if self.frames is None else ((self.frames, self.tubelet),)
        size, patch = zip(*time_, *zip(_pair(self.image), _pair(self.patch), strict=True), strict=True)
        N, K = 1, self.chans
        for s, P in zip(size, patch, strict=True):
            N, K = N * (s // P), K * P
        dtype = torch.float32 if self.autocast else DTYPES[self.dtype]
        random = partial(torch.randn, generator=g, device=device)

        shape = (self.batch, self.chans, *size)
        if self.pixels == "uint8":
            images = torch.randint(256, shape, dtype=torch.uint8, generator=g, device=device)
        else:
            images = random(shape).to(PIXELS[self.pixels] if self.pixels else dtype)
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last_3d if video else torch.channels_last)
        call: Call = {
            "images": images,
            "weight": (random(self.dim, self.chans, *patch) / K**0.5).to(dtype),
            "bias": (random(self.dim) / 10).to(dtype),
            "pos_embed": (random(self.prefix + N, self.dim) / 10).to(dtype),
            "prefix": (random(self.prefix, self.dim) / 10).to(dtype) if self.prefix else None,
        }
        if self.autocast:  # as timm's models leave them, whose positions are in fp32
            call["out_dtype"] = dtype
        if self.pixels == "uint8":
            call |= IMAGENET if self.chans == 3 else {"mean": 0.5, "std": 0.25}
        if self.keep is not None:
            order = torch.rand(self.batch, N, generator=g, device=device).argsort(1)
            call["keep"] = order[:, : max(1, round(N * self.keep))]
        return call


@contextmanager
def autocast(case: Case) -> Iterator[None]:
    """Wherever the case is run. Weights are cast at each call: kept, they would be of the first call's graph."""
    with ExitStack() as stack:
        for device in ("cpu", *(("cuda",) if torch.cuda.is_available() else ())) if case.autocast else ():
            stack.enter_context(torch.autocast(device, DTYPES[case.dtype], cache_enabled=False))
        yield


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value
