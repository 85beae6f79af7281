"""transformers: an embeddings module holds projection, position table, class token, mask and dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..functional import patch_embed
from ..layers import eager_dtype, pair, touched, why_not_plain
from .swapping import Fused, Row, at_each_call, count, embed, full_name, replaced, takes

VIT = "transformers.models.vit.modeling_vit."
MAE = "transformers.models.vit_mae.modeling_vit_mae."
VIDEO = "transformers.models.videomae.modeling_videomae."
LLAMA4 = "transformers.models.llama4.modeling_llama4."


class ViTEmbeddings(Fused):
    def forward(self, pixel_values, bool_masked_pos=None, interpolate_pos_encoding=False):
        if bool_masked_pos is not None or interpolate_pos_encoding:
            count(self, "bool_masked_pos or interpolate_pos_encoding")
            return super().forward(pixel_values, bool_masked_pos, interpolate_pos_encoding)
        if (front := _front_end(self, pixel_values)) is None:
            return super().forward(pixel_values, bool_masked_pos, interpolate_pos_encoding)
        conv, position, token = front
        return self.dropout(embed(conv, pixel_values, self._vk_backend, pos_embed=position, prefix=token))


class ViTMAEEmbeddings(Fused):
    def forward(self, pixel_values, noise=None, interpolate_pos_encoding=False):
        if interpolate_pos_encoding:
            count(self, "interpolate_pos_encoding")
            return super().forward(pixel_values, noise, interpolate_pos_encoding)
        if (front := _masked_front_end(self, pixel_values, noise)) is None:
            return super().forward(pixel_values, noise, interpolate_pos_encoding)
        conv, position, token, numbers = front
        # Its own masking, of the patches' numbers in place of the patches: what it keeps is the list.
        keep, mask, ids_restore = self.random_masking(numbers, noise)
        keep = keep.squeeze(2)
        tokens = embed(conv, pixel_values, self._vk_backend, pos_embed=position, prefix=token, keep=keep)
        return tokens, mask, ids_restore

    def random_masking(self, sequence, noise=None):  # named, so that a class with a masking of its own is left alone
        return super().random_masking(sequence, noise)


class VideoMAEEmbeddings(Fused):
    def forward(self, pixel_values, bool_masked_pos):
        if (front := _video_front_end(self, pixel_values, bool_masked_pos)) is None:
            return super().forward(pixel_values, bool_masked_pos)
        conv, position, keep = front
        return embed(conv, pixel_values.transpose(1, 2), self._vk_backend, pos_embed=position, keep=keep)


class Llama4UnfoldConvolution(Fused):
    def forward(self, hidden_states):
        if (weight := _unfolded_weight(self, hidden_states)) is None:
            return super().forward(hidden_states)
        return patch_embed(
            hidden_states, weight, self.linear.bias, stride=self.unfold.stride, out_dtype=eager_dtype(weight),
            backend=self._vk_backend,
        )  # fmt: skip


def _why_not(embeddings: Any, of: str = VIT + "ViTPatchEmbeddings") -> str | None:
    return _why_not_patches(embeddings, of) or why_not_plain(
        "patch_embeddings.projection", embeddings.patch_embeddings.projection
    )


def _why_not_mae(embeddings: Any) -> str | None:
    return _why_not(embeddings, MAE + "ViTMAEPatchEmbeddings")


def _why_not_video(embeddings: Any) -> str | None:
    if reason := _why_not_patches(embeddings, VIDEO + "VideoMAEPatchEmbeddings"):
        return reason
    return why_not_plain("patch_embeddings.projection", embeddings.patch_embeddings.projection, nn.Conv3d)


def _why_not_patches(embeddings: Any, of: str) -> str | None:
    patches = embeddings.patch_embeddings
    if full_name(type(patches)) != of:
        return f"patch_embeddings is a {type(patches).__name__}"
    return touched("patch_embeddings", patches)


def _why_not_unfold(patches: Any) -> str | None:
    unfold, linear = patches.unfold, patches.linear
    if type(linear) is not nn.Linear:
        return f"linear is a {type(linear).__name__}, not a plain Linear"
    if type(unfold) is not nn.Unfold or (unfold.padding, unfold.dilation) != (0, 1):
        return f"unfold is {unfold}"
    return touched("unfold", unfold) or touched("linear", linear)


@at_each_call(_why_not)
def _front_end(embeddings: Any, images: torch.Tensor) -> tuple[nn.Module, torch.Tensor, torch.Tensor] | None:
    """Projection, position table and class token."""
    return _parts(embeddings, images)


def _parts(embeddings: Any, images: torch.Tensor) -> tuple[nn.Module, torch.Tensor, torch.Tensor] | None:
    patches = embeddings.patch_embeddings
    if tuple(images.shape[1:]) != (patches.num_channels, *patches.image_size) or not takes(patches.projection, images):
        return None
    return patches.projection, embeddings.position_embeddings, embeddings.cls_token


@at_each_call(lambda embeddings: replaced(embeddings, "random_masking") or _why_not_mae(embeddings))
def _masked_front_end(
    embeddings: Any, images: torch.Tensor, noise: torch.Tensor | None
) -> tuple[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """The same, and the patches' numbers, [B,N,1]."""
    B, N = images.shape[0], embeddings.patch_embeddings.num_patches
    if (parts := _parts(embeddings, images)) is None or not (noise is None or tuple(noise.shape) == (B, N)):
        return None
    return *parts, torch.arange(N, device=images.device).expand(B, N).unsqueeze(2)


@at_each_call(_why_not_video)
def _video_front_end(
    embeddings: Any, videos: torch.Tensor, masked: torch.Tensor | None
) -> tuple[nn.Module, torch.Tensor, torch.Tensor | None] | None:
    """Projection, position table, and the visible tubelets where there is a mask."""
    patches = embeddings.patch_embeddings
    size = (embeddings.config.num_frames, patches.num_channels, *patches.image_size)
    if tuple(videos.shape[1:]) != size or not videos.is_floating_point():
        return None
    keep = None if masked is None else _visible(masked, (videos.shape[0], patches.num_patches), videos.device)
    if keep is None and masked is not None:
        return None
    # No buffer: it stays on the CPU. It is added in the dtype of the projection.
    position = embeddings.position_embeddings.detach().to(videos.device, eager_dtype(patches.projection.weight))
    return patches.projection, position, keep


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


@at_each_call(_why_not_unfold)
def _unfolded_weight(patches: Any, images: torch.Tensor) -> torch.Tensor | None:
    """The Linear's as a convolution's, [D,C,P_h,P_w]."""
    weight, P = patches.linear.weight, pair("kernel_size", patches.unfold.kernel_size)
    same_dtype = images.dtype == weight.dtype or torch.is_autocast_enabled(images.device.type)
    if images.ndim != 4 or not images.is_floating_point() or not same_dtype:
        return None
    fits = images.shape[2] >= P[0] and images.shape[3] >= P[1] and weight.shape[1] == images.shape[1] * P[0] * P[1]
    return weight.unflatten(1, (-1, *P)) if fits else None


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
    **_row(Llama4UnfoldConvolution, LLAMA4 + "Llama4UnfoldConvolution", _why_not_unfold, "projection"),
}  # fmt: skip
