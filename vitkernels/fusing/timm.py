"""timm: the tokens of VisionTransformer are finished in `forward_features` and handed on through the calls that would
have made them. `patch_embed` lets finished `Tokens` pass, `_pos_embed` unpacks them.

Other classes' own code runs on `Pending` tokens, up to the end of `_pos_embed` or to `pos_drop`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import nn

from ..layers import in_layout, touched, why_not_plain
from . import pending, structure
from .pending import Elsewhere, computed, noted, noting
from .pixels import Pixels
from .swapping import Fused, Row, Tokens, at_each_call, embed, grid_of, replaced, takes


class PatchEmbed(Fused):
    def forward(self, x):
        if isinstance(x, Tokens):
            return x
        if (front := _projection(self, x)) is None:
            return super().forward(x)
        images, layout, grid = front
        return self.norm(in_layout(embed(self.proj, images, self._vk_backend), layout, grid))


class VisionTransformer(Fused):
    def forward_features(self, x, *args, **kwargs):
        if (front := _front_end(self, x)) is not None:
            images, pos, prefix = front
            x = Tokens(embed(self.patch_embed.proj, images, self._vk_backend, pos_embed=pos, prefix=prefix))
        return super().forward_features(x, *args, **kwargs)

    def _pos_embed(self, x):
        if not isinstance(x, Tokens):
            return super()._pos_embed(x)
        return x.tokens if self.pos_embed is None else self.pos_drop(x.tokens)


class PosEmbed(Fused):
    """A model with `_pos_embed`."""

    def forward_features(self, x, *args, **kwargs):
        if replaced(self, "_pos_embed"):
            return super().forward_features(x, *args, **kwargs)
        return noted(self, self.patch_embed.modules(), super().forward_features, x, *args, **kwargs)

    def _pos_embed(self, x):
        return computed(super()._pos_embed(x))


class BeforePosDrop(Fused):
    """A model that adds position and prefix right before `pos_drop`."""

    def forward_features(self, x, *args, **kwargs):
        if not isinstance(self.pos_drop, PosDrop):
            return super().forward_features(x, *args, **kwargs)
        inside = (*self.patch_embed.modules(), self.pos_drop)
        return noted(self, inside, super().forward_features, x, *args, **kwargs)


class PosDrop(Fused):
    def forward(self, input):
        return super().forward(computed(input))


class NaFlexEmbeds(Fused):
    """A Linear, given images to cut."""

    def forward(self, x, patch_coord=None, patch_valid=None):
        forward = super().forward
        if patch_coord is not None:
            return forward(x, patch_coord, patch_valid)

        def of_images():
            if not noting():
                return forward(x)
            if reason := _why_not_naflex(self):
                raise Elsewhere(reason)
            return forward(Pixels(x, self._vk_backend))

        return noted(self, [module for module in self.modules() if module is not self], of_images)


def _why_not(model: Any) -> str | None:
    patches = model.patch_embed
    if not isinstance(patches.norm, nn.Identity):
        return f"patch_embed.norm is a {type(patches.norm).__name__}"
    layout, wanted = _layout(patches), "NHWC" if model.dynamic_img_size else "NLC"
    if layout != wanted:
        return f"patch_embed gives {layout}, where {wanted} is what the position is added to"
    return (
        touched("patch_embed", patches)
        or touched("patch_embed.norm", patches.norm)
        or why_not_plain("patch_embed.proj", patches.proj)
    )


@at_each_call(lambda patches: why_not_plain("proj", patches.proj))
def _projection(patches: Any, x: torch.Tensor) -> tuple[torch.Tensor, str, tuple[int, ...]] | None:
    """The images to be projected, the layout that is wanted, and the grid."""
    images = _images(patches, x)
    return None if images is None else (images, _layout(patches), grid_of(patches.proj, images))


def _why_not_now(model: Any) -> str | None:
    if not isinstance(model.patch_embed, PatchEmbed):
        return "patch_embed was replaced"
    return replaced(model, "_pos_embed") or _why_not(model)


@at_each_call(_why_not_now)
def _front_end(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None] | None:
    """Images, position table and prefix tokens."""
    images = _images(model.patch_embed, x)
    return None if images is None else (images, _position(model, images), _prefix(model))


def _layout(patches: Any) -> str:
    return "NLC" if patches.flatten else patches.output_fmt.value


def _images(patches: Any, x: torch.Tensor) -> torch.Tensor | None:
    """x, padded as timm would; None where timm itself has to run, or to refuse."""
    if not takes(patches.proj, x):
        return None
    size, lacking = x.shape[-2:], [-s % P for s, P in zip(x.shape[-2:], patches.patch_size, strict=True)]
    if patches.img_size is not None:
        if patches.strict_img_size and tuple(size) != tuple(patches.img_size):
            return None
        if not patches.strict_img_size and not patches.dynamic_img_pad and any(lacking):
            return None
    if patches.dynamic_img_pad and any(lacking):
        x = F.pad(x, (0, lacking[1], 0, lacking[0]))
    return x


def _position(model: Any, images: torch.Tensor) -> torch.Tensor | None:
    if model.pos_embed is None or not model.dynamic_img_size:
        return model.pos_embed
    return resample_abs_pos_embed(
        model.pos_embed,
        new_size=grid_of(model.patch_embed.proj, images),
        old_size=model.patch_embed.grid_size,
        num_prefix_tokens=0 if model.no_embed_class else model.num_prefix_tokens,
    )


def _prefix(model: Any) -> torch.Tensor | None:
    tokens = [t for t in (model.cls_token, model.reg_token) if t is not None]
    return torch.cat(tokens, 1) if len(tokens) > 1 else tokens[0] if tokens else None


def _why_not_inside(model: Any) -> str | None:
    """Of the projections, which are fused by their structure, and what is around them."""
    for name, module in model.patch_embed.named_modules(prefix="patch_embed"):
        reason = structure.why_not(module) if structure.patchifies(module) else touched(name, module)
        if reason:
            return reason
    return None


def _why_not_naflex(embeds: Any) -> str | None:
    if not embeds.is_linear:
        return "it projects by a convolution"
    if embeds.norm_input is not None:
        return f"norm_input is a {type(embeds.norm_input).__name__}"
    if type(embeds.proj) is not nn.Linear:
        return f"proj is a {type(embeds.proj).__name__}, not a plain Linear"
    return pending.why_not(embeds)


MODELS = "timm.models."
DROPOUT = "torch.nn.modules.dropout.Dropout"
TABLE = {
    MODELS + "vision_transformer.VisionTransformer": Row(
        {
            "": (VisionTransformer, MODELS + "vision_transformer.VisionTransformer"),
            "patch_embed": (PatchEmbed, "timm.layers.patch_embed.PatchEmbed"),
        },
        _why_not,
        "projection, position and prefix tokens",
    ),
    **{
        MODELS + name: Row(
            {"": (PosEmbed, MODELS + name)}, _why_not_inside, "projection, position and prefix tokens", projects=False
        )
        for name in ("eva.Eva", "deit.VisionTransformerDistilled", "qwen3_vit.Qwen3VitEncoder")
    },
    **{
        MODELS + name: Row(
            {"": (BeforePosDrop, MODELS + name), "pos_drop": (PosDrop, DROPOUT)}, _why_not_inside, what, projects=False
        )
        for name, what in {
            "beit.Beit": "projection, position and class token",
            "cait.Cait": "projection and position",
            "convit.ConVit": "projection and position",
            "crossvit.CrossVit": "projections, position and class token",
        }.items()
    },
    MODELS + "naflexvit.NaFlexEmbeds": Row(
        {"": (NaFlexEmbeds, MODELS + "naflexvit.NaFlexEmbeds")},
        _why_not_naflex,
        "of images: projection, position and prefix tokens",
    ),
}
