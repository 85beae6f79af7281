"""Front ends that einops cuts, of any library: Rearrange > [norm] > Linear > whatever follows, in a Sequential.

vit_pytorch's architectures have it, with the elements of a patch in several orders. Position and prefix stay with the
model.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import nn

from ..functional import patch_embed
from ..layers import eager_dtype, project_patches, touched
from .structure import MOST_CHANNELS
from .swapping import Fused, at_each_call


class ToPatchEmbedding(Fused):
    """A Sequential. Where a norm of the patch comes first, Rearrange cuts; otherwise pixels are read where they lie."""

    def forward(self, input):
        if (front := _front_end(self, input)) is None:
            return super().forward(input)
        cut, grid = front
        before, linear, after = _modules(self)
        if before is not None:
            x = project_patches(before(self[0](input)), linear, backend=self._vk_backend)
        else:
            P = {name: self[0].axes_lengths[name] for name in cut.patches.values() if name}
            weight = rearrange(linear.weight, cut.weight, **P)
            x = patch_embed(
                rearrange(input, cut.images), weight, linear.bias, out_dtype=eager_dtype(weight),
                backend=self._vk_backend,
            )  # fmt: skip
            x = rearrange(x, cut.tokens, **grid)
        for module in after:
            x = module(x)
        return x


class Cut(NamedTuple):
    """What "b c (h p1) (w p2) -> b (h w) (p1 p2 c)" says, or one with other axes: one or three in place of h and w,
    some that are not cut, no channels, and all in another order."""

    axes: tuple[str, ...]  # of the images, behind the batch: of the grid, by their names, and of the channels
    patches: dict[str, str]  # axes of the grid, (t,) (h,) w, and the name of P along each; "" where it is not cut
    images: str  # the pattern that makes them [B,C,(T,)H,W]
    weight: str  # ... [D,K] a view [D,C,(P_t,)P_h,P_w]
    tokens: str  # ... [B,N,D] the result


@lru_cache
def _sides(pattern: str) -> list[list[list[str]]]:
    """Names of each axis, of what is given and of what is made."""
    sides = []
    for side in pattern.split("->"):
        axes = []
        for i, names in enumerate(side.replace(")", "(").split("(")):  # in turn outside of parentheses and inside
            axes += [names.split()] if i % 2 else [[name] for name in names.split()]
        sides.append(axes)
    return sides


@lru_cache
def read(pattern: str) -> Cut | None:
    """None where it says something else."""
    left, right = _sides(pattern)
    plain = all(names and all(map(str.isidentifier, names)) for names in left)  # no ellipsis, no axis of length 1
    if not plain or max(map(len, left)) > 2 or len(right) < 3:
        return None
    [batch, *axes], [first, *groups, elements] = left, right
    channels = [a[0] for a in axes if len(a) == 1 and a[0] in elements]
    patches = {a[0]: "".join(a[1:]) for a in axes if a[0] not in channels}
    P = list(filter(None, patches.values()))
    if first != batch or len(batch) > 1 or len(channels) > 1 or not P or len(patches) > 3:
        return None
    if list(patches) != [name for names in groups for name in names] or sorted(elements) != sorted(channels + P):
        return None
    C, one, grid = "".join(channels) or "1", "1" if len(patches) == 1 else "", " ".join(patches)
    names, made = [a[0] for a in axes], " ".join(f"({' '.join(names)})" for names in groups)
    return Cut(
        tuple(names), patches,
        f"images {' '.join(names)} -> images {C} {one} {grid}",
        f"tokens ({' '.join(elements)}) -> tokens {C} {one} {' '.join(P or '1' for P in patches.values())}",
        f"images ({grid}) tokens -> images {made} tokens",
    )  # fmt: skip


def projects(module: Any) -> bool:
    """Whether this looks like a front end, fused or not: pixels are cut into patches, one axis has all of each."""
    if not isinstance(module, nn.Sequential) or len(module) < 2 or type(module[0]) is not Rearrange:
        return False
    if not all(hasattr(module[0], name) for name in ("pattern", "axes_lengths")):  # an older release's
        return False
    left, right = _sides(module[0].pattern)
    P, lengths = set(module[0].axes_lengths), list(module[0].axes_lengths.values())
    if not any(len(names) > 1 and P.intersection(names) for names in left):
        return False
    _, projection, _ = _modules(module)
    K = getattr(projection, "in_features", getattr(projection, "in_channels", 0))
    one_axis = any(len(names) > 1 and P.issubset(names) for names in right)
    return one_axis and K <= MOST_CHANNELS * math.prod(lengths)


def why_not(sequential: Any) -> str | None:
    """Why this front end can't be a `patch_embed` of its Linear's parameters; asked at every call as well."""
    if not projects(sequential):
        return "it does not start with a Rearrange that cuts patches any more"
    rearrange, (_, linear, _) = sequential[0], _modules(sequential)
    if type(linear) is not nn.Linear:
        return f"the projection is a {type(linear).__name__}, not a plain Linear"
    if (cut := read(rearrange.pattern)) is None:
        return f"{rearrange.pattern}: patches in raster order, each the last axis, are what is fused"
    if not all(length in rearrange.axes_lengths for length in cut.patches.values() if length):
        return f"{rearrange.pattern} is not told how large a patch is"
    hooks = None if isinstance(sequential, Fused) else touched("the Sequential", sequential)  # a call of it runs them
    return hooks or touched("Rearrange", rearrange) or touched("the projection", linear)


def _modules(sequential: Any) -> tuple[nn.Module | None, Any, list[nn.Module]]:
    """The norm of the patch, the Linear, and what follows."""
    normed = len(sequential) > 2 and "norm" in type(sequential[1]).__name__.lower()
    at = 2 if normed else 1
    return sequential[1] if normed else None, sequential[at], list(sequential)[at + 1 :]


@at_each_call(why_not)
def _front_end(sequential: Any, images: torch.Tensor) -> tuple[Cut, dict[str, int]] | None:
    """The pattern, and the number of patches along each axis of the grid."""
    if (cut := read(sequential[0].pattern)) is None:
        return None
    (_, linear, _), lengths = _modules(sequential), sequential[0].axes_lengths
    same_dtype = images.dtype == linear.weight.dtype or torch.is_autocast_enabled(images.device.type)
    if not images.is_floating_point() or not same_dtype or images.ndim != 1 + len(cut.axes):
        return None
    sizes = dict(zip(cut.axes, images.shape[1:], strict=True))
    P = {name: lengths.get(length, 1) for name, length in cut.patches.items()}
    if any(sizes[name] < P[name] or sizes[name] % P[name] for name in P):
        return None
    K = math.prod([P.get(name, size) for name, size in sizes.items()])
    return (cut, {name: sizes[name] // P[name] for name in P}) if K == linear.in_features else None
