"""What all backends share: the form of the tensors, the channels' constants on the device, and gradients that copy or
sum rows of dY."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from ..gpu import capturing
from ..problem import PatchProblem, in_grid

_allocators: Any
try:
    from torch._C._dynamo import guards as _allocators
except ImportError:  # a PyTorch that keeps them elsewhere
    _allocators = None

Grads = tuple[torch.Tensor | None, ...]  # of images, weight, bias, pos_embed, prefix
_ON_CPU: Callable[..., torch.Tensor] | None = getattr(_allocators, "_empty_strided_cpu", None)
_ON_GPU: Callable[..., torch.Tensor] | None = getattr(_allocators, "_empty_strided_cuda", None)


def empty(beside: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What `beside.new_empty` makes, by what allocates in torch.compile's own code: past the dispatcher and the parsing
    of arguments, which take the host 2 µs of 3. That for GPUs takes the current one."""
    if beside.is_cpu and _ON_CPU is not None:
        return _ON_CPU(shape, _dense(shape), dtype)
    if beside.is_cuda and _ON_GPU is not None and beside.get_device() == torch._C._cuda_getDevice():
        return _ON_GPU(shape, _dense(shape), dtype)
    return beside.new_empty(shape, dtype=dtype)


@lru_cache(maxsize=4096)
def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def canonical(images, weight, bias, pos_embed, prefix, keep=None) -> tuple[torch.Tensor | None, ...]:
    """The tensors in one form each: a picture is a video of one frame, tables have a batch dimension."""
    images, weight = (t if t is None or t.ndim == 5 else t.unsqueeze(2) for t in (images, weight))
    pos_embed, prefix = (t if t is None or t.ndim == 3 else t.unsqueeze(0) for t in (pos_embed, prefix))
    return images, weight, bias, pos_embed, prefix, keep


def centred(p: PatchProblem, dtype: torch.dtype) -> torch.Tensor:
    """[2, C]: the m and a of `PatchProblem.centred`, on the problem's device."""
    m, a = p.centred
    key = (*m, *a), dtype, p.device
    if (found := _constants.get(key)) is not None:
        return found
    if capturing(p.device):
        # A copy from the host can't be captured, and memory of the graph's pool must not outlive it in our cache.
        values = torch.empty(2 * p.C, dtype=dtype, device=p.device)
        for slot, value in zip(values, m + a, strict=True):
            slot.fill_(value)
        return values.view(2, p.C)
    made = torch.tensor([m, a], dtype=dtype, device=p.device)
    return _constants.setdefault(key, made) if len(_constants) < 1024 else made


_constants: dict[tuple, torch.Tensor] = {}  # none is dropped: a captured graph may read it


def own_tables(
    p: PatchProblem, grad: torch.Tensor, keep: torch.Tensor | None, d_pos: torch.Tensor | None,
    d_prefix: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """Write the gradients of tables that each image has of its own, which are copies of dY's rows; d_pos and d_prefix
    as they are left to a kernel that sums over images."""
    if d_prefix is not None and (p.T == 0 or (d_prefix.ndim == 3 and d_prefix.shape[0] > 1)):
        if p.T:
            d_prefix.copy_(grad[:, : p.T])
        d_prefix = None
    if d_pos is not None and p.pos_per_image:
        position(p, *masked(p, grad, keep), d_pos)
        d_pos = None
    return d_pos, d_prefix


def masked(p: PatchProblem, grad: torch.Tensor, keep: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The tokens' gradient, 0 where an index is out of range, and indices that are not."""
    keep, outside = in_grid(p, keep)
    return (grad if outside is None else grad.masked_fill(F.pad(outside, (p.T, 0))[:, :, None], 0)), keep


def position(p: PatchProblem, grad: torch.Tensor, keep: torch.Tensor | None, out: torch.Tensor) -> None:
    """The position table's gradient, [1|B, N|T+N, D]; `keep` holds no index out of range."""
    first = p.pos_rows - p.N
    if keep is None and first == p.T:
        each_or_sum(p, grad, out)
        return
    d_tokens = grad[:, p.T :]
    if keep is not None:
        d_tokens = scattered(p, d_tokens, keep, per_image=p.pos_per_image)
    each_or_sum(p, d_tokens, out[:, first:])
    each_or_sum(p, grad[:, :first], out[:, :first])


def scattered(p: PatchProblem, d_tokens: torch.Tensor, keep: torch.Tensor, *, per_image: bool) -> torch.Tensor:
    """Gradients of the kept patches at their place among all N, [B|1, N, D]; a patch kept twice is added twice."""
    images = p.B if per_image else 1
    index = keep.long()
    if per_image:
        index = index + torch.arange(p.B, device=index.device)[:, None] * p.N
    total = d_tokens.new_zeros((images * p.N, p.D), dtype=p.sum_dtype)
    source, index = d_tokens.to(total.dtype).reshape(-1, p.D), index.reshape(-1)
    # Each is the deterministic one on its device: index_add_ is atomic on a GPU, index_put_ on many CPU threads.
    if total.is_cuda:
        total.index_put_((index,), source, accumulate=True)
    else:
        total.index_add_(0, index, source)
    return total.view(images, p.N, p.D)


def each_or_sum(p: PatchProblem, g: torch.Tensor, out: torch.Tensor) -> None:
    """out [1|b, rows, D] takes each image's rows of g [b, rows, D], or their sum where there is one table for all."""
    out.copy_(g if out.shape[0] == g.shape[0] else g.sum(0, keepdim=True, dtype=p.sum_dtype))
