"""Arguments of `patch_embed` of chosen sizes, and problems without tensors; testing/random_problems.py draws any."""

import random
from math import prod
from unittest import mock

import torch

from vitkernels.problem import Layout, PatchProblem


def images_of(*shape, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


def arguments(
    B=3, C=3, H=32, W=48, P=(8, 16), D=40, T=1, *, pixels=torch.bfloat16, weights=torch.bfloat16, pos="T+N",
    channels_last=False, kept=None, device="cpu", **more,
):  # fmt: skip
    """Random tensors for images [B,C,H,W]; `pos` says which rows the position table has, `kept` how many patches
    of each image are kept, some perhaps twice."""
    g = torch.Generator().manual_seed(B * H + W + D)
    P_h, P_w = (P, P) if isinstance(P, int) else P
    S, pad = more.get("stride"), more.get("padding", 0)
    N = ((H + 2 * pad - P_h) // (S or P_h) + 1) * ((W + 2 * pad - P_w) // (S or P_w) + 1)
    images = torch.randint(0, 256, (B, C, H, W), generator=g)
    images = (images if pixels == torch.uint8 else images / 128 - 1).to(pixels)
    if channels_last:
        images = images.to(memory_format=torch.channels_last)

    def normal(*shape):
        return torch.randn(shape, generator=g).to(weights)

    rows = {"T+N": (T + N, D), "N": (1, N, D), "B": (B, T + N, D)}.get(pos)
    call = dict(
        images=images,
        weight=normal(D, C, P_h, P_w) / (C * P_h * P_w) ** 0.5,
        bias=normal(D),
        pos_embed=None if rows is None else normal(*rows),
        prefix=normal(T, D) if T else None,
        **more,
    )
    if kept is not None:
        call["keep"] = torch.randint(N, (B, kept), generator=g)
    return on(device, call)


def on(device, call):
    return {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in call.items()}


def dense(*sizes: int) -> tuple[int, ...]:
    """Strides."""
    return tuple(prod(sizes[i + 1 :]) for i in range(len(sizes)))


def described(
    B=2, C=3, F=1, H=32, W=32, P=(1, 16, 16), S=None, pad=(0, 0, 0), *, D=64, T=0, keep=None, pos_rows=0, strides=None,
    normalised=False, scale=1.0, image=torch.float16, compute=torch.float16,
) -> PatchProblem:  # fmt: skip
    """A problem of these sizes, of which there need be no tensors."""
    return PatchProblem(
        B=B, C=C, F=F, H=H, W=W, P=P, S=S or P, pad=pad, D=D, T=T, n_keep=keep, video=F > 1,
        tensors=(
            Layout(image, tuple(strides or dense(B, C, F, H, W))), Layout(compute, dense(D, C, *P)),
            Layout(compute, (1,)), Layout(compute, (0, D, 1)) if pos_rows else None,
            Layout(compute, (0, D, 1)) if T else None, None if keep is None else Layout(torch.int64, (keep, 1)),
        ), has_bias=True, pos_rows=pos_rows,
        pos_per_image=False, mean=(0.5,) * C if normalised else None, std=None, scale=scale,
        image_dtype=image, weight_dtype=compute, compute_dtype=compute, out_dtype=compute, device=torch.device("cpu"),
    )  # fmt: skip


def drawn(rng: random.Random, large: bool) -> PatchProblem:
    """A random problem; a large one has images of gigabytes and more."""
    one = rng.choice
    video = rng.random() < 0.3
    C, H, W, F = one((1, 3, 3, 4, 12)), rng.randint(1, 70), rng.randint(1, 70), rng.randint(1, 9) if video else 1
    if large:
        C, H, W = one((1, 3, 16, 100)), rng.randint(500, 60_000), rng.randint(500, 60_000)
        F = rng.randint(1, 300) if video else 1
    side = one((1, 2, 7, 14, 16, 32, 200)) if large else one((1, 2, 3, 7, 14, 16))
    P = (rng.randint(1, min(F, 4)), min(H, side), min(W, one((side, side, 8, 5))))
    pad = tuple(rng.randint(0, p) if rng.random() < 0.2 else 0 for p in P[1:])
    S = tuple(one((p, p, max(1, p // 2), p + 3)) for p in P)
    pad = (rng.randint(0, 1) if video and rng.random() < 0.2 else 0, *pad)
    layout = one(("planar", "planar", "last", "apart", "expanded"))
    strides = dense(1, C, F, H, W)
    if layout == "last":
        strides = (F * H * W * C, 1, H * W * C, W * C, C)
    elif layout == "apart":  # cut out of larger images
        step, strides = 1, []
        for size in (W, H, F, C, 1):
            strides.insert(0, step * one((1, 1, 2)))
            step = strides[0] * (size + rng.randint(0, 16))
    elif layout == "expanded":
        strides = (strides[0], 0, *strides[2:])
    most = max(1, (2**31 - 2**17) // described(1, C, F, H, W, P, S, pad).N)
    B = rng.randint(1, min(most, 2**20)) if large else rng.randint(1, 5)
    return described(B, C, F, H, W, P, S, pad, strides=tuple(strides))


def drawn_patches(rng: random.Random, image: torch.dtype) -> PatchProblem:
    """A random problem whose pixels lie side by side, as fast loaders want them."""
    one = rng.choice
    compute = one((torch.float16,) * 3 + (torch.bfloat16, torch.float32, torch.float64))
    P = one((2, 4, 8, 10, 14, 14, 16, 16, 16, 18, 32, 48, 130))
    H, W, C, B = rng.randint(1, 9) * P + one((0, 1)), rng.randint(1, 40) * P, one((1, 3, 3, 4)), rng.randint(1, 300)
    H, W = H + one((0, 0, 3)), W + one((0, 0, 0, 2, 8))
    pitch = W + one((0, 0, 4, 16))
    strides = one((
        (C * H * pitch, H * pitch, H * pitch, pitch, 1), (C * H * pitch + 8, H * pitch, 0, pitch, 1),
        (H * W * C, 1, H * W * C, W * C, C),
    ))  # fmt: skip
    pad = one((0, 0, 0, 0, 2))
    return described(
        B, C, 1, H, W, (1, P, P), (1, one((P, P, P // 2)), one((P, P, P, P + 2))), (0, pad, pad), strides=strides,
        image=image, compute=compute, D=one((8, 72, 256, 1000)), normalised=rng.random() < 0.3,
        keep=5 if rng.random() < 0.1 else None,
    )  # fmt: skip


class Drawn:
    """Dice for a problem of 16 bits, its product's type and its pixels'."""

    def __init__(self, seed: int):
        self.rng, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.one = self.rng.choice
        self.T = self.one((torch.bfloat16, torch.float16))
        self.pixels = (torch.uint8, self.T, torch.float32)[seed % 3]

    def images(self, *shape: int) -> torch.Tensor:
        images = torch.rand(shape, generator=self.generator)
        return (images * 255).byte() if self.pixels == torch.uint8 else images.to(self.pixels)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def arguments(self, images: torch.Tensor, D: int, C: int, *P: int) -> dict:
        found = {"images": images, "weight": (self.normal(D, C, *P) * (C * prod(P)) ** -0.5).to(self.T)}
        if self.rng.random() < 0.5:
            found["bias"] = self.normal(D).to(self.T)
        if self.rng.random() < 0.5:
            found["prefix"] = self.normal(self.one((1, 2, 5)), D).to(self.T)
        return found


def drawn_for_the_copy_engine(seed: int, in_groups: bool = False) -> dict:
    """Random arguments whose patches the copy engine of sm_90 cuts, for products of 16 bits; `in_groups`: with widths
    that are no multiple of 16, so that few of a line's patches begin on 16 bytes."""
    drawn = Drawn(seed)
    rng, one, pixels = drawn.rng, drawn.one, drawn.pixels
    layout = one(("contiguous", "contiguous", "channels-last", "cut out"))
    P_h, P_w = one(((16, 16), (16, 16), (32, 32), (12, 16), (8, 32)))
    if in_groups:
        P_h, P_w = one(((14, 14), (14, 14), (14, 14), (8, 8), (10, 10), (12, 12), (18, 18), (9, 20), (28, 28)))
    C = one((1, 3, 3, 4))
    B, D = one((1, 2, 3, 5, 9, 17, 33)), one((8, 64, 72, 136, 256, 264, 304))
    G_h, G_w = one(((1, 3), (3, 5), (2, 2), (7, 3), (1, 1), (2, 9)))
    if in_groups:
        G_h, G_w = one(((1, 8), (3, 8), (2, 16), (7, 8), (1, 24), (2, 8)))
    if B * G_h * G_w > 200 or P_h == 32:
        B = min(B, 5)
    S_w = one((P_w, P_w, P_w, P_w + 2, P_w - 4)) if in_groups else P_w
    layout = layout if S_w == P_w else "cut out"
    images = drawn.images(B, C, G_h * P_h, (G_w - 1) * S_w + P_w)
    if layout == "channels-last":
        images = images.contiguous(memory_format=torch.channels_last)
    elif layout == "cut out":
        W = images.shape[-1]
        nothing = 255 if pixels == torch.uint8 else float("nan")
        around = torch.full((B, C, G_h * P_h, W // 16 * 16 + 16), nothing, dtype=pixels)
        around[..., :W] = images
        images = around[..., :W]
    arguments = drawn.arguments(images, D, C, P_h, P_w)
    if rng.random() < 0.2 and P_h == P_w == 16 and G_h > 1 and G_w > 1:
        arguments["stride"] = one(((8, 16), (16, 32), (24, 16)))
    if S_w != P_w:
        arguments["stride"] = P_h, S_w
    if rng.random() < 0.5:
        arguments.update(mean=(0.4, 0.5, 0.6, 0.5)[:C], std=(0.2, 0.3, 0.25, 0.2)[:C])
    elif rng.random() < 0.3:
        arguments["scale"] = 1 / 255
    return arguments


def drawn_for_threads(seed: int) -> dict:
    """Random arguments whose patches no tensor map describes, and that threads copy 4 bytes or more at a time, for
    products of 16 bits: kept patches, videos, padding, rows that are no multiple of 16 bytes."""
    drawn = Drawn(seed)
    rng, one, pixels = drawn.rng, drawn.one, drawn.pixels
    kind = ("kept", "video", "padded", "odd rows", "kept")[seed % 5]
    P_h, P_w = one(((16, 16), (16, 16), (8, 16), (12, 12), (9, 20), (16, 32), (14, 28)))
    P_t, frames = (1, 1) if kind != "video" else one(((2, 4), (2, 5), (1, 3), (3, 3)))
    C, B, D = one((1, 3, 3, 4)), one((1, 2, 3, 5, 17)), one((8, 72, 136, 192, 256, 264))
    G_h, G_w = one(((1, 3), (3, 5), (2, 2), (4, 3), (1, 1), (2, 9)))
    H, W = G_h * P_h, G_w * P_w
    if kind == "odd rows":
        W += next(n for n in (2, 4, 8) if (W + n) * pixels.itemsize % 16 and (pixels != torch.uint8 or n % 4 == 0))
        P_w = P_w if pixels == torch.uint8 else one((P_w, 14))
    images = drawn.images(B, C, frames, H, W)
    if one((True, False, False)) and kind != "odd rows":
        images = images.contiguous(memory_format=torch.channels_last_3d)
    is_video = kind == "video"
    patch = (P_t, P_h, P_w) if is_video else (P_h, P_w)
    arguments = drawn.arguments(images if is_video else images[:, :, 0], D, C, *patch)
    if kind == "padded":
        arguments["padding"] = one((0, P_h // 2)), 4
        arguments["scale"] = one((None, 1 / 255))
    elif rng.random() < 0.5:
        arguments.update(mean=(0.4, 0.5, 0.6, 0.5)[:C], std=(0.2, 0.3, 0.25, 0.2)[:C])
    if kind == "kept":
        N = (H // P_h) * (W // P_w)
        kept = rng.randint(1, N + 2)
        arguments["keep"] = torch.randint(N, (B, kept), generator=drawn.generator).to(one((torch.int64, torch.int32)))
    return arguments


def onnx(model, images, **options):
    """The graph of what torch.onnx.export makes its nodes of."""
    with mock.patch.object(torch.onnx, "is_in_onnx_export", return_value=True):
        return torch.export.export(model, (images,), strict=False, **options).module()
