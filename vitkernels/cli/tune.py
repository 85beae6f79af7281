"""Search the fastest tile for a shape on this GPU and remember it in the user's cache.

Needs a GPU. Later calls of `patch_embed` with the same shape (batches count by their power of two) use what it found.
"""

from __future__ import annotations

from typing import Any

from . import positive

HELP = "search the fastest tiles for your shapes on this GPU and remember them"


def arguments(parser) -> None:
    parser.add_argument("--image", type=positive, default=224, help="height and width in pixels (default: %(default)s)")
    parser.add_argument("--patch", type=positive, default=16)
    parser.add_argument("--channels", type=positive, default=3)
    parser.add_argument("--dim", type=positive, default=768)
    parser.add_argument("--batch", default="1,8,64,256", help="comma-separated (default: %(default)s)")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp16", "fp32"), help="of the weights")
    parser.add_argument("--pixels", choices=("uint8", "bf16", "fp16", "fp32"), help="(default: as the weights)")
    parser.add_argument("--prefix", type=int, default=1, help="class and register tokens (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="at most, for each batch (default: %(default)s)")


def run(args) -> dict[str, Any]:
    import torch

    from .. import tuning

    if not torch.cuda.is_available():
        raise NotImplementedError("tuning times kernels, which needs a CUDA GPU: torch.cuda.is_available() is False")
    dtypes = {"uint8": torch.uint8, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    weights, pixels = dtypes[args.dtype], dtypes[args.pixels or args.dtype]
    found = []
    for batch in map(int, args.batch.split(",")):
        with torch.device("cuda"):
            images = torch.randint(0, 256, (batch, args.channels, args.image, args.image), dtype=torch.uint8).to(pixels)
            rows = args.prefix + (args.image // args.patch) ** 2
            call: dict[str, Any] = {
                "images": images,
                "weight": torch.randn(args.dim, args.channels, args.patch, args.patch).to(weights),
                "bias": torch.randn(args.dim).to(weights),
                "pos_embed": torch.randn(rows, args.dim).to(weights),
                "prefix": torch.randn(args.prefix, args.dim).to(weights) if args.prefix else None,
            }
        if pixels == torch.uint8:
            call |= {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
        found.append({"batch": batch, **_tuned(tuning.tune, call, args, f"B={batch}")})
    return {"gpu": torch.cuda.get_device_name(), "tuned": found}


def _tuned(tune, call: dict[str, Any], args, title: str) -> dict[str, Any]:
    from rich.progress import Progress

    with Progress(disable=args.json, transient=True) as bar:
        task = bar.add_task(title, total=None)
        return tune(
            call,
            seconds=args.seconds,
            progress=lambda done, total, what: bar.update(
                task, completed=done, total=total, description=f"{title} {what}"
            ),
        )


def show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("batch", "road", "tile", "µs", "default µs", "tried", title=result["gpu"])
    for row in result["tuned"]:
        BM, BN, BK, warps, stages, _ = row["config"]
        table.add_row(
            str(row["batch"]), row["road"], f"{BM}x{BN}x{BK} {warps}w {stages}s", f"{row['ms'] * 1e3:.1f}",
            f"{row['default_ms'] * 1e3:.1f}", f"{row['tried']}/{row['candidates']}",
        )  # fmt: skip
    Console().print(table)
