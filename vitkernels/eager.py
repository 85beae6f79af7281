"""The chain of PyTorch operations that `patch_embed` replaces: what is exported to ONNX, which knows no other, and what
tests and benchmarks hold every backend against. It shares nothing with them."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def is_traced() -> bool:
    """Whether torch.jit or ONNX make a graph, which is to run without this package."""
    return torch.jit.is_tracing() or (torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export())


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
