"""Front ends known by their structure alone, of any library: a convolution over pixels whose patches do not overlap. It
takes what no adapter did; position and prefix stay with the model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..functional import patch_embed
from ..layers import eager_dtype, quantised, touched
from .pending import Pending, noting
from .swapping import Fused, at_each_call

# Of pixels. Later stages of a hierarchy cut features, which have more: on a CPU ConvNeXt's, 2×2 of 96 channels, took
# twice as long as the convolution.
MOST_CHANNELS = 4
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.MultiheadAttention)


class Projection(Fused):
    """A Conv2d or Conv3d; its result is a view [B,D,(G_t,)G_h,G_w] of tokens, the channels innermost."""

    def forward(self, input):
        if (front := _patches(self, input)) is None:
            return super().forward(input)
        padding, grid = front
        if noting():
            return Pending.map(self, input, padding, grid, self._vk_backend)
        tokens = patch_embed(
            input, self.weight, self.bias, stride=self.stride, padding=padding, out_dtype=eager_dtype(self.weight),
            backend=self._vk_backend,
        )  # fmt: skip
        return tokens.transpose(1, 2).unflatten(2, grid)


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
    plain = getattr(type(conv), "_vk_base", type(conv))
    if plain not in (nn.Conv2d, nn.Conv3d):
        return f"the projection is a {plain.__name__}, not a plain Conv2d or Conv3d"
    padded = conv.padding not in ("valid", (0,) * len(conv.kernel_size))
    if conv.groups != 1 or max(conv.dilation) > 1 or (padded and conv.padding_mode != "zeros"):
        return (
            f"the projection has groups {conv.groups}, dilation {conv.dilation}, padding {conv.padding!r} of mode "
            f"{conv.padding_mode!r}; 1, 1 and zeros are what is fused"
        )
    ask = quantised if isinstance(conv, Fused) else touched  # a call of a fused one runs hooks
    return ask("the projection", conv)


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
def _patches(conv: Any, images: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Padding and grid, of images that the convolution takes and gives as many dimensions as it was given."""
    kernel = conv.kernel_size
    if images.ndim != len(kernel) + 2:
        return None
    B, C, *size = images.shape
    if C != conv.in_channels or B == 0:
        return None
    same_dtype = images.dtype == conv.weight.dtype or torch.is_autocast_enabled(images.device.type)
    if not same_dtype or not images.is_floating_point():
        return None
    padding = (0,) * len(kernel) if conv.padding == "valid" else conv.padding
    grid = [(n + 2 * pad - P) // S + 1 for n, pad, P, S in zip(size, padding, kernel, conv.stride, strict=True)]
    return (padding, tuple(grid)) if min(grid) > 0 else None
