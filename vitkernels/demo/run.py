"""The demonstration: photographs through a timm model before and after `fuse`, timed, compared and drawn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from .. import explain, fuse, patch_embed
from ..bench.sample_images import photographs
from ..testing.accuracy import judge

# Largest difference of logits allowed, of the largest logit: the tokens' rounding after all blocks of a model.
LOGITS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


class Spread(NamedTuple):
    """Milliseconds of repeated runs: the median and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, times: list[float]) -> Spread:
        low, median, high = np.percentile(times, (25, 50, 75)).tolist()
        return cls(median, low, high)


@dataclass
class Demonstration:
    """What was run and what came out, for the table, for JSON and for the picture."""

    model: str
    device: str
    dtype: str
    backend: str
    fused: list[dict[str, Any]]  # the report of `fuse`
    images: np.ndarray  # [B, H, W, 3], uint8
    credits: list[str]
    patch: tuple[int, int]
    prefix: str  # what stands in front of the patches, in words
    tokens: np.ndarray  # [B, T+N, D], fp32, of the one call
    pos_embed: np.ndarray  # [N, D]
    share: float  # of the front end, in the model's operations
    chain: dict[str, float]  # step -> milliseconds, of the run whose sum is the median
    front_end: tuple[Spread, Spread]  # before, after
    whole_model: tuple[Spread, Spread]
    token_difference: float
    token_errors: tuple[float, float]  # against float64: before, after
    token_error_allowed: float
    logit_difference: float
    logit_difference_allowed: float

    @property
    def ok(self) -> bool:
        """Something was fused, tokens are as exact as the library promises, and logits agree; a NaN never does."""
        tokens_agree = self.token_errors[1] <= self.token_error_allowed
        logits_agree = self.logit_difference <= self.logit_difference_allowed
        return any(front_end["fused"] for front_end in self.fused) and tokens_agree and logits_agree


def demonstrate(
    model_name: str = "vit_base_patch16_224",
    *,
    device: torch.device,
    dtype: torch.dtype,
    batch: int | None = None,
    files: Sequence[str] = (),
    repeats: int = 5,
    track: Callable[[Iterable[int], str], Iterable[int]] = lambda loop, what: loop,
) -> Demonstration:
    """Run the model before and after; `track(loop, what)` may show progress."""
    model, mean, std = _model(model_name)
    size = model.patch_embed.img_size
    images, credits = photographs(size, files, batch)
    share = _share(model)
    model = model.to(device, dtype)
    fused_model = deepcopy(model)
    report = fuse(fused_model)

    pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)  # the decoder's memory, seen as [B, C, H, W]
    projection, pos_embed, N = model.patch_embed.proj, model.pos_embed, model.patch_embed.num_patches
    extras = {"class": model.cls_token, "registers": model.reg_token}
    extras = {name: token for name, token in extras.items() if token is not None}
    prefix = torch.cat([pos_embed[:, :0], *extras.values()], 1)
    table = functional.pad(pos_embed, (0, 0, prefix.shape[1] + N - pos_embed.shape[1], 0))  # zeros for the prefix
    parameters = (projection.weight, projection.bias, table, prefix)

    def call(x: torch.Tensor) -> torch.Tensor:
        return patch_embed(x, projection.weight, projection.bias, **options)

    options = {"pos_embed": pos_embed, "prefix": prefix, "mean": mean, "std": std}
    chain = EagerChain(mean, std, *parameters)
    before, after = chain(pixels), call(pixels)
    normalised = chain.normalise(chain.convert(pixels))
    if not torch.allclose(before, model._pos_embed(model.patch_embed(normalised)), rtol=1e-2, atol=1e-2):
        raise ValueError(f"the front end of {model_name} does more than the demo knows")
    arguments = {"images": pixels, "weight": projection.weight, "bias": projection.bias, **options}
    [judged] = judge(arguments, {"tokens": after})
    logits, fused_logits = model(normalised), fused_model(normalised)  # which warms up, too

    laps, calls, models, fused_models = [], [], [], []
    for _ in track(range(4 * repeats + 1), "front end"):
        laps.append(_laps(device, chain.steps, pixels))
        calls += _laps(device, [call], pixels)
    for _ in track(range(repeats), "whole model"):
        models += _laps(device, [model], normalised)
        fused_models += _laps(device, [fused_model], normalised)

    return Demonstration(
        model=model_name,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        backend=explain(pixels, projection.weight, projection.bias, **options).chosen,
        fused=report.to_dicts(),
        images=images,
        credits=credits,
        patch=tuple(projection.kernel_size),
        prefix=", ".join(f"{t.shape[1]} {name}" for name, t in extras.items()).replace("1 class", "class token"),
        tokens=after.float().cpu().numpy(),
        pos_embed=pos_embed[0, -N:].float().cpu().numpy(),
        share=share,
        chain=dict(zip(chain.STEPS, sorted(laps, key=sum)[len(laps) // 2], strict=True)),
        front_end=(Spread.of([sum(times) for times in laps]), Spread.of(calls)),
        whole_model=(Spread.of(models), Spread.of(fused_models)),
        token_difference=(after - before).abs().max().item(),
        token_errors=(judged["eager_error"], judged["error"]),
        token_error_allowed=judged["bound"],
        logit_difference=(fused_logits - logits).abs().max().item(),
        logit_difference_allowed=LOGITS_TOLERANCE[dtype] * logits.abs().max().item(),
    )


class EagerChain:
    """The front end as it is usually written, one pass over memory a step; normalised as timm's loader does it."""

    STEPS = ("convert", "normalise", "convolve", "cat", "add")

    def __init__(self, mean, std, weight, bias, pos_embed, prefix):
        self.weight, self.bias, self.pos_embed, self.prefix = weight, bias, pos_embed, prefix
        like = {"dtype": weight.dtype, "device": weight.device}
        self.mean, self.std = (255 * torch.tensor(v, **like).view(1, -1, 1, 1) for v in (mean, std))

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        for step in self.steps:
            pixels = step(pixels)
        return pixels

    @property
    def steps(self) -> list[Callable[[torch.Tensor], torch.Tensor]]:
        return [getattr(self, name) for name in self.STEPS]

    def convert(self, pixels):
        return pixels.to(self.weight.dtype, memory_format=torch.contiguous_format)

    def normalise(self, x):
        return x.sub_(self.mean).div_(self.std)

    def convolve(self, x):
        return functional.conv2d(x, self.weight, self.bias, self.weight.shape[2:])

    def cat(self, x):
        return torch.cat([self.prefix.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)

    def add(self, x):
        return x + self.pos_embed


def _model(name: str) -> tuple[Any, tuple[float, ...], tuple[float, ...]]:
    """A timm model with seeded random weights and, as no trained one is downloaded, the 2-D sin-cos position table."""
    import timm
    from timm.layers import build_sincos2d_pos_embed
    from timm.models.vision_transformer import VisionTransformer

    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}; see timm.list_models('vit_*')")
    torch.manual_seed(0)
    model: Any = timm.create_model(name, pretrained=False).eval().requires_grad_(False)
    if not isinstance(model, VisionTransformer) or model.pos_embed is None:
        raise ValueError(f"the demo takes timm's VisionTransformer with a position table; {name} is none")
    grid, width = model.patch_embed.grid_size, model.embed_dim
    model.pos_embed.zero_()[:, -grid[0] * grid[1] :] = build_sincos2d_pos_embed(list(grid), width)
    for token in (model.cls_token, model.reg_token):
        if token is not None:
            token.normal_()
    return model, tuple(model.pretrained_cfg["mean"]), tuple(model.pretrained_cfg["std"])


def _share(model: Any) -> float:
    """Of the model's operations, the part that is the patch embedding."""
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, *model.patch_embed.img_size))
    return 2 * model.patch_embed.num_patches * model.patch_embed.proj.weight.numel() / counter.get_total_flops()


def _laps(device: torch.device, steps: Sequence[Callable[[Any], Any]], x: Any) -> list[float]:
    """Milliseconds of each step, each fed the one before: by the GPU's events or the clock on the wall."""
    on_gpu = device.type == "cuda"

    def mark() -> Any:
        if not on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    marks = [mark()]
    for step in steps:
        x = step(x)
        marks.append(mark())
    if not on_gpu:
        return [(b - a) * 1e3 for a, b in pairwise(marks)]
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) for a, b in pairwise(marks)]
