"""The layer, under timm's names, and what layers and fused models share around `patch_embed`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import index
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .dispatch import check_name
from .functional import patch_embed
from .problem import grid_of
from .sharded import are_dtensors

if TYPE_CHECKING:
    from .functional import Channels

Pair = tuple[int, int]
LAYOUTS = ("NCHW", "NHWC", "NCL", "NLC")


class PatchEmbed(nn.Module):
    """Images to patch tokens; parameters are named as in timm (``proj.weight``, ``proj.bias``), so checkpoints load.

    Args:
        img_size: height and width, or None: any size.
        patch_size, in_chans, embed_dim, bias: of the projection.
        norm_layer: called with embed_dim; the norm of the projected patches, before position and prefix.
        flatten: tokens ``[B,N,D]``; False: feature maps ``[B,D,G_h,G_w]``.
        output_fmt: "NLC", "NHWC", "NCHW" or "NCL", instead of `flatten`.
        strict_img_size: take images of img_size alone. Otherwise any that patches fill.
        dynamic_img_pad: pad images below and on the right with zeros until patches fill them.
        stride, padding, mean, std, scale, backend: as in `patch_embed`.

    Raises:
        ValueError: a size is wrong; the message has the numbers.
    """

    def __init__(
        self,
        img_size: int | Pair | None = 224,
        patch_size: int | Pair = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[..., nn.Module] | None = None,
        flatten: bool = True,
        output_fmt: str | None = None,
        bias: bool = True,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        *,
        stride: int | Pair | None = None,
        padding: int | Pair = 0,
        mean: Channels | None = None,
        std: Channels | None = None,
        scale: float | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_name(backend)
        if output_fmt is not None and output_fmt not in LAYOUTS:
            raise ValueError(f"output_fmt must be one of {', '.join(LAYOUTS)}, got {output_fmt!r}")
        self.patch_size = pair("patch_size", patch_size)
        self.stride = self.patch_size if stride is None else pair("stride", stride)
        self.padding = pair("padding", padding, least=0)
        self.strict_img_size = strict_img_size
        self.dynamic_img_pad = dynamic_img_pad
        self.flatten = flatten and output_fmt is None
        self.output_fmt = "NCHW" if output_fmt is None else str(getattr(output_fmt, "value", output_fmt))
        self.mean, self.std = channel_values(mean), channel_values(std)
        self.scale = scale
        self.backend = backend
        self._set_img_size(img_size)
        where: dict[str, Any] = {k: v for k, v in (("device", device), ("dtype", dtype)) if v is not None}
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.stride, self.padding, bias=bias, **where)
        self.norm = norm_layer(embed_dim, **where) if norm_layer else nn.Identity()

    def _set_img_size(self, img_size: int | Pair | None) -> None:
        self.img_size = self.grid_size = self.num_patches = None
        if img_size is not None:
            self.img_size = pair("img_size", img_size)
            self.grid_size = self._grid(self.img_size)
            self.num_patches = self.grid_size[0] * self.grid_size[1]
            if min(self.grid_size) < 1:
                raise ValueError(f"img_size {self.img_size} is smaller than the patch {self.patch_size}")

    def _grid(self, size: Pair) -> Pair:
        y, x = grid_of(size, self.padding, self.patch_size, self.stride)
        return y, x

    def _missing(self, size: Pair) -> Pair:
        """Rows and columns that the last patch lacks to be whole."""
        spare = [s + 2 * pad - P for s, pad, P in zip(size, self.padding, self.patch_size, strict=True)]
        y, x = (-s if s < 0 else -s % S for s, S in zip(spare, self.stride, strict=True))
        return y, x

    def feat_ratio(self, as_scalar: bool = True) -> int | Pair:
        """Pixels from one patch to the next."""
        return max(self.stride) if as_scalar else self.stride

    def dynamic_feat_size(self, img_size: Pair) -> Pair:
        """The grid (G_h, G_w) of images of this size, padding included."""
        y, x = self._missing(img_size) if self.dynamic_img_pad else (0, 0)
        return self._grid((img_size[0] + y, img_size[1] + x))

    @torch.no_grad()
    def set_input_size(self, img_size: int | Pair | None = None, patch_size: int | Pair | None = None) -> None:
        """Take images, or patches, of another size. For patches `proj` is replaced by a resampled one.

        The new weight gives a patch that was enlarged the token that the old weight gave the patch itself (the
        pseudo-inverse resize of FlexiViT, https://arxiv.org/abs/2212.08013).
        """
        new = self.patch_size if patch_size is None else pair("patch_size", patch_size)
        if new != self.patch_size:
            old, like = self.proj, self.proj.weight
            stride = new if self.stride == self.patch_size else self.stride
            self.proj = nn.Conv2d(
                old.in_channels, old.out_channels, new, stride, self.padding,
                bias=old.bias is not None, device=like.device, dtype=like.dtype,
            )  # fmt: skip
            self.proj.weight.copy_(resized_weight(like, new))
            if old.bias is not None and self.proj.bias is not None:
                self.proj.bias.copy_(old.bias)
            for name, parameter in old.named_parameters():
                self.proj.get_parameter(name).requires_grad_(parameter.requires_grad)
            self.proj.train(old.training)
            self.patch_size, self.stride = new, stride
        self._set_img_size(self.img_size if img_size is None else img_size)

    def forward(
        self,
        images: torch.Tensor,
        *,
        pos_embed: torch.Tensor | None = None,
        prefix: torch.Tensor | None = None,
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Images [B,C,H,W] to tokens [B,T+N,D], or what `output_fmt` says; arguments as in `patch_embed`."""
        if reason := why_not_plain("proj", self.proj):
            raise NotImplementedError(f"PatchEmbed reads proj.weight and would pass by what was added: {reason}")
        layout = "NLC" if self.flatten else self.output_fmt
        if layout != "NLC" and not (pos_embed is prefix is keep is None):
            raise ValueError(f"pos_embed, prefix and keep go with a sequence, output_fmt NLC; it is {layout}")
        images, affine = self._fitted(images)
        fused = isinstance(self.norm, nn.Identity)
        x = patch_embed(
            images, self.proj.weight, self.proj.bias, keep=keep, stride=self.stride, padding=self.padding,
            pos_embed=pos_embed if fused else None, prefix=prefix if fused else None, backend=self.backend, **affine,
        )  # fmt: skip
        H, W = images.shape[-2:]
        grid = self._grid((H, W))
        x = self.norm(in_layout(x, layout, grid))
        if fused or layout != "NLC":
            return x
        return with_position(x, pos_embed, prefix, keep, grid[0] * grid[1])

    def _fitted(self, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        """The images, padded where asked, and the normalisation that is still to be done."""
        affine: dict[str, Any] = {"mean": self.mean, "std": self.std, "scale": self.scale}
        if images.ndim != 4:
            raise ValueError(f"images must be [B,C,H,W], got {list(images.shape)}")
        H, W = images.shape[-2:]
        y, x = self._missing((H, W))
        if self.img_size is not None:
            if self.strict_img_size and (H, W) != self.img_size:
                raise ValueError(
                    f"images are {H}x{W}, this layer takes {self.img_size[0]}x{self.img_size[1]}; "
                    "others with strict_img_size=False, or after set_input_size"
                )
            if not self.strict_img_size and not self.dynamic_img_pad and (y or x):
                raise ValueError(
                    f"patches {self.patch_size} with stride {self.stride} do not fill images of {H}x{W}: they lack "
                    f"{y} rows and {x} columns; dynamic_img_pad=True adds them"
                )
        if not self.dynamic_img_pad or not (y or x):
            return images, affine
        if self.mean is not None:  # zeros go around the normalised image
            images = normalised(images, self.proj.weight.dtype, **affine)
            affine = {}
        return F.pad(images, (0, x, 0, y)), affine

    def extra_repr(self) -> str:
        return f"img_size={self.img_size}, grid_size={self.grid_size}, backend={self.backend!r}"


def pair(name: str, value: int | Pair, least: int = 1) -> Pair:
    """(y, x) of one or two ints."""
    try:
        values = tuple(index(v) for v in value) if isinstance(value, Sequence) else (index(value),) * 2
    except TypeError:
        raise TypeError(f"{name} must be an int or two, got {value!r}") from None
    if len(values) != 2 or min(values) < least:
        raise ValueError(f"{name} must be an int or two, at least {least}; got {value!r}")
    return values


def channel_values(values: Channels | None) -> tuple[float, ...] | None:
    """Numbers, so that no call has to read a tensor back."""
    return None if values is None else tuple(torch.as_tensor(values, dtype=torch.float64).flatten().tolist())


def normalised(
    images: torch.Tensor,
    dtype: torch.dtype,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """(images·scale − mean)/std in dtype, taken in at least fp32: what `patch_embed` does on its way."""
    if scale is None:
        scale = 1 / 255 if images.dtype == torch.uint8 else 1.0
    if scale == 1 and mean is None and std is None:
        return images.to(dtype)
    x = images.to(torch.promote_types(dtype, torch.float32)) * scale
    if mean is not None:
        x = x - x.new_tensor(mean).view(-1, 1, 1)
    if std is not None:
        x = x / x.new_tensor(std).view(-1, 1, 1)
    return x.to(dtype)


def in_layout(tokens: torch.Tensor, layout: str, grid: tuple[int, ...]) -> torch.Tensor:
    """Tokens [B,N,D] as a view in another layout."""
    if layout == "NCL":
        return tokens.transpose(1, 2)
    if layout == "NLC":
        return tokens
    x = tokens.unflatten(1, grid)  # [B, G_h, G_w, D]
    return x.permute(0, 3, 1, 2) if layout == "NCHW" else x


def with_position(
    tokens: torch.Tensor,
    pos_embed: torch.Tensor | None,
    prefix: torch.Tensor | None,
    keep: torch.Tensor | None = None,
    patches: int | None = None,
) -> torch.Tensor:
    """Add positions to tokens [B,N,D] and put prefix in front, where a norm keeps `patch_embed` from doing it.

    With keep [B,N_keep], tokens are [B,N_keep,D] and `patches` is N.
    """
    B, N, D = tokens.shape
    T = 0 if prefix is None else prefix.shape[-2]
    if pos_embed is not None:
        table = pos_embed if pos_embed.ndim == 3 else pos_embed[None]
        N = N if patches is None else patches
        if table.shape[1] not in (N, T + N):
            raise ValueError(f"pos_embed {list(pos_embed.shape)} needs N = {N} rows, or T+N = {T + N} with T = {T}")
        head, table = table.split([table.shape[1] - N, N], 1)
        if keep is not None:
            table = table.expand(B, -1, -1).gather(1, keep.long()[..., None].expand(-1, -1, D))
        tokens = tokens + table
        if prefix is not None and head.shape[1]:
            prefix = prefix + head
    return tokens if prefix is None else torch.cat([prefix.expand(B, -1, -1), tokens], 1)


def to_patches(images: torch.Tensor, patch_size: Pair) -> torch.Tensor:
    """Images [B,C,H,W] cut to patches [B,N,K], the pixels of each in the order (y, x, c)."""
    B, C, H, W = images.shape
    P_h, P_w = patch_size
    if H % P_h or W % P_w:
        raise ValueError(f"patches of {P_h}x{P_w} do not fill images of {H}x{W}")
    grid = images.unflatten(3, (-1, P_w)).unflatten(2, (-1, P_h))  # [B, C, G_h, P_h, G_w, P_w]
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, P_h * P_w * C)


def normed_patch_embed(
    images: torch.Tensor,
    before: nn.Module,
    linear: nn.Linear,
    after: nn.Module,
    patch_size: Pair,
    *,
    pos_embed: torch.Tensor | None = None,
    prefix: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Norm of the raw patch in the order (y, x, c), Linear, norm of the token; then position and prefix: [B,T+N,D]."""
    tokens = project_patches(before(to_patches(images, patch_size)), linear, backend)
    return with_position(after(tokens), pos_embed, prefix)


def project_patches(patches: torch.Tensor, linear: nn.Linear, backend: str = "auto") -> torch.Tensor:
    """Cut patches [B,…,K] to tokens [B,…,D]: an image of K channels and N x 1 pixels, with patches of one pixel.

    These are views: nothing is copied.
    """
    x = patches.flatten(1, -2).transpose(1, 2).unsqueeze(-1)
    weight = linear.weight[:, :, None, None]
    tokens = patch_embed(x, weight, linear.bias, out_dtype=eager_dtype(weight), backend=backend)
    return tokens.unflatten(1, patches.shape[1:-1])


def eager_dtype(weight: torch.Tensor, *added: torch.Tensor | None) -> torch.dtype:
    """The dtype of tokens in eager PyTorch, where adding an fp32 table to autocast's bf16 tokens makes them fp32."""
    dtype = weight.dtype
    if torch._C._is_any_autocast_enabled() and not weight.is_meta and torch.is_autocast_enabled(weight.device.type):
        dtype = torch.get_autocast_dtype(weight.device.type)
    for tensor in added:
        if tensor is not None and tensor.dtype != dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def resized_weight(weight: torch.Tensor, patch_size: Pair) -> torch.Tensor:
    """weight [D,C,P_h,P_w] for another patch size; see `PatchEmbed.set_input_size`."""
    old = weight.shape[-2:]
    basis = torch.eye(old[0] * old[1], dtype=torch.float64, device=weight.device).unflatten(1, (1, *old))
    resize = F.interpolate(basis, patch_size, mode="bicubic", antialias=True).flatten(1)  # [old pixels, new pixels]
    W = weight.flatten(2).double() @ torch.linalg.pinv(resize).T
    return W.unflatten(2, patch_size).to(weight.dtype)


def touched(name: str, module: nn.Module) -> str | None:
    """What hangs on `module` that only a call of it would run."""
    if reason := quantised(name, module):
        return reason
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"{name} has hooks"
    if "forward" in module.__dict__:
        return f"{name}.forward was replaced on the instance"
    return None


def quantised(name: str, module: nn.Module) -> str | None:
    """Whether its weight is a tensor with a product of its own, as torchao's."""
    weight = module._parameters.get("weight")
    if is_traceable_wrapper_subclass(weight) and not are_dtensors(weight):
        return f"{name}'s weight is a {type(weight).__name__}"
    return None


def why_not_plain(
    name: str, conv: Any, *kinds: type[nn.Module], ask: Callable[[str, nn.Module], str | None] = touched
) -> str | None:
    """Why `patch_embed` of conv.weight and conv.bias would not be all that a call of `conv` does; None: it is.

    kinds: Conv2d where nothing is said; a fused one is what it was. `ask`: what hangs on it.
    """
    kinds, plain = kinds or (nn.Conv2d,), getattr(type(conv), "_vk_base", type(conv))
    if plain not in kinds:
        return f"{name} is a {plain.__name__}, not a plain {' or '.join(kind.__name__ for kind in kinds)}"
    padded = conv.padding == "same" or (any(padding_of(conv)) and conv.padding_mode != "zeros")
    if conv.groups != 1 or max(conv.dilation) > 1 or padded:
        return (
            f"{name} has groups {conv.groups}, dilation {conv.dilation}, padding {conv.padding!r} "
            f"of mode {conv.padding_mode!r}; 1, 1 and numbers of zeros are what is fused"
        )
    return ask(name, conv)


def padding_of(conv: Any) -> tuple[int, ...]:
    """In numbers, of a convolution that `why_not_plain` takes."""
    return (0,) * len(conv.kernel_size) if conv.padding == "valid" else conv.padding
