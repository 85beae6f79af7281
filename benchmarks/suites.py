"""The shapes that are timed, the most telling first."""

from typing import NamedTuple

from vitkernels.bench.cases import Case

HEADLINE = [
    Case(),  # ViT-B/16, 224, B = 256, bf16
    Case(pixels="uint8"),
    Case(pixels="uint8", channels_last=True),  # as a decoder leaves it
    Case(patch=14, dim=1024),  # CLIP-L, DINOv2-L
    Case(batch=1),
]

TRAINING = [
    Case(), Case(patch=14, dim=1024), Case(pixels="uint8"), Case(keep=0.25), Case(dtype="fp32"),
    Case(autocast=True),
]  # fmt: skip

CASES = [
    *HEADLINE,
    Case(patch=14, dim=1024, pixels="uint8"),
    Case(batch=1, patch=14, dim=1024, pixels="uint8"),
    Case(keep=0.25),  # MAE's encoder
    Case(keep=0.25, dim=192),
    Case(dtype="fp16"),
    Case(dtype="tf32"),
    Case(dtype="fp32"),
    Case(pixels="fp32"),
    # Widths: Ti, S, L, H, g
    Case(dim=192),
    Case(dim=384),
    Case(dim=1024),
    Case(patch=14, dim=1280),
    Case(patch=14, dim=1536),
    # Patches
    Case(patch=32),
    Case(patch=8, dim=384, batch=64),
    Case(patch=14, dim=384),
    Case(patch=4, image=32, dim=192, batch=512),
    # Resolutions
    Case(image=384, batch=64),
    Case(image=518, patch=14, dim=1024, batch=64),
    Case(image=518, patch=14, dim=384, batch=64, prefix=5),
    Case(image=512, batch=32, pixels="uint8"),
    # Batches
    Case(batch=2),
    Case(batch=8),
    Case(batch=32),
    Case(batch=64),
    Case(batch=512),
    Case(batch=1, image=384),
    Case(batch=512, dim=192, pixels="uint8"),
    # Layouts and video
    Case(channels_last=True),
    Case(batch=32, frames=16),
    Case(batch=32, frames=16, pixels="uint8"),
    Case(batch=32, frames=16, keep=0.1, prefix=0),  # VideoMAE's encoder
    Case(batch=8, frames=2, image=448, patch=14, dim=1280, prefix=0),
]


class Target(NamedTuple):
    """What the best of our backends should take in CUDA-graph replays on an H200: so many microseconds, or so many
    times what the library takes for the bare product."""

    case: Case
    mode: str
    us: float | None = None
    products: float | None = None


TARGETS = [
    Target(Case(), "forward", 95),
    Target(Case(), "backward", 130),
    Target(Case(pixels="uint8"), "forward", 100),
    Target(Case(pixels="uint8", channels_last=True), "forward", 100),
    Target(Case(patch=14, dim=1024), "forward", 130),
    Target(Case(patch=14, dim=1024), "backward", 190),
    Target(Case(keep=0.25), "forward", 40),
    Target(Case(keep=0.25), "backward", 100),
    Target(Case(batch=1), "forward", 6),
    Target(Case(batch=8), "forward", products=1.3),
    Target(Case(batch=32), "forward", products=1.3),
    Target(Case(pixels="uint8"), "backward", 130),
    Target(Case(autocast=True), "backward", 156),
    Target(Case(), "images", 150),
    Target(Case(dtype="fp32"), "forward", 600),
    Target(Case(dtype="fp32"), "backward", 1000),
    Target(Case(dtype="tf32"), "forward", 175),
    Target(Case(dtype="tf32"), "backward", 250),
    Target(Case(batch=32, frames=16), "forward", products=1.4),
    Target(Case(image=518, patch=14, dim=1024, batch=64), "forward", products=1.4),
]

# Whole models on a GPU: (model, batch, dtype, task)
MODELS = [
    ("vit-ti16", 256, "bf16", "pipeline"),
    ("vit-ti16", 256, "bf16", "inference"),
    ("vit-ti16", 256, "bf16", "training"),
    ("vit-ti16", 1, "bf16", "inference"),
    ("mae-b16", 128, "bf16", "training"),
    ("videomae-b16-masked", 32, "bf16", "training"),
    ("vit-s16", 256, "bf16", "training"),
    ("vit-b16", 128, "bf16", "training"),
    ("vit-l14", 64, "bf16", "training"),
    ("vit_pytorch-b16", 128, "bf16", "training"),
    ("vit-b16", 128, "bf16", "inference"),
    ("vit-l14", 64, "bf16", "inference"),
]

# The kinds of smoke test: one of each way through a backend.
SMOKE = [
    Case(batch=33),
    Case(batch=5, pixels="uint8", channels_last=True, dim=384),
    Case(batch=3, patch=14, dim=1024),
    Case(batch=2, frames=4, keep=0.5, prefix=0, dim=192),
]

# Every kernel that a default takes, large enough that many blocks run at once.
RACES = [
    Case(batch=64),
    Case(batch=64, pixels="uint8"),
    Case(batch=64, patch=14, dim=1024),
    Case(batch=1),
    Case(batch=64, keep=0.25),
    Case(batch=33, pixels="uint8", channels_last=True, dim=384),
    Case(batch=32, pixels="fp32"),
    Case(batch=64, autocast=True),
    Case(batch=32, dtype="tf32"),
    Case(batch=32, patch=14, dim=384, pixels="uint8"),
    Case(batch=16, dtype="fp32"),
    Case(batch=4, frames=16),
    Case(batch=8, image=518, patch=14, dim=384),  # rows that are no multiple of 16 bytes
]

# What a CPU times in some minutes: the three batches, and one of each kind.
CPU = [
    *(Case(batch=batch, dtype="fp32") for batch in (1, 8, 32)),
    *(Case(batch=batch, dtype="fp32", pixels="uint8") for batch in (1, 8, 32)),
    *(Case(batch=batch, dtype="bf16") for batch in (1, 8, 32)),
    *(Case(batch=batch, autocast=True) for batch in (1, 8, 32)),
    Case(batch=8, dtype="fp32", dim=192),
    Case(batch=32, dtype="fp32", dim=384),
    Case(batch=8, dtype="fp32", patch=14, dim=1024),
    Case(batch=8, dtype="fp32", patch=32),
    Case(batch=8, dtype="fp32", keep=0.25),
    Case(batch=8, dtype="fp32", pixels="uint8", channels_last=True),
    Case(batch=2, dtype="fp32", frames=16),
    Case(batch=64, dtype="fp32", image=32, patch=4, dim=192),
]
CPU_TRAINING = [
    Case(batch=8, dtype="fp32"), Case(batch=8, dtype="bf16"), Case(batch=8, dtype="fp32", keep=0.25),
    Case(batch=8, autocast=True),
]  # fmt: skip

# One of each kind, small enough for a dry run.
TINY = [
    Case(batch=2, image=32, dim=48, dtype="fp32"),
    Case(batch=3, image=32, dim=48, pixels="uint8", channels_last=True),
    Case(batch=2, image=28, patch=14, dim=40, dtype="fp32", keep=0.5, prefix=0),
    Case(batch=2, image=32, dim=48, dtype="fp32", frames=4, pixels="uint8"),
    Case(batch=1, image=(32, 48), patch=(8, 16), dim=32, dtype="fp16", chans=4, prefix=5),
    Case(batch=2, image=32, dim=48, autocast=True),
]
