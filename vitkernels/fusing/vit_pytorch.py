"""vit_pytorch: Rearrange > LayerNorm > Linear > LayerNorm in a Sequential; position and class token follow outside.

The second norm stands between projection and position, so only the Sequential is fused, and a row of the table is
all that another of vit_pytorch's architectures with this Sequential needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..layers import normed_patch_embed, touched
from .swapping import Fused, Row, at_each_call

PATTERN = "b c (h p1) (w p2) -> b (h w) (p1 p2 c)"


class ToPatchEmbedding(Fused):
    def forward(self, input):
        if (patch := _patch(self, input)) is None:
            return super().forward(input)
        _, before, linear, after = self
        return normed_patch_embed(input, before, linear, after, patch, backend=self._vk_backend)


@at_each_call
def _patch(sequential: nn.Sequential, input: torch.Tensor) -> tuple[int, int] | None:
    """Size of the patches."""
    if _why_not_sequential(sequential) or input.ndim != 4 or not input.is_floating_point():
        return None
    cut: Any = sequential[0]
    linear: Any = sequential[2]
    P_h, P_w = cut.axes_lengths["p1"], cut.axes_lengths["p2"]
    K = input.shape[1] * P_h * P_w
    if input.shape[2] % P_h or input.shape[3] % P_w or linear.in_features != K:
        return None
    return P_h, P_w


def _why_not(model: Any) -> str | None:
    return touched("to_patch_embedding", model.to_patch_embedding) or _why_not_sequential(model.to_patch_embedding)


def _why_not_sequential(sequential: nn.Sequential) -> str | None:
    if len(sequential) != 4:
        return f"to_patch_embedding has {len(sequential)} modules, not Rearrange, norm, Linear, norm"
    cut, _, linear, _ = sequential
    if getattr(cut, "pattern", None) != PATTERN:
        return f"to_patch_embedding starts with {cut}"
    if type(linear) is not nn.Linear:
        return f"to_patch_embedding.2 is a {type(linear).__name__}, not a plain Linear"
    return touched("to_patch_embedding.0", cut) or touched("to_patch_embedding.2", linear)


TABLE = {
    "vit_pytorch.vit.ViT": Row(
        {"to_patch_embedding": (ToPatchEmbedding, "torch.nn.modules.container.Sequential")},
        _why_not,
        "projection, between its LayerNorms",
    ),
}
