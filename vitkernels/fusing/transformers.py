"""transformers: an embeddings module holds projection, position table, class token, mask and dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..functional import patch_embed
from ..layers import eager_dtype, touched, why_not_plain
from .swapping import Fused, Row, embed, full_name, takes

VIT = "transformers.models.vit.modeling_vit."
MAE = "transformers.models.vit_mae.modeling_vit_mae."
VIDEO = "transformers.models.videomae.modeling_videomae."


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


class ViTMAEEmbeddings(Fused):
    def forward(self, pixel_values, noise=None, interpolate_pos_encoding=False):
        patches = self.patch_embeddings
        B, N = pixel_values.shape[0], patches.num_patches
        size = (patches.num_channels, *patches.image_size)
        if (
            interpolate_pos_encoding
            or tuple(pixel_values.shape[1:]) != size
            or not (noise is None or tuple(noise.shape) == (B, N))
            or _why_not_mae(self) is not None
            or not takes(patches.projection, pixel_values)
        ):
            return super().forward(pixel_values, noise, interpolate_pos_encoding)
        # Its own masking, of the patches' numbers in place of the patches: what it keeps is the list.
        numbers = torch.arange(N, device=pixel_values.device).expand(B, N).unsqueeze(2)
        keep, mask, ids_restore = self.random_masking(numbers, noise)
        conv, position, token = patches.projection, self.position_embeddings, self.cls_token
        tokens = patch_embed(
            pixel_values, conv.weight, conv.bias, pos_embed=position, prefix=token, keep=keep.squeeze(2),
            stride=conv.stride, padding=conv.padding, out_dtype=eager_dtype(conv.weight, position, token),
            backend=self._vk_backend,
        )  # fmt: skip
        return tokens, mask, ids_restore

    def random_masking(self, sequence, noise=None):  # named, so that a class with a masking of its own is left alone
        return super().random_masking(sequence, noise)


class VideoMAEEmbeddings(Fused):
    def forward(self, pixel_values, bool_masked_pos):
        patches = self.patch_embeddings
        size = (self.config.num_frames, patches.num_channels, *patches.image_size)
        fits = tuple(pixel_values.shape[1:]) == size and pixel_values.is_floating_point()
        keep = bool_masked_pos
        if fits and keep is not None:
            keep = _visible(keep, (pixel_values.shape[0], patches.num_patches), pixel_values.device)
            fits = keep is not None
        if not fits or _why_not_video(self) is not None:
            return super().forward(pixel_values, bool_masked_pos)
        conv = patches.projection
        return patch_embed(
            pixel_values.transpose(1, 2), conv.weight, conv.bias, keep=keep,
            pos_embed=self.position_embeddings.detach().to(pixel_values.device),  # no buffer: it stays on the CPU
            out_dtype=eager_dtype(conv.weight), backend=self._vk_backend,
        )  # fmt: skip


def _visible(masked: torch.Tensor, size: tuple[int, int], device: torch.device) -> torch.Tensor | None:
    """Indices [B,N_keep] of what a mask [B,N] leaves, in order; None unless it is as many in every image.

    Their number has to be read back, as for the selection by the mask that this replaces. A compiler can't.
    """
    if torch.compiler.is_compiling() or masked.dtype != torch.bool or tuple(masked.shape) != size:
        return None
    counts = set((~masked).sum(1).tolist())
    if len(counts) != 1 or counts == {0}:
        return None
    return masked.to(device, torch.uint8).argsort(dim=1, stable=True)[:, : counts.pop()]


def _why_not(embeddings: Any, of: str = VIT + "ViTPatchEmbeddings") -> str | None:
    return _why_not_patches(embeddings, of) or why_not_plain(
        "patch_embeddings.projection", embeddings.patch_embeddings.projection
    )


def _why_not_mae(embeddings: Any) -> str | None:
    return _why_not(embeddings, MAE + "ViTMAEPatchEmbeddings")


def _why_not_video(embeddings: Any) -> str | None:
    if reason := _why_not_patches(embeddings, VIDEO + "VideoMAEPatchEmbeddings"):
        return reason
    name, conv = "patch_embeddings.projection", embeddings.patch_embeddings.projection
    if type(conv) is not nn.Conv3d:
        return f"{name} is a {type(conv).__name__}, not a plain Conv3d"
    if conv.groups != 1 or set(conv.dilation) != {1} or conv.stride != conv.kernel_size or set(conv.padding) != {0}:
        return (
            f"{name} has groups {conv.groups}, dilation {conv.dilation}, stride {conv.stride}, padding "
            f"{conv.padding!r}; 1, 1, {conv.kernel_size} and 0 are what is fused"
        )
    return touched(name, conv)


def _why_not_patches(embeddings: Any, of: str) -> str | None:
    patches = embeddings.patch_embeddings
    if full_name(type(patches)) != of:
        return f"patch_embeddings is a {type(patches).__name__}"
    return touched("patch_embeddings", patches)


def _row(mixin: type[Fused], of: str, why_not: Callable[[Any], str | None], what: str) -> dict[str, Row]:
    return {of: Row({"": (mixin, of)}, why_not, what)}


TABLE = {
    **_row(ViTEmbeddings, VIT + "ViTEmbeddings", _why_not, "projection, position and class token"),
    **_row(
        ViTMAEEmbeddings, MAE + "ViTMAEEmbeddings", _why_not_mae,
        "projection of the visible patches, position and class token",
    ),
    **_row(
        VideoMAEEmbeddings, VIDEO + "VideoMAEEmbeddings", _why_not_video,
        "projection of the tubelets, of the visible ones where there is a mask, and position",
    ),
}  # fmt: skip
