"""Front ends known by their structure alone, of any library: a convolution over pixels whose patches do not overlap. It
takes what no adapter did; position and prefix stay with the model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..layers import padding_of, quantised, touched, why_not_plain
from .pending import Pending, noting
from .swapping import Fused, at_each_call, embed, grid_of, takes

# Of pixels. Later stages of a hierarchy cut features, which have more: on a CPU ConvNeXt's, 2×2 of 96 channels, took
# twice as long as the convolution.
MOST_CHANNELS = 4
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.MultiheadAttention)


class Projection(Fused):
    """A Conv2d or Conv3d; its result is a view [B,D,(G_t,)G_h,G_w] of tokens, the channels innermost."""

    def forward(self, input):
        if (grid := _grid(self, input)) is None:
            return super().forward(input)
        if noting():
            return Pending.map(self, input, padding_of(self), grid, self._vk_backend)
        return embed(self, input, self._vk_backend).transpose(1, 2).unflatten(2, grid)


def patchifies(module: Any) -> bool:
    """Whether this looks like the projection of a front end, fused or not."""
    if not isinstance(module, nn.Conv2d | nn.Conv3d):
        return False
    if not all(hasattr(module, name) for name in ("kernel_size", "stride", "in_channels")):  # an older release's
        return False
    return module.kernel_size == module.stride and max(module.stride) > 1 and module.in_channels <= MOST_CHANNELS


def of_patches(K: int) -> bool:
    """Whether rows of K elements may be square patches of pixels, of a frame or of two."""
    return any(K % C == 0 and math.isqrt(K // C) ** 2 == K // C > 1 for C in (1, 3, 4, 6))


def why_not(conv: Any) -> str | None:
    """Why this projection can't be a `patch_embed` of the convolution's parameters; asked at every call as well."""
    ask = quantised if isinstance(conv, Fused) else touched  # a call of a fused one runs hooks
    return why_not_plain("the projection", conv, nn.Conv2d, nn.Conv3d, ask=ask)


def embedding_around(model: nn.Module, path: str) -> str | None:
    """Path of the largest module around a projection that has tables, and no weights but the projection's."""
    conv, found = model.get_submodule(path), None
    inside: set[nn.Module] = {conv}
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        if isinstance(module, nn.ModuleList | nn.ModuleDict) or any(
            _is_weighted(m) for m in module.modules() if m not in inside and m is not module
        ):
            break
        inside |= set(module.modules())
        if any(_tables(m) for m in inside if m is not conv):
            found = path
    return found


def _is_weighted(module: nn.Module) -> bool:
    matrices = (p.ndim > 1 and p.shape[0] > 1 for p in module.parameters(recurse=False))
    return isinstance(module, WEIGHTED) or (not isinstance(module, nn.Embedding) and any(matrices))


def _tables(module: nn.Module) -> bool:
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False), *vars(module).values())
    return any(isinstance(tensor, torch.Tensor) and tensor.ndim > 1 for tensor in own)


@at_each_call(why_not)
def _grid(conv: Any, images: torch.Tensor) -> tuple[int, ...] | None:
    """Of images that the convolution takes and gives as many dimensions as it was given."""
    if not takes(conv, images) or images.shape[0] == 0:
        return None
    if images.dtype != conv.weight.dtype and not torch.is_autocast_enabled(images.device.type):
        return None
    grid = grid_of(conv, images)
    return grid if min(grid) > 0 else None
