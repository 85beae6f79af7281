"""A whole Vision Transformer with the signature, the mathematics and the state_dict of vit_pytorch's ViT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from .dispatch import check_name
from .functional import patch_embed
from .layers import Pair, channel_values, eager_dtype, normalised, normed_patch_embed, pair, to_patches

if TYPE_CHECKING:
    from .functional import Channels


class ViT(nn.Module):
    """Vision Transformer (Dosovitskiy et al., 2021, https://arxiv.org/abs/2010.11929); takes a vit_pytorch state_dict.

    ``head(transformer(patch_embed(images)))`` is ``model(images)``.

    Args:
        image_size, patch_size, num_classes, dim, depth, heads, mlp_dim, pool, channels, dim_head, dropout, emb_dropout:
            as in vit_pytorch: pool is "cls" or "mean"; num_classes 0 leaves the head out and gives tokens.
        patch_norm: LayerNorms of the raw patch and of the projected one, as vit_pytorch has them. Without them the
            front end (normalisation, projection, position, class token) is one `patch_embed`.
        mean, std, scale, backend: as in `patch_embed`, so that uint8 images go in as they are.

    Raises:
        ValueError: patches do not fill the image, or pool is neither; the message has the numbers.
    """

    def __init__(
        self,
        *,
        image_size: int | Pair,
        patch_size: int | Pair,
        num_classes: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        pool: str = "cls",
        channels: int = 3,
        dim_head: int = 64,
        dropout: float = 0.0,
        emb_dropout: float = 0.0,
        patch_norm: bool = True,
        mean: Channels | None = None,
        std: Channels | None = None,
        scale: float | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        check_name(backend)
        (H, W), (P_h, P_w) = pair("image_size", image_size), pair("patch_size", patch_size)
        if H % P_h or W % P_w:
            raise ValueError(f"patches of {P_h}x{P_w} do not fill images of {H}x{W}")
        if pool not in ("cls", "mean"):
            raise ValueError(f"pool must be 'cls' or 'mean', got {pool!r}")
        self.patch_size = P_h, P_w
        self.patch_norm = patch_norm
        self.mean, self.std = channel_values(mean), channel_values(std)
        self.scale = scale
        self.backend = backend
        N, K, T = (H // P_h) * (W // P_w), P_h * P_w * channels, int(pool == "cls")
        self.to_patch_embedding = nn.Sequential(
            ToPatches(self.patch_size),
            nn.LayerNorm(K) if patch_norm else nn.Identity(),
            nn.Linear(K, dim),
            nn.LayerNorm(dim) if patch_norm else nn.Identity(),
        )
        self.cls_token = nn.Parameter(torch.randn(T, dim))
        self.pos_embedding = nn.Parameter(torch.randn(T + N, dim))
        self.dropout = nn.Dropout(emb_dropout)
        self.transformer = Transformer(dim, depth, heads, dim_head, mlp_dim, dropout)
        self.pool = pool
        self.to_latent = nn.Identity()
        self.mlp_head = nn.Linear(dim, num_classes) if num_classes > 0 else None

    def patch_embed(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B,C,H,W] to tokens [B,T+N,D], dropped out in training. Smaller images take the table's first rows."""
        slots: Any = self.to_patch_embedding
        _, before, linear, after = slots
        affine: dict[str, Any] = {"mean": self.mean, "std": self.std, "scale": self.scale}
        P_h, P_w = self.patch_size
        H, W = images.shape[-2:]
        pos = self.pos_embedding[: self.cls_token.shape[0] + (H // P_h) * (W // P_w)]
        added: dict[str, Any] = {"pos_embed": pos, "prefix": self.cls_token, "backend": self.backend}
        if self.patch_norm:
            images = normalised(images, linear.weight.dtype, **affine)
            return self.dropout(normed_patch_embed(images, before, linear, after, self.patch_size, **added))
        if H % P_h or W % P_w:
            raise ValueError(f"patches of {P_h}x{P_w} do not fill images of {H}x{W}")
        weight = linear.weight.unflatten(1, (P_h, P_w, -1)).permute(0, 3, 1, 2)  # [D, C, P_h, P_w]
        dtype = eager_dtype(weight, pos, self.cls_token)
        return self.dropout(patch_embed(images, weight, linear.bias, out_dtype=dtype, **affine, **added))

    def head(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [B,T+N,D] to logits [B,num_classes]; with num_classes 0, the tokens."""
        if self.mlp_head is None:
            return tokens
        return self.mlp_head(self.to_latent(tokens.mean(1) if self.pool == "mean" else tokens[:, 0]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.transformer(self.patch_embed(images)))


class ToPatches(nn.Module):
    """The first slot of to_patch_embedding, which vit_pytorch's wrappers (MAE, SimMIM) call by itself."""

    def __init__(self, patch_size: Pair):
        super().__init__()
        self.patch_size = patch_size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return to_patches(images, self.patch_size)


class Transformer(nn.Module):
    """Pre-norm blocks and a last norm, tokens [B,T+N,D] to tokens."""

    def __init__(self, dim: int, depth: int, heads: int, dim_head: int, mlp_dim: int, dropout: float = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.layers = nn.ModuleList(
            nn.ModuleList([Attention(dim, heads, dim_head, dropout), FeedForward(dim, mlp_dim, dropout)])
            for _ in range(depth)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        block: Any
        for block in self.layers:
            attention, feed_forward = block
            x = x + attention(x)
            x = x + feed_forward(x)
        return self.norm(x)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int = 8, dim_head: int = 64, dropout: float = 0.0):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        projected = heads != 1 or dim_head != dim
        self.to_out = (
            nn.Sequential(nn.Linear(heads * dim_head, dim), nn.Dropout(dropout)) if projected else nn.Identity()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.to_qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, T+N, dim_head] each
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.to_out(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0):
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, hidden_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, dim),
            nn.Dropout(dropout),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)
