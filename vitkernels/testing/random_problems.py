"""Random problems over the whole contract."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch

from ..problem import FLOAT_DTYPES, IMAGE_DTYPES
from .oracle import Arguments


@dataclass(frozen=True, kw_only=True)
class Case:
    """One random problem. The seed gives it again: `case(seed)`; `tensors` makes its data."""

    seed: int
    images: tuple[int, ...]
    weight: tuple[int, ...]
    image_dtype: torch.dtype
    weight_dtype: torch.dtype
    out_dtype: torch.dtype | None
    image_layout: str
    weight_layout: str
    stride: int | tuple[int, ...] | None
    padding: int | tuple[int, ...]
    bias: bool
    pos_embed: tuple[int, ...] | None
    prefix: tuple[int, ...] | None
    small_layout: str  # of bias, pos_embed, prefix and keep
    keep: tuple[int, int] | None
    keep_dtype: torch.dtype
    N: int
    mean: float | tuple[float, ...] | None
    std: float | tuple[float, ...] | None
    scale: float | None
    contrast: float  # the images' spread about the middle of their range
    gain: float  # the weight's spread, times K**-½

    def __str__(self) -> str:
        def size(shape):
            return "x".join(map(str, shape)) if isinstance(shape, tuple) else shape

        def number(value):
            return [round(v, 3) for v in value] if isinstance(value, tuple) else round(value, 5)

        short = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64",
                 torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32",
                 torch.int64: "i64"}  # fmt: skip
        words = [f"seed {self.seed}:", f"{size(self.images)} {short[self.image_dtype]} {self.image_layout}",
                 f"* {size(self.weight)} {short[self.weight_dtype]} {self.weight_layout}"]  # fmt: skip
        if self.stride is not None:
            words.append(f"stride {size(self.stride)}")
        if self.padding:
            words.append(f"padding {size(self.padding)}")
        words += ["bias"] if self.bias else []
        words += [f"pos {size(self.pos_embed)}"] if self.pos_embed else []
        words += [f"prefix {size(self.prefix)}"] if self.prefix else []
        words += [f"keep {size(self.keep)} {short[self.keep_dtype]} of {self.N}"] if self.keep else []
        words += [self.small_layout] if self.small_layout != "contiguous" else []
        words += [f"{n} {number(v)}" for n in ("mean", "std", "scale") if (v := getattr(self, n)) is not None]
        words += [f"contrast {self.contrast}"] if self.contrast != 1 else []
        words += [f"gain {self.gain}"] if self.gain != 1 else []
        words += [f"-> {short[self.out_dtype]}"] if self.out_dtype else []
        return " ".join(words)

    @property
    def work(self) -> int:
        return self.images[0] * (self.N if self.keep is None else self.keep[1]) * math.prod(self.weight)

    def tensors(self, device: str | torch.device = "cpu") -> Arguments:
        """The arguments of `patch_embed`: fresh random tensors, the same for the same seed, in this case's strides."""
        generator = torch.Generator().manual_seed(self.seed)
        rng = Random(self.seed)

        def laid_out(data, layout, dtype):
            return _laid_out(data.to(dtype).to(device), layout, rng)

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        B, C, *size = self.images
        drawn = [1 if "batch" in self.image_layout else B, 1 if "channel" in self.image_layout else C, *size]
        x = 0.5 + self.contrast * (torch.rand(drawn, generator=generator, dtype=torch.float64) - 0.5)
        if self.image_dtype == torch.uint8 or abs(self.scale or 1) < 0.1:
            x = (x * 255).round()
        weight = self.gain * math.prod(self.weight[1:]) ** -0.5 * normal(*self.weight)
        arguments = {
            "images": laid_out(x, self.image_layout, self.image_dtype).expand(self.images),
            "weight": laid_out(weight, self.weight_layout, self.weight_dtype),
            "stride": self.stride, "padding": self.padding, "scale": self.scale, "out_dtype": self.out_dtype,
            "mean": self.mean, "std": self.std,
        }  # fmt: skip
        for name, shape in (("bias", self.weight[:1] if self.bias else None), ("pos_embed", self.pos_embed),
                            ("prefix", self.prefix)):  # fmt: skip
            if shape is not None:
                arguments[name] = laid_out(normal(*shape), self.small_layout, self.weight_dtype)
        if self.keep is not None:
            B, n = self.keep
            # Sorted or not, once or twice: MAE keeps each patch once, nothing says that one must.
            once = [torch.randperm(self.N, generator=generator)[:n] for _ in range(B)]
            index = torch.randint(self.N, self.keep, generator=generator)
            if n <= self.N and B and self.seed % 2:
                index = torch.stack(once)
            arguments["keep"] = laid_out(index, self.small_layout, self.keep_dtype)
        return arguments


def _laid_out(data: torch.Tensor, layout: str, rng: Random) -> torch.Tensor:
    """The same values in other strides. What lies between them is poison: NaN, or the largest integer."""
    if layout == "sliced":
        poison = math.nan if data.is_floating_point() else torch.iinfo(data.dtype).max
        big = torch.full([2 * s + 3 for s in data.shape], poison, dtype=data.dtype, device=data.device)
        view = big[tuple(slice(o := rng.choice([0, 1, 3]), o + 2 * s, 2) for s in data.shape)]
        return view.copy_(data)
    order = list(range(data.ndim))
    if layout == "channels-last":
        order.append(order.pop(1))
    elif layout == "permuted":
        rng.shuffle(order)
    return data.permute(order).contiguous().permute([order.index(d) for d in range(data.ndim)])


def case(seed: int, max_work: int = 1 << 20, **fixed: Any) -> Case:
    """The random problem of this seed: any that the contract allows, of at most `max_work` multiply-adds.

    `fixed` replaces fields of `Case`, `weight_dtype` for example.
    """
    rng = Random(seed)
    while (drawn := _draw(rng, seed)).work > max_work or math.prod(drawn.images) > max_work:
        pass
    return replace(drawn, **fixed)


def cases(seed: int, count: int, max_work: int = 1 << 20, **fixed: Any) -> Iterator[Case]:
    return (case(s, max_work, **fixed) for s in range(seed, seed + count))


def _draw(rng: Random, seed: int) -> Case:
    def chance(p):
        return rng.random() < p

    def one(*values):
        return rng.choice(values)

    video = chance(0.25)
    B = one(0, 1, 1, 2, 2, 3, 4, 5)
    C = one(1, 3, 3, 3, 4, 13)
    D = one(1, 5, 7, 16, 17, 24, 33, 64, 65, 96, 130)
    sides = (1, 2, 3, 4, 7, 8, 12, 14, 16, 16, 32)
    side = one(*sides)
    patch = [one(1, 2, 2, 3)] * video + ([side, side] if chance(0.8) else [one(*sides), one(*sides)])
    strides = [p if (way := one("own", "own", "small", "large")) == "own" else
               rng.randint(1, p) if way == "small" else p + rng.randint(1, 3) for p in patch]  # fmt: skip
    padding = [rng.randint(0, (p + 1) // 2) for p in patch]
    stride: Any = None if chance(0.6) else tuple(strides)
    if stride is None:
        strides = patch
    if chance(0.7):
        padding = [0] * len(patch)
    grid = [rng.randint(1, 3)] * video + [rng.randint(1, 6), rng.randint(1, 6)]
    size = [max(1, (g - 1) * s + p + rng.randrange(s) - 2 * pad) for g, s, p, pad in zip(grid, strides, patch, padding)]  # noqa: B905
    N = math.prod((n + 2 * pad - p) // s + 1 for n, pad, p, s in zip(size, padding, patch, strides, strict=True))
    same = len(set(padding)) == 1

    T = one(0, 0, 1, 1, 2, 5)
    prefix = None if T == 0 and chance(0.9) else one((T, D), (1, T, D), (B, T, D))
    rows = one(N, T + N)
    pos_embed = one(None, None, (rows, D), (1, rows, D), (1, rows, D), (B, rows, D))
    keep = None if chance(0.7) else (B, one(0, 1, rng.randint(1, N), rng.randint(1, N), N + 2))

    image_dtype = one(torch.uint8, *IMAGE_DTYPES)
    layouts = ("contiguous", "contiguous", "channels-last", "channels-last", "permuted", "sliced")
    scale = one(None, None, None, 1.0, 1 / 255, *[2.0, -0.5] * image_dtype.is_floating_point)
    raw = 255.0 if image_dtype == torch.uint8 and scale == 1 else 1.0  # the range of what is normalised
    mean = [raw * rng.uniform(0.3, 0.6) for _ in range(C)]
    std = [raw * rng.uniform(0.2, 0.3) for _ in range(C)]
    if chance(0.3):
        mean, std = [raw * 0.5] * C, [raw * 0.25] * C
    form = one("", "", "", "both", "both", "mean", "std", "scalar")
    return Case(
        seed=seed, images=(B, C, *size), weight=(D, C, *patch), N=N,
        image_dtype=image_dtype, weight_dtype=one(*FLOAT_DTYPES),
        out_dtype=one(None, None, None, *FLOAT_DTYPES),
        image_layout=one(*layouts, "expanded batch", "expanded channel", "expanded batch and channel"),
        weight_layout=one(*layouts), small_layout=one("contiguous", "contiguous", "permuted", "sliced"),
        stride=strides[0] if stride is not None and len(set(strides)) == 1 else stride,
        padding=padding[0] if same else tuple(padding),
        bias=chance(0.7), pos_embed=pos_embed, prefix=prefix, keep=keep,
        keep_dtype=one(*[torch.int64, torch.int32] * 2, *[torch.int16, torch.uint8, torch.int8] * (N < 128)),
        mean=None if form in ("", "std") else mean[0] if form == "scalar" else tuple(mean),
        std=None if form in ("", "mean") else std[0] if form == "scalar" else tuple(std),
        scale=scale, contrast=one(1, 1, 1, 0.02), gain=one(1, 1, 1, 0.02, 4),
    )  # fmt: skip
