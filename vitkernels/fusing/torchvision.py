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


def _why_not(model: Any) -> str | None:
    return why_not_plain("conv_proj", model.conv_proj) or touched("encoder", model.encoder)


def _why_not_now(model: Any) -> str | None:
    if not isinstance(model.encoder, Encoder):
        return "encoder was replaced"
    return replaced(model, "_process_input") or _why_not(model)


@at_each_call(_why_not_now)
def _front_end(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Position table and class token."""
    return (model.encoder.pos_embedding, model.class_token) if _fits(model, x) else None


@at_each_call(lambda model: why_not_plain("conv_proj", model.conv_proj))
def _projects(model: Any, x: torch.Tensor) -> bool | None:
    return _fits(model, x) or None


def _fits(model: Any, x: torch.Tensor) -> bool:
    return takes(model.conv_proj, x) and tuple(x.shape[-2:]) == (model.image_size, model.image_size)


TABLE = {
    VIT + "VisionTransformer": Row(
        {"": (VisionTransformer, VIT + "VisionTransformer"), "encoder": (Encoder, VIT + "Encoder")},
        _why_not,
        "projection, position and class token",
    ),
}
