"""transformers: an embeddings module holds the projection, the class token, the position table and the dropout."""

from __future__ import annotations

from typing import Any

from ..layers import touched, why_not_plain
from .swapping import Fused, Row, embed, full_name, takes

VIT = "transformers.models.vit.modeling_vit."


class ViTEmbeddings(Fused):
    def forward(self, pixel_values, bool_masked_pos=None, interpolate_pos_encoding=False):
        patches = self.patch_embeddings
        size = (patches.num_channels, *patches.image_size)
        if (
            bool_masked_pos is not None
            or interpolate_pos_encoding
            or tuple(pixel_values.shape[1:]) != size
            or _why_not(self) is not None
            or not takes(patches.projection, pixel_values)
        ):
            return super().forward(pixel_values, bool_masked_pos, interpolate_pos_encoding)
        position, token = self.position_embeddings, self.cls_token
        return self.dropout(embed(patches.projection, pixel_values, self._vk_backend, pos_embed=position, prefix=token))


def _why_not(embeddings: Any) -> str | None:
    patches = embeddings.patch_embeddings
    if full_name(type(patches)) != VIT + "ViTPatchEmbeddings":
        return f"patch_embeddings is a {type(patches).__name__}"
    return touched("patch_embeddings", patches) or why_not_plain("patch_embeddings.projection", patches.projection)


TABLE = {
    VIT + "ViTEmbeddings": Row(
        {"": (ViTEmbeddings, VIT + "ViTEmbeddings")}, _why_not, "projection, position and class token"
    ),
}
