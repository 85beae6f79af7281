"""The public call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

import torch

from . import dispatch, ops
from .calls import Call, call_of
from .gpu import nominal
from .problem import arguments_of, problem_of

Channels: TypeAlias = float | Sequence[float] | torch.Tensor


def patch_embed(
    images: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    pos_embed: torch.Tensor | None = None,
    prefix: torch.Tensor | None = None,
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    mean: Channels | None = None,
    std: Channels | None = None,
    scale: float | None = None,
    keep: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Pixels in, tokens out: the front end of a Vision Transformer in one pass.

    ``out[:, :T] = prefix (+ pos_embed[:T] when it has T+N rows)`` and
    ``out[:, T:] = patches(images)·Wᵀ + bias + pos_embed``. It is what ``Conv2d`` (or ``Conv3d``), ``flatten``,
    ``transpose``, ``cat`` and ``add`` compute in the ViT of Dosovitskiy et al. (2021), https://arxiv.org/abs/2010.11929.

    Args:
        images: ``[B,C,H,W]``, or ``[B,C,F,H,W]`` for video, with a 5-D weight; uint8, float16, bfloat16, float32 or
            float64, in any strides. An ``[H,W,C]`` array of a decoder is ``torch.from_numpy(a).permute(2, 0, 1)[None]``
            and is read where it lies.
        weight: ``[D,C,P_h,P_w]`` (``[D,C,P_t,P_h,P_w]``): the Conv2d (Conv3d) parameter as it is, in any strides.
        bias: ``[D]``.
        pos_embed: ``[N,D]`` or ``[T+N,D]``, a leading 1 allowed, or per image ``[B,N,D]`` or ``[B,T+N,D]``.
        prefix: class, distillation and register tokens, ``[T,D]``, ``[1,T,D]`` or ``[B,T,D]``.
        stride: of the patches, in pixels, (t,) y, x; by default the patch size. Smaller: the patches overlap.
        padding: zeros around the normalised image, in pixels, (t,) y, x.
        mean, std: per channel, of the scaled pixel: ``y = (x·scale - mean)/std``. Not differentiable. Numbers; a tensor
            is read back, which neither ``torch.compile(fullgraph=True)`` nor a CUDA graph's capture allows.
        scale: of the raw pixel; by default 1/255 for uint8 and 1 for floats.
        keep: ``[B,N_keep]`` integer patch indices in 0..N-1: only these are embedded, in this order (MAE,
            https://arxiv.org/abs/2111.06377; PatchDropout). On a GPU the values are not checked, which would wait for
            it: a token with an index out of range is NaN.
        out_dtype: by default autocast's dtype where it is on, else the weight's. Products are taken in that same
            default dtype and summed in float32 (float64 for float64).
        backend: "auto", "reference", "triton" or "cuda". ``explain`` says which would run, and why others would not.

    Returns:
        Tokens ``[B, T+N, D]`` (``[B, T+N_keep, D]``), contiguous; differentiable in weight, bias, pos_embed, prefix
        and images.

    Raises:
        TypeError, ValueError: an input is wrong; the message has the numbers.
        NotImplementedError: the backend that was named can't take this problem; the message has its reasons.
    """
    dispatch.check_name(backend)
    tensors = (images, weight, bias, pos_embed, prefix, keep)
    if torch.compiler.is_compiling():  # then the operation's fake checks, without being traced itself
        call = Call(arguments_of(images, weight, stride, padding, mean, std, scale, out_dtype))
    else:
        call = call_of(tensors, stride, padding, mean, std, scale, out_dtype)
    return ops.patch_embed(tensors, call, backend)


def explain(
    images: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    pos_embed: torch.Tensor | None = None,
    prefix: torch.Tensor | None = None,
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    mean: Channels | None = None,
    std: Channels | None = None,
    scale: float | None = None,
    keep: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
    gpu: str | None = None,
) -> dispatch.Explanation:
    """Per backend, whether `patch_embed` with these arguments would run on it; if not, every reason.

    Takes what `patch_embed` takes and raises what it raises for wrong inputs. Returns a dict, backend -> list of
    reasons (empty: it would run), which prints as a table; its ``chosen`` is the backend that ``auto`` takes for the
    tokens, and its ``auto`` says for tokens and gradients which it takes and why.

    Args:
        gpu: an architecture that need not be here, "sm_90", or one of its GPUs, "H100": what would happen if images
            were there, with this machine's packages. Tensors may then be on any device, "meta" among them.
    """
    dispatch.check_name(backend)
    arguments = arguments_of(images, weight, stride, padding, mean, std, scale, out_dtype)
    p = problem_of(images, weight, bias, pos_embed, prefix, keep, arguments)
    return dispatch.Explanation(p if gpu is None else replace(p, device=nominal(gpu)))
