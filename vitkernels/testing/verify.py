"""The proof: random problems over the whole contract, every backend against fp64, beside what eager PyTorch loses.

The oracle is the chain of PyTorch operations which the op replaces, in fp64: it shares nothing with reference.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
import torch.nn.functional as F

from .. import dispatch
from ..functional import explain, patch_embed
from ..problem import FLOAT_DTYPES, IMAGE_DTYPES
from . import races

LEARNT = ("weight", "bias", "pos_embed", "prefix", "images")  # what has a gradient
Arguments = dict[str, Any]  # of `patch_embed`, by name


# The chain that is replaced


def eager(
    images, weight, bias=None, *, pos_embed=None, prefix=None, stride=None, padding=0, mean=None, std=None, scale=None,
    keep=None, out_dtype=None,
) -> torch.Tensor:  # fmt: skip
    """`patch_embed` as models spell it: normalise, convolve, flatten, gather, concatenate, add; every step rounded.

    Takes what `patch_embed` takes; every tensor is first brought to the compute dtype.
    """
    dtype = compute_dtype(images, weight)
    x = normalise(images, dtype, mean, std, scale)
    weight, bias, pos_embed, prefix = (t if t is None else t.to(dtype) for t in (weight, bias, pos_embed, prefix))
    D, _, *patch = weight.shape
    convolution = F.conv2d if len(patch) == 2 else F.conv3d
    operands: tuple = (x, weight, bias)
    if images.device.type == "cpu" and dtype.itemsize == 2:
        # On a CPU the convolutions of 16 bits are not to be trusted (torch 2.11, 2.15): conv3d writes past its buffers,
        # conv2d's weight gradient may come from memory that nobody wrote. Summed in fp32 and rounded once, as they are.
        operands = tuple(t if t is None else t.float() for t in operands)
    with torch.autocast(images.device.type, enabled=False):  # the operands are in autocast's dtype already
        tokens = convolution(*operands, patch if stride is None else stride, padding)
    tokens = tokens.to(dtype).flatten(2).transpose(1, 2)
    B, N, _ = tokens.shape
    if keep is not None:
        index = keep.long()[:, :, None].expand(-1, -1, D)
        tokens = tokens.gather(1, index)
    if pos_embed is not None:
        pos_embed = pos_embed.expand(B, -1, -1)
        head, tail = pos_embed.split([pos_embed.shape[1] - N, N], 1)
        tokens = tokens + (tail if keep is None else tail.gather(1, index))
    if prefix is not None:
        prefix = prefix.expand(B, -1, -1)
        if pos_embed is not None and head.shape[1]:
            prefix = prefix + head
        tokens = torch.cat([prefix, tokens], 1)
    return tokens.to(out_dtype or dtype)


def compute_dtype(images: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    device_type = images.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype


def normalise(images: torch.Tensor, dtype: torch.dtype, mean=None, std=None, scale=None) -> torch.Tensor:
    """(images·scale − mean)/std, step by step in `dtype`."""
    if scale is None:
        scale = 1 / 255 if images.dtype == torch.uint8 else 1
    x = images.to(dtype)
    x = x if scale == 1 else x * scale
    mean, std = (
        v if v is None else torch.as_tensor(v, dtype=dtype, device=images.device).reshape(-1, *(1,) * (images.ndim - 2))
        for v in (mean, std)
    )
    x = x if mean is None else x - mean
    return x if std is None else x / std


def oracle(**arguments: Any) -> torch.Tensor:
    """`eager` in fp64."""
    with torch.autocast(arguments["images"].device.type, enabled=False):
        return eager(**{**arguments, "weight": arguments["weight"].double(), "out_dtype": torch.float64})


# The rule of accuracy


def floor_of(
    exact: torch.Tensor, terms: torch.Tensor, rounding: list[torch.dtype], sum_dtype: torch.dtype, length: int
) -> float:
    """The error that is nobody's fault, beside two times eager's.

    One rounding of the largest result to the coarsest of the dtypes it goes through: what is rounded once, the best
    there is, errs by that, and eager may be right by luck. And one unit, in the dtype of the sum, of the largest sum
    of absolute `terms`: another order of summation errs by that, whatever cancels. In fp64 eager is the oracle itself
    and shows no error to double: there a random walk over the sum's `length` is granted.
    """
    if exact.numel() == 0:
        return 0.0
    largest = exact.abs().max().item()
    once = max(max(largest, info.tiny) * info.eps / 2 for info in map(torch.finfo, rounding))
    walk = math.sqrt(length) if sum_dtype == torch.float64 else 1
    return once + terms.max().item() * torch.finfo(sum_dtype).eps * walk


def error_of(result: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest absolute error of an element; infinite where the result is not finite."""
    difference = (result.double() - exact).abs()
    return difference.nan_to_num(nan=math.inf).max().item() if difference.numel() else 0.0


def compare(arguments: Arguments, backend: str, gradients: bool = False) -> list[dict[str, Any]]:
    """One row for the tokens, and one a gradient where asked: error, eager's error, the bound, and whether it holds."""
    dtype = compute_dtype(arguments["images"], arguments["weight"])
    sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    with _fp32_is_fp32():
        results = [
            evaluate(lambda **kw: patch_embed(**kw, backend=backend), arguments, gradients),
            evaluate(eager, arguments, gradients),
            evaluate(oracle, _doubled(arguments), gradients),
            evaluate(oracle, _absolute(arguments, sum_dtype), gradients, absolute=True),
        ]
    length = max(results[0]["tokens"].shape[:2].numel(), arguments["weight"][0].numel(), len(arguments["weight"]))
    rows = []
    for what in results[0]:
        ours, theirs, exact, terms = (r[what] for r in results)
        error, eager_error = error_of(ours, exact) if ours.shape == exact.shape else math.inf, error_of(theirs, exact)
        bound = 2 * eager_error + floor_of(exact, terms, [dtype, theirs.dtype], sum_dtype, length)
        row = dict(what=what, error=error, eager_error=eager_error, bound=bound, ok=error <= bound < math.inf)
        if reason := _form(ours, theirs, arguments.get(what)):
            row.update(ok=False, reason=reason)
        elif not row["ok"]:
            row["reason"] = f"error {error:.3g} above {bound:.3g}"
        rows.append(row)
    return rows


def evaluate(
    call: Callable[..., torch.Tensor], arguments: Arguments, gradients: bool = True, absolute: bool = False
) -> dict[str, torch.Tensor]:
    """The tokens and, where asked, the gradient of everything learnt, for a fixed random gradient of the tokens."""
    arguments = dict(arguments)
    learnt = [n for n in LEARNT if gradients and (t := arguments.get(n)) is not None and t.is_floating_point()]
    for name in learnt:
        arguments[name] = arguments[name].detach().requires_grad_()
    tokens = call(**arguments)
    if not gradients:
        return {"tokens": tokens}
    grad = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(tokens.numel()))
    grad = grad.to(torch.bfloat16).to(tokens)  # representable in every dtype, so that all start from the same
    found = torch.autograd.grad(tokens, [arguments[n] for n in learnt], grad.abs() if absolute else grad)
    return {"tokens": tokens.detach(), **dict(zip(learnt, found, strict=True))}


def _doubled(arguments: Arguments) -> Arguments:
    learnt = {n: v.double() for n, v in arguments.items() if n in LEARNT and v is not None and v.dtype != torch.uint8}
    return {**arguments, **learnt}


def _absolute(arguments: Arguments, sum_dtype: torch.dtype) -> Arguments:
    """Arguments for which the chain sums the absolute terms of the sum."""
    absolute = {n: v.double().abs() if n in LEARNT and v is not None else v for n, v in arguments.items()}
    images, std = arguments["images"], arguments.get("std")
    scale = arguments.get("scale") or (1 / 255 if images.dtype == torch.uint8 else 1)
    mean = arguments.get("mean")
    if sum_dtype == torch.float64:  # the oracle normalises no better than we do: what cancels there counts too
        mean = None if mean is None else -torch.as_tensor(mean, dtype=torch.float64).abs()
        x = normalise(absolute["images"], torch.float64, mean, std, abs(scale))
    else:
        x = normalise(images, torch.float64, mean, std, scale).abs()
    return {**absolute, "images": x / normalise(torch.ones_like(x), torch.float64, None, std, abs(scale)),
            "mean": None, "scale": abs(scale)}  # fmt: skip


def _form(ours: torch.Tensor, theirs: torch.Tensor, learnt: torch.Tensor | None) -> str:
    """What is wrong with a result's shape, dtype or strides: tokens are contiguous, gradients lie as what is learnt."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"{list(ours.shape)} {ours.dtype} instead of {list(theirs.shape)} {theirs.dtype}"
    wanted = theirs.new_empty(theirs.shape) if learnt is None else torch.empty_like(learnt)
    what = "not contiguous" if learnt is None else "not laid out as what it is the gradient of"
    return "" if ours.stride() == wanted.stride() else f"{what}: {list(ours.shape)} with strides {ours.stride()}"


class _fp32_is_fp32:
    """cuDNN takes TF32 unless told otherwise, and eager's error would then excuse ours."""

    def __enter__(self):
        self.before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32

    def __exit__(self, *_):
        torch.backends.cudnn.allow_tf32 = self.before


# Random problems


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


# The command


def run(
    device: str = "auto",
    backend: str = "all",
    count: int = 16,
    seed: int = 0,
    gradients: bool = False,
    tick: Callable[[int, int], None] = lambda done, of: None,
    repeat: int = 1,
) -> dict[str, Any]:
    """Every backend × dtype × case, as `{"ok", "device", "rows": [...]}`.

    A backend that declines a problem is listed with its reasons and has not failed, unless nothing ran at all. With
    `repeat`, each is run so many times beside other work, and a row "same bits" says whether all were the first's.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: this PyTorch finds no GPU")
    if backend != "all":
        dispatch.check_name(backend)
    names = [n for n in dispatch.MODULES if backend in ("all", n)] or [backend]
    rows = []
    for i, drawn in enumerate(cases(seed, count)):
        for j, dtype in enumerate(FLOAT_DTYPES):
            one = replace(drawn, weight_dtype=dtype)
            arguments = one.tensors(device)
            reasons = explain(**arguments)
            for name in names:
                row: dict[str, Any] = dict(
                    case=str(one), backend=name, dtype=str(dtype).removeprefix("torch."), repeat=repeat
                )
                nothing = dict(row, error=None, eager_error=None, bound=None)
                if why := reasons.get(name):
                    rows.append({**nothing, "ok": None, "reason": "; ".join(why)})
                    continue
                try:
                    rows += [{**row, **found} for found in compare(arguments, name, gradients)]
                    if repeat > 1:
                        rows.append(nothing | _repeated(arguments, name, gradients, repeat))
                except Exception as error:  # a backend that breaks is a row that fails, and the others still run
                    rows.append({**nothing, "ok": False, "reason": f"{type(error).__name__}: {error}"})
            tick(i * len(FLOAT_DTYPES) + j + 1, count * len(FLOAT_DTYPES))
    for row in rows:  # JSON has no infinity
        row.update({n: None for n in ("error", "eager_error", "bound") if row[n] in (math.inf, None)})
    ran = [row["ok"] for row in rows if row["ok"] is not None]
    return {"ok": bool(ran) and all(ran), "device": device, "rows": rows}


def _repeated(arguments: Arguments, backend: str, gradients: bool, repeat: int) -> dict[str, Any]:
    def once() -> races.Results:
        with torch.set_grad_enabled(gradients):
            results = evaluate(lambda **kw: patch_embed(**kw, backend=backend), arguments, gradients)
        return [(what if what == "tokens" else f"gradient of {what}", t) for what, t in results.items()]

    difference = races.hunt(once, repeat)
    how = dispatch.backend(backend).how(explain(**arguments).problem) if backend != "auto" else "auto"
    found: dict[str, Any] = {"what": "same bits", "ok": not difference}
    return found | ({"reason": f"{how}: {difference}"} if difference else {})
