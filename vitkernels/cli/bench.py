"""Time the operation on a shape of yours beside what it replaces, or a whole model before and after fusing.

A result is held to the accuracy rule first; what breaks it gets no time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from . import positive

HELP = "the operation beside its peers on a shape of yours; a model before and after fuse"


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", metavar="SPEC", help="timm:NAME, torchvision:NAME or transformers:CLASS, with random weights")
    add("--image", type=_size, default=224, metavar="H[xW]", help="pixels (224)")
    add("--patch", type=_size, default=16, metavar="P_h[xP_w]", help="pixels (16)")
    add("--dim", type=positive, default=768, metavar="D", help="embedding width (768)")
    add("--batch", type=positive, default=8, metavar="B", help="images (8)")
    add("--chans", type=positive, default=3, metavar="C", help="channels (3)")
    add("--prefix", type=int, default=1, metavar="T", help="class and register tokens (1)")
    add("--frames", type=positive, metavar="F", help="video of F frames")
    add("--tubelet", type=positive, default=2, metavar="P_t", help="frames of one patch (2)")
    add("--keep", type=float, metavar="SHARE", help="embed this share of the patches only, as MAE does")
    add("--dtype", choices=("bf16", "fp16", "fp32", "tf32"), help="of weights and tokens (fp32; bf16 on a GPU)")
    add("--pixels", choices=("uint8", "bf16", "fp16", "fp32"), help="of the images (as --dtype)")
    add("--channels-last", action="store_true", help="images lie in memory as [B,H,W,C]")
    add("--mode", choices=("forward", "backward", "both", "all"), default="forward")
    add("--impl", metavar="NAMES", help="comma-separated, the first is what ratios refer to: auto, triton, reference, "
        "timm_eager, conv_channels_last, reshape_linear, compile_conv, compile_linear, copy, gemm, empty")  # fmt: skip
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile among the peers (on a GPU)")
    add("--seconds", type=float, default=1.0, help="of samples, for each implementation (1)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    add("--backend", default="auto", help="of a fused --model")


def run(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from .. import bench, bench_model

    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: this PyTorch finds no GPU")
    dtype = args.dtype or ("fp32" if device == "cpu" else "bf16")
    result: dict[str, Any] = {"header": bench.header(device, "vitkernels " + " ".join(sys.argv[1:]))}
    with _progress(args.json) as tick:
        if args.model:
            return result | bench_model.bench_model(
                args.model, batch=args.batch, device=device, dtype=dtype, backend=args.backend,
                seconds=args.seconds, progress=tick,
            )  # fmt: skip
        case = bench.Case(
            batch=args.batch, image=args.image, patch=args.patch, dim=args.dim, dtype=dtype, pixels=args.pixels,
            prefix=args.prefix, keep=args.keep, frames=args.frames, tubelet=args.tubelet, chans=args.chans,
            channels_last=args.channels_last,
        )  # fmt: skip
        result["rows"] = []
        for mode in bench.MODES if args.mode == "all" else (args.mode,):
            result["rows"] += bench.bench(
                case, device=device, mode=mode, impls=args.impl and args.impl.split(","), seconds=args.seconds,
                compiled=args.compile, progress=tick,
            )  # fmt: skip
    # A peer that breaks the rule is worth seeing; one of ours is a failure.
    result["ok"] = not any(row.get("error") for row in result["rows"] if row["impl"] in bench.OURS)
    return result


def show(result: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console, rows = Console(), result["rows"]
    head = result["header"]
    console.print(" · ".join(str(head[k]) for k in ("gpu", "cpu") if head[k]), style="bold")
    console.print(", ".join(f"{k} {head[k]}" for k in ("torch", "triton", "vitkernels", "commit") if head[k]))
    timings = {row["timing"] for row in rows}
    for case, mode in dict.fromkeys((row["case"], row["mode"]) for row in rows):
        table = Table(title=f"{case}, {mode}", title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("implementation", no_wrap=True)
        for column in ("ms", "p20 – p80", "images/s", "× ours", "roofline"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in rows:
            if (row["case"], row["mode"]) == (case, mode):
                table.add_row(*_cells(row, name_timing=len(timings) > 1))
        console.print(table)
    for row in rows:
        if row.get("error"):
            console.print(f"[red]{row['impl']} ({row['timing']}) has no time:[/] {row['error']}", highlight=False)
    if "verdict" in result:
        console.print(result["report"], highlight=False)
        console.print(f"Outputs before and after differ by {result['difference']:.2g} of their norm.")
        console.print(result["verdict"], style="bold")
        console.print("About 1 % of a model's arithmetic is its front end: expect little.", style="dim")


def _cells(row: dict[str, Any], name_timing: bool) -> list[str]:
    name = f"{row['impl']} = {row['backend']}" if "backend" in row else row["impl"]
    name += f", {row['timing']}" * name_timing
    if row["ms"] is None:
        return [name, "–", "", "", "", ""]
    ms = row["ms"]
    return [
        name,
        f"{ms['median']:.4g}",
        f"{ms['p20']:.4g} – {ms['p80']:.4g}",
        f"{row['images_per_s']:,.0f}" if "images_per_s" in row else "",
        f"{row['ratio']:.2f}" if "ratio" in row else "",
        f"{row['roofline_share']:.0%}" if row["roofline_share"] else "",
    ]


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is being done, where somebody watches."""
    from rich.console import Console

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda text: None
        return
    with console.status("") as status:
        yield status.update


def _size(text: str) -> int | tuple[int, int]:
    height, _, width = text.partition("x")
    return (positive(height), positive(width)) if width else positive(height)
