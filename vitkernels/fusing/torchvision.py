"""torchvision: the model makes the tokens, its encoder adds the position, unless `Tokens` are finished already."""

from __future__ import annotations

from typing import Any

import torch

from ..layers import touched, why_not_plain
from .swapping import Fused, Row, Tokens, at_each_call, embed, replaced, takes

VIT = "torchvision.models.vision_transformer."


class VisionTransformer(Fused):
    def forward(self, x):
        if (tables := _front_end(self, x)) is None:
            return super().forward(x)
        pos, prefix = tables
        tokens = embed(self.conv_proj, x, self._vk_backend, pos_embed=pos, prefix=prefix)
        return self.heads(self.encoder(Tokens(tokens))[:, 0])

    def _process_input(self, x):
        if not _projects(self, x):
            return super()._process_input(x)
        return embed(self.conv_proj, x, self._vk_backend)


class Encoder(Fused):
    def forward(self, input):
        if not isinstance(input, Tokens):
            return super().forward(input)
        return self.ln(self.layers(self.dropout(input.tokens)))


@at_each_call
def _front_end(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Position table and class token."""
    if not isinstance(model.encoder, Encoder) or replaced(model, "_process_input") or _why_not(model):
        return None
    if not _fits(model, x):
        return None
    return model.encoder.pos_embedding, model.class_token  # type: ignore[attr-defined]


@at_each_call
def _projects(model: Any, x: torch.Tensor) -> bool:
    return why_not_plain("", model.conv_proj) is None and _fits(model, x)


def _fits(model: Any, x: torch.Tensor) -> bool:
    return takes(model.conv_proj, x) and tuple(x.shape[-2:]) == (model.image_size, model.image_size)


def _why_not(model: Any) -> str | None:
    return why_not_plain("conv_proj", model.conv_proj) or touched("encoder", model.encoder)


TABLE = {
    VIT + "VisionTransformer": Row(
        {"": (VisionTransformer, VIT + "VisionTransformer"), "encoder": (Encoder, VIT + "Encoder")},
        _why_not,
        "projection, position and class token",
    ),
}
