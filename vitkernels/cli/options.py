"""The options that say what is timed, for every command that times: one table, to the command line and back."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import positive

if TYPE_CHECKING:
    from ..bench.cases import Case

MODES = ("forward", "backward", "both", "images")


def shape_arguments(
    parser: argparse.ArgumentParser, *, batch: int | str = 8, modes: Sequence[str] = MODES
) -> None:  # fmt: skip
    """--image … --device. A `batch` given as text, "1,8,64", is a list of batches."""
    add = parser.add_argument
    add("--image", type=_size, default=224, metavar="H[xW]", help="pixels (224)")
    add("--patch", type=_size, default=16, metavar="P_h[xP_w]", help="pixels (16)")
    add("--dim", type=positive, default=768, metavar="D", help="embedding width (768)")
    if isinstance(batch, str):
        add("--batch", type=_list, default=_list(batch), metavar="B,B,…", help=f"images ({batch})")
    else:
        add("--batch", type=positive, default=batch, metavar="B", help=f"images ({batch})")
    add("--chans", type=positive, default=3, metavar="C", help="channels (3)")
    add("--prefix", type=_natural, default=1, metavar="T", help="class and register tokens (1)")
    add("--frames", type=positive, metavar="F", help="video of F frames")
    add("--tubelet", type=positive, default=2, metavar="P_t", help="frames of one patch (2)")
    add("--keep", type=_share, metavar="SHARE", help="embed this share of the patches only, as MAE does")
    add("--dtype", choices=("bf16", "fp16", "fp32", "tf32"), help="of weights and tokens (fp32; bf16 on a GPU)")
    add("--pixels", choices=("uint8", "bf16", "fp16", "fp32"), help="of the images (as --dtype)")
    add("--autocast", action="store_true", help="to --dtype (bf16): weights, tables, pixels and tokens are fp32")
    add("--channels-last", action="store_true", help="images lie in memory as [B,H,W,C]")
    add("--mode", choices=modes, default="forward", help="(forward)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1")


def device_of(args: argparse.Namespace) -> str:
    """The device that is asked for, found here: ValueError where it isn't."""
    import torch

    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    try:
        kind = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r}: it is auto, cpu, cuda or cuda:N") from None
    if kind.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: this PyTorch finds no GPU")
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r}: there are {torch.cuda.device_count()} GPUs here")
    return device


def dtype_of(args: argparse.Namespace, device: str) -> str:
    return args.dtype or ("fp32" if device.startswith("cpu") and not args.autocast else "bf16")


def case_of(args: argparse.Namespace, device: str, batch: int | None = None) -> Case:
    """The case that the options describe; `batch` picks one of a list."""
    from ..bench.cases import Case

    if args.autocast and args.dtype in ("fp32", "tf32"):
        raise ValueError(f"--autocast is to bf16 or fp16, not to {args.dtype}")
    return Case(
        batch=args.batch if batch is None else batch, image=args.image, patch=args.patch, dim=args.dim,
        dtype=dtype_of(args, device), autocast=args.autocast, pixels=args.pixels, prefix=args.prefix, keep=args.keep,
        frames=args.frames, tubelet=args.tubelet, chans=args.chans, channels_last=args.channels_last,
    )  # fmt: skip


def words_of(args: argparse.Namespace, device: str, dtype: str) -> list[str]:
    """Options that give this case and mode again, in another process."""
    words = ["--mode", args.mode, "--device", device, "--dtype", dtype]
    for name in ("image", "patch", "dim", "batch", "chans", "prefix", "frames", "tubelet", "keep", "pixels"):
        value: Any = getattr(args, name)
        if value is not None:
            words += [f"--{name}", "x".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return words + ["--channels-last"] * args.channels_last + ["--autocast"] * args.autocast


def _size(text: str) -> int | tuple[int, int]:
    height, _, width = text.partition("x")
    return (positive(height), positive(width)) if width else positive(height)


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {value}")
    return value


def _list(text: str) -> list[int]:
    return [positive(word) for word in text.split(",")]
