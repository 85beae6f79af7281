"""Time the operation on a shape of yours beside what it replaces, or a whole model before and after fusing.

A result is held to the accuracy rule first; what breaks it gets no time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from . import console_for, ticking
from .options import MODES, case_of, device_of, dtype_of, shape_arguments

HELP = "the operation beside its peers on a shape of yours; a model before and after fuse; what a call costs the host"


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", metavar="SPEC", help="instead of a shape, with random weights: timm:NAME, torchvision:NAME, "
        "transformers:CLASS, vit_pytorch:CLASS, each with ,OPTION=VALUE for its constructor; or a short form: vit-b16, "
        "mae-b16, videomae-b16-masked, …")  # fmt: skip
    add("--task", choices=("inference", "training", "pipeline"), default="inference",
        help="of a --model; pipeline: from the decoder's bytes to tokens (inference)")  # fmt: skip
    add("--host", action="store_true", help="instead of a shape: what a call costs the host, step by step; without a "
        "GPU the launch is a stub")  # fmt: skip
    shape_arguments(parser, modes=(*MODES, "all"))
    add("--impl", metavar="NAMES", help="comma-separated, the first is what ratios refer to: auto, triton, reference, "
        "timm_eager, conv_channels_last, reshape_linear, compile_conv, compile_linear, copy, gemm, empty")  # fmt: skip
    add("--against", action="append", default=[], metavar="VERSION", help="a git revision, or a folder with "
        "vitkernels/ in it, sampled in the same rounds: exit status 1 where this is slower, beyond noise")  # fmt: skip
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile among the peers (on a GPU)")
    add("--seconds", type=float, default=1.0, help="of samples, for each implementation (1)")
    add("--backend", default="auto", help="of a fused --model")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from ..bench import environment, host, implementations, model, op, revisions
    from ..report import compare, results

    device = device_of(args)
    result: dict[str, Any] = {"header": environment.header(device, "vitkernels " + " ".join(sys.argv[1:]))}
    if args.host:
        return result | {"host": host.host(device), "ok": True}
    with ticking(args.json) as tick:
        if args.model:
            return result | model.bench_model(
                args.model, batch=args.batch, device=device, dtype=dtype_of(args, device), backend=args.backend,
                seconds=args.seconds, mode=args.task, progress=tick,
            )  # fmt: skip
        result["rows"] = []
        with revisions.checkouts(args.against) as against:
            for mode in MODES[:3] if args.mode == "all" else (args.mode,):
                result["rows"] += op.bench(
                    case_of(args, device), device=device, mode=mode, impls=args.impl and args.impl.split(","),
                    seconds=args.seconds, compiled=args.compile, against=against, progress=tick,
                )  # fmt: skip
    # A peer that breaks the rule is worth seeing; one of ours is a failure.
    result["ok"] = not any(row.get("error") for row in result["rows"] if row["impl"] in implementations.OURS)
    if args.against:
        result["against"] = compare.regressions(results.read(result).rows)
        result["ok"] &= not any(line["verdict"] in compare.FAILED for line in result["against"])
    return result


# heading -> what a row says under it
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "ms": lambda row: f"{row['ms']['median']:.4g}",
    "±": lambda row: f"{(row['ms']['p80'] - row['ms']['p20']) / 2 / row['ms']['median']:.0%}",
    "images/s": lambda row: f"{row['images_per_s']:,.0f}",
    "GB/s": lambda row: f"{row['gb_per_s']:.3g}",
    "TFLOP/s": lambda row: f"{row['tflops']:.3g}",
    "roof": lambda row: f"{row['roofline_share']:.0%}",
    "MB": lambda row: f"{row['peak_mb']:.3g}",
    "×": lambda row: f"{row['ratio']['median']:.2f}",
}


def show(result: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    console, rows = console_for(120), result.get("rows", [])
    head = result["header"]
    console.print(" · ".join(str(head[k]) for k in ("gpu", "cpu") if head[k]), style="bold")
    console.print(", ".join(f"{k} {head[k]}" for k in ("torch", "triton", "vitkernels", "commit") if head[k]))
    if "host" in result:
        _show_host(result["host"], console)
        return
    several = len({row["timing"] for row in rows}) > 1
    for case, mode in dict.fromkeys((row["case"], row["mode"]) for row in rows):
        look: Any = {"title_justify": "left", "box": box.SIMPLE_HEAD, "pad_edge": False, "padding": (0, 1, 0, 0)}
        table = Table(title=f"{case}, {mode}", **look)
        table.add_column("", overflow="ellipsis")  # the one that gives way where a terminal is narrow
        for heading in COLUMNS:
            table.add_column(heading, justify="right", no_wrap=True)
        for row in rows:
            if (row["case"], row["mode"]) == (case, mode):
                name = f"{row['impl']} = {row['backend']}" if "backend" in row else row["impl"]
                table.add_row(name + f", {row['timing']}" * several, *(_cell(row, of) for of in COLUMNS.values()))
        console.print(table)
    console.print("roof: the time that the device's own rates allow, over this one; MB: temporary memory of a call; "
                  "×: times as long as the first takes", style="dim", highlight=False)  # fmt: skip
    for row in rows:
        if row.get("error"):
            console.print(f"[red]{row['impl']} ({row['timing']}) has no time:[/] {row['error']}", highlight=False)
    for line in result.get("against", ()):
        change = f": {line['change']:.3f} × the time, noise ±{line['band']:.1%}" if line["change"] else ""
        console.print(f"{line['mode']} against {line['against']}: {line['verdict']}{change}", highlight=False)
    if "verdict" in result:
        console.print(result["report"], highlight=False)
        console.print(result["verdict"], style="bold")


def _cell(row: dict[str, Any], of: Callable[[dict[str, Any]], str]) -> str:
    try:
        return of(row)
    except (KeyError, TypeError):  # a row doesn't say it: a ceiling has no images, an error no time
        return ""


def _show_host(rows: list[dict[str, Any]], console: Any) -> None:
    from rich import box
    from rich.table import Table

    titles = {"inference": "a call", "training": "a call that records gradients", "backward": "its backward",
              "piece": "steps of a call"}  # fmt: skip
    for mode, title in titles.items():
        table = Table("", "µs", "× F.linear", title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for row in (row for row in rows if row["mode"] == mode):
            ratio = f"{row['ratio']:.2f}" if row["ratio"] else ""
            table.add_row(row["impl"] + " (stub)" * row["stub"], f"{row['us']:.1f}", ratio)
        console.print(table)
    if any(row["stub"] for row in rows):
        console.print("stub: there is no GPU; the launch is a stub that returns at once", style="dim")
