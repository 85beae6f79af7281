"""The peers: the same function of the same arguments, as others write it; none of them crippled.

Each takes (images, weight, bias, pos_embed, prefix, keep, a, b) and gives tokens [B,T+N,D]; pixels become a·x + b.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


def _normalised(images, dtype, a, b):
    return images.to(dtype) if a is None else torch.addcmul(b, images.to(dtype), a)


def _assembled(x, pos_embed, prefix):
    """cat and add, as timm does it. x [B,N,D]"""
    if prefix is not None:
        x = torch.cat([prefix.expand(x.shape[0], -1, -1), x], 1)
    return x + pos_embed


def _assembled_kept(x, pos_kept, pos_embed, prefix):
    """add and cat, as MAE does it, on the kept patches alone. x, pos_kept [B,N_keep,D]"""
    x = x + pos_kept
    if prefix is None:
        return x
    return torch.cat([(prefix + pos_embed[: prefix.shape[0]]).expand(x.shape[0], -1, -1), x], 1)


def conv(images, weight, bias, pos_embed, prefix, keep, a, b, memory_format=None):
    """Conv2d, flatten, transpose, cat, add: timm's front end. Masks embed every patch and gather."""
    images = _normalised(images, weight.dtype, a, b)
    if memory_format is not None:
        images = images.contiguous(memory_format=memory_format)
    x = (F.conv2d if weight.ndim == 4 else F.conv3d)(images, weight, bias, stride=weight.shape[2:])
    x = x.flatten(2).transpose(1, 2)
    if keep is None:
        return _assembled(x, pos_embed, prefix)
    index = keep[:, :, None].expand(-1, -1, x.shape[2])
    return _assembled_kept(x.gather(1, index), pos_embed[-x.shape[1] :][keep], pos_embed, prefix)


def linear(images, weight, bias, pos_embed, prefix, keep, a, b):
    """Reshape and linear, as serving engines do it. Masks gather the patches, before the product."""
    dims = weight.ndim - 2
    for dim in range(2, 2 + dims):
        P = weight.shape[dim]
        at = 2 * dim - 2  # the dimensions before it were split
        images = images.narrow(at, 0, images.shape[at] // P * P).unflatten(at, (-1, P))
    grid = images.permute(0, *range(2, 2 + 2 * dims, 2), 1, *range(3, 3 + 2 * dims, 2))  # [B, *G, C, *P], a view
    if keep is None:
        x = grid.reshape(grid.shape[0], -1, weight[0].numel())
    else:
        row = torch.arange(keep.shape[0], device=keep.device)[:, None]
        place: tuple = (keep,)
        for side in reversed(grid.shape[2 : 1 + dims]):  # torch.unravel_index copies the sides to a GPU, and waits
            place = (place[0] // side, place[0] % side, *place[1:])
        place = (row, *place)
        x = grid[place].flatten(2)
    if a is not None:  # per channel, after the patches lie in order: one pass for copy and conversion
        x = _normalised(x.unflatten(2, (weight.shape[1], -1)), weight.dtype, a.view(-1, 1), b.view(-1, 1)).flatten(2)
    x = F.linear(x.to(weight.dtype), weight.flatten(1), bias)
    if keep is None:
        return _assembled(x, pos_embed, prefix)
    N = grid[0].numel() // weight[0].numel()
    return _assembled_kept(x, pos_embed[-N:][keep], pos_embed, prefix)


def _compiled(function: Callable, mode: str | None = None) -> Callable:
    import torch._functorch.config as config

    config.donated_buffer = False  # a backward that is timed alone runs again and again on the same graph
    return torch.compile(function, dynamic=False, fullgraph=True, mode=mode)


_MAX = "max-autotune-no-cudagraphs"  # graphs are captured here, for every implementation alike
PEERS: dict[str, Callable[[], Callable]] = {
    "timm_eager": lambda: conv,
    "conv_channels_last": lambda: conv,
    "reshape_linear": lambda: linear,
    "compile_conv": lambda: _compiled(conv),
    "compile_linear": lambda: _compiled(linear),
    "compile_conv_max": lambda: _compiled(conv, _MAX),
    "compile_linear_max": lambda: _compiled(linear, _MAX),
}
