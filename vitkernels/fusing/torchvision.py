"""torchvision: the model makes the tokens, its encoder adds the position; finished tokens go in as [1,B,T+N,D]."""

from __future__ import annotations

from typing import Any

import torch

from ..layers import touched, why_not_plain
from .swapping import Fused, Row, embed, takes

VIT = "torchvision.models.vision_transformer."


class VisionTransformer(Fused):
    def forward(self, x):
        encoder = self.encoder
        if not isinstance(encoder, Encoder) or _why_not(self) is not None or not _fits(self, x):
            return super().forward(x)
        tokens = embed(self.conv_proj, x, self._vk_backend, pos_embed=encoder.pos_embedding, prefix=self.class_token)
        return self.heads(encoder(tokens[None])[:, 0])

    def _process_input(self, x):
        if why_not_plain("", self.conv_proj) is not None or not _fits(self, x):
            return super()._process_input(x)
        return embed(self.conv_proj, x, self._vk_backend)


class Encoder(Fused):
    def forward(self, input):
        if input.ndim != 4:
            return super().forward(input)
        return self.ln(self.layers(self.dropout(input.squeeze(0))))


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
