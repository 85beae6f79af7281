"""Where the time of a call goes: traces of it and of its peers, and on a GPU what Nsight counts, against the roofline.

Writes Chrome traces (for https://ui.perfetto.dev) with ranges named after operation and shape. On a GPU, runs `ncu` and
`nsys` for one call of ours where they are found; in any case prints their exact commands.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import positive, ticking
from .options import case_of, device_of, shape_arguments, words_of

HELP = "traces, kernels and hardware counters of a shape, beside its peers and against the roofline"
ROWS = 12  # of a table for people; JSON has all


def arguments(parser: argparse.ArgumentParser) -> None:
    shape_arguments(parser)
    add = parser.add_argument
    add("--impl", default="auto,timm_eager", metavar="NAMES", help="comma-separated backends and peers (%(default)s)")
    add("--calls", type=positive, default=10, metavar="N", help="of each in its trace (10)")
    add("--out", type=Path, default=Path("profile-output"), metavar="DIR", help="(profile-output)")
    add("--limit", type=float, default=300, metavar="S", help="seconds for ncu and nsys together (300)")
    add("--no-run", action="store_true", help="print the commands of ncu and nsys, don't run them")
    add("--launch", type=positive, metavar="N", help=argparse.SUPPRESS)  # what ncu and nsys run: N calls, nothing else


def run(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from .. import cost_model
    from ..bench import baselines, environment, implementations, op, peaks
    from ..profiling import trace

    device = torch.device(device_of(args))
    case = case_of(args, str(device))
    impls = args.impl.split(",")
    if unknown := [name for name in impls if name not in (*implementations.OURS, *baselines.PEERS)]:
        raise ValueError(
            f"no implementation {unknown}; there are {', '.join((*implementations.OURS, *baselines.PEERS))}"
        )
    if args.launch:
        trace.launch(case, impls[0], mode=args.mode, device=device, calls=args.launch)
        return {"launched": args.launch}
    result: dict[str, Any] = {
        "header": environment.header(device, "vitkernels " + " ".join(sys.argv[1:])),
        "case": case.name, "mode": args.mode,
    }  # fmt: skip
    with ticking(args.json) as tick:
        result["traces"] = []
        for impl in impls:
            tick(f"{case.name} {args.mode} {impl}: trace")
            try:
                found = trace.trace(
                    case, impl, mode=args.mode, device=device, out=args.out, calls=args.calls
                )  # fmt: skip
            except (NotImplementedError, RuntimeError) as error:
                found = {"impl": impl, "error": " ".join(str(error).split())}
            result["traces"].append(found)
        p = implementations.problem(case.call(device))
        flops, bytes_ = cost_model.work(p, args.mode)
        with op.settings(case):
            rates = peaks.peaks(device, p.compute_dtype, case.dtype == "tf32")
        result["roofline"] = {
            "flops": flops, "bytes": bytes_, "peak_gb_per_s": rates.bytes / 1e9, "peak_tflops": rates.flops / 1e12,
            "attainable_us": 1e3 * rates.ms(flops, bytes_),
            "bound": "memory" if bytes_ / rates.bytes > flops / rates.flops else "arithmetic",
        }  # fmt: skip
        ours = next((name for name in impls if name in implementations.OURS), "auto")
        result["nsight"] = _nsight(args, case, ours, device, result, tick)
    files = [row["file"] for row in result["traces"] if "file" in row]
    result["files"] = files + [f for found in result["nsight"].values() for f in found.get("files", ())]
    result["ok"] = not any("error" in row for row in result["traces"] if row["impl"] in implementations.OURS)
    return result


def _nsight(args, case, impl: str, device, result: dict[str, Any], tick: Callable[[str], None]) -> dict[str, Any]:
    """{"ncu", "nsys"}: "commands", and "kernels", "files", "problem" (why there are none), "roofline_share"."""
    from ..profiling import nsight

    words = words_of(args, str(device) if device.type == "cuda" else "cuda", case.dtype)
    program = [sys.executable, "-m", "vitkernels", "profile", "--impl", impl, *words]
    stem = args.out.resolve() / f"{case.name}-{args.mode}-{impl}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    targets = {"ncu": [*program, "--launch", "1"], "nsys": [*program, "--launch", "20"]}
    reports = {"ncu": stem.with_name(stem.name + ".ncu-rep"), "nsys": stem.with_name(stem.name + ".nsys-rep")}
    found: dict[str, Any] = {}
    stop = time.monotonic() + args.limit
    broken = next((r["error"] for r in result["traces"] if r["impl"] == impl and "error" in r), None)
    for tool, target in targets.items():
        path = nsight.tool(tool)
        commands = (
            nsight.ncu_commands(path or tool, reports[tool], target) if tool == "ncu"
            else [nsight.nsys_command(path or tool, reports[tool], target)]
        )  # fmt: skip
        row: dict[str, Any] = {"commands": [shlex.join(command) for command in commands]}
        found[tool] = row
        if device.type != "cuda":
            row["problem"] = "not run: the device is a CPU; these are for a GPU"
        elif path is None:
            row["problem"] = f"not run: no {tool} on PATH nor where NVIDIA installs it"
        elif broken:
            row["problem"] = f"not run: {broken}"
        elif args.no_run:
            row["problem"] = "not run: --no-run"
        else:
            tick(f"{case.name} {args.mode} {impl}: {tool}")
            if tool == "ncu":
                row |= nsight.profiled(path, reports[tool], target, max(1.0, stop - time.monotonic()))
                us = sum(kernel["us"] or 0.0 for kernel in row.get("kernels", ()))
                if us:
                    row |= {"us": us, "roofline_share": result["roofline"]["attainable_us"] / us}
            else:
                _, problem = nsight.run(commands[0], max(1.0, stop - time.monotonic()))
                row |= {"problem": problem} if problem else {"files": [str(reports[tool])]}
    return found


def show(result: dict[str, Any]) -> None:
    from rich.console import Console

    if "launched" in result:
        return
    console, head = Console(), result["header"]
    console.print(" · ".join(str(head[k]) for k in ("gpu", "cpu") if head[k]), style="bold")
    console.print(", ".join(f"{k} {head[k]}" for k in ("torch", "triton", "vitkernels", "commit") if head[k]))
    roofline = result["roofline"]
    console.print(
        f"{result['case']}, {result['mode']}: {roofline['flops'] / 1e9:.4g} GFLOP, {roofline['bytes'] / 1e6:.4g} MB; "
        f"{roofline['attainable_us']:.4g} µs attainable ({roofline['bound']}) at {roofline['peak_tflops']:.4g} TFLOP/s "
        f"and {roofline['peak_gb_per_s']:.4g} GB/s, both measured here\n",
        highlight=False,
    )
    for trace in result["traces"]:
        _show_trace(console, trace)
    for tool, found in result["nsight"].items():
        console.print(f"\n[bold]{tool}[/]")
        for command in found["commands"]:
            console.print(command, soft_wrap=True, highlight=False, markup=False)
        if "problem" in found:
            console.print(found["problem"], style="yellow", highlight=False, markup=False)
        if found.get("kernels"):
            _show_counters(console, found)
    if result["files"]:
        console.print("\n" + "\n".join(result["files"]), highlight=False, markup=False)


def _show_trace(console, trace: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    if "error" in trace:
        console.print(f"{trace['impl']} has no profile: {trace['error']}", style="red", markup=False, highlight=False)
        return
    share = f", {trace['roofline_share']:.0%} of the roofline" if trace["roofline_share"] else ""
    console.print(trace["label"], style="bold", markup=False, highlight=False)
    console.print(f"{trace['us']:.4g} µs a call{share}; temporary memory {trace['peak_mb']:.4g} MB", highlight=False)
    table = Table(box=box.SIMPLE_HEAD)
    kernels = any("registers" in row for row in trace["kernels"])
    table.add_column("kernel" if kernels else "operation", overflow="ellipsis", no_wrap=True, max_width=70)
    for column in ("a call", "µs", "share", *(("registers", "shared KB", "grid × block") if kernels else ())):
        table.add_column(column, justify="right", no_wrap=True)
    for row in trace["kernels"][:ROWS]:
        cells = [f"{row['count']:.3g}", f"{row['us']:.4g}", f"{row['share']:.0%}"]
        if "registers" in row:
            sizes = " × ".join("·".join(str(n) for n in row[k] if n != 1) or "1" for k in ("grid", "block"))
            cells += [str(row["registers"]), f"{row['shared_bytes'] / 1e3:.4g}", sizes]
        table.add_row(row["name"].replace("[", r"\["), *cells)
    console.print(table)


def _show_counters(console, found: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    columns = {
        "kernel": "kernel", "us": "µs", "dram_gb_per_s": "DRAM GB/s", "dram_percent": "DRAM %", "l2_percent": "L2 %",
        "tensor_percent": "tensor %", "registers": "registers", "shared_bytes": "shared B",
        "occupancy_percent": "occupancy %", "occupancy_possible_percent": "of %",
    }  # fmt: skip
    table = Table(box=box.SIMPLE_HEAD)
    for name in columns.values():
        table.add_column(name, justify="left" if name == "kernel" else "right")
    for row in found["kernels"]:
        cells = ("–" if row[k] is None else f"{row[k]:.4g}" for k in columns if k != "kernel")
        table.add_row(row["kernel"][:50].replace("[", r"\["), *cells)
    console.print(table)
    for row in found["kernels"]:
        console.print(f"{row['kernel'][:50]}: {row['reading']}", highlight=False, markup=False)
    if "roofline_share" in found:
        console.print(f"{found['us']:.4g} µs from cold caches: {found['roofline_share']:.0%} of the roofline")
