"""Calls with DTensors. How PyTorch's own operations are sharded it knows; it can't be told of one that gives a list, as
our backward does.

Each rank makes the tokens of the images that it has. What all images share is whole there, and its gradient is the sum
over the ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from .calls import Tensors


def are_dtensors(*tensors: Any) -> bool:
    """All that are not None. Beside plain tensors a DTensor is an error, PyTorch's own: they may differ by rank."""
    module = sys.modules.get("torch.distributed.tensor")  # nobody has one who did not import that
    return module is not None and all(t is None or isinstance(t, module.DTensor) for t in tensors)


def by_image(tensors: Tensors, embed: Callable[[Tensors], torch.Tensor]) -> torch.Tensor:
    """Tokens by `embed` of each rank's own tensors, sharded by images where those are."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh = tensors[0].device_mesh
    split = tuple(p if p == Shard(0) else Replicate() for p in tensors[0].placements)
    whole, summed = [Replicate()] * mesh.ndim, [Partial() if p.is_shard() else p for p in split]

    def own(i: int, t: Any) -> torch.Tensor | None:
        if t is None:
            return None
        if t.placements != split:  # of what is sent, or whose gradient is, other strides would be lost on the way
            t = t.contiguous()
        if i in (0, 5) or (i in (3, 4) and t.ndim == 3 and t.shape[0] != 1):  # images, keep, and a table of each image
            return t.redistribute(mesh, split).to_local()
        return t.redistribute(mesh, whole).to_local(grad_placements=summed)

    tokens = embed(tuple(own(i, t) for i, t in enumerate(tensors)))
    shape = torch.Size((tensors[0].shape[0], *tokens.shape[1:]))
    return DTensor.from_local(tokens, mesh, split, run_check=False, shape=shape, stride=tokens.stride())
