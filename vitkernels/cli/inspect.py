"""Compile every shipped kernel configuration, no GPU needed, and list what its machine code holds.

A default configuration must not spill, must fit the GPU's shared memory and must use its tensor cores (for fp32,
where TF32 is asked for); exit status 1 when one does not.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

HELP = "compile the kernels for GPUs and list registers, spills, tensor-core and copy-engine use"


def arguments(parser) -> None:
    parser.add_argument("--arch", default="sm_80,sm_90,sm_100", help="comma-separated (default: %(default)s)")
    parser.add_argument("--patch", default="14,16,32", help="patch sizes, comma-separated (default: %(default)s)")
    parser.add_argument("--dtype", default="bf16,fp16,uint8->bf16,fp32,tf32", help="(default: %(default)s)")
    parser.add_argument("--defaults", action="store_true", help="only configurations that a table picks by itself")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time (default: %(default)s)")


def run(args) -> dict[str, Any]:
    os.environ["TRITON_INTERPRET"] = "0"  # for the workers: the interpreter's kernels can't be compiled
    from .. import tuning
    from ..triton import compiled

    known = {f"sm_{n}": n for n in tuning.NOMINAL}
    archs, patches, dtypes = (getattr(args, n).split(",") for n in ("arch", "patch", "dtype"))
    for values, choices in ((archs, known), (patches, [str(n) for n in range(1, 225)]), (dtypes, compiled.DTYPES)):
        if wrong := [v for v in values if v not in choices]:
            raise ValueError(f"{', '.join(wrong)}: must be of {', '.join(choices) if len(choices) < 99 else '1 … 224'}")
    jobs = [
        (known[arch], int(patch), dtype, choice, default)
        for arch in archs
        for patch in patches
        for dtype in dtypes
        for choice, default in _choices(known[arch], int(patch), dtype)
        if default or not args.defaults
    ]
    rows: dict[int, dict[str, Any]] = {}
    with ProcessPoolExecutor(min(args.jobs, len(jobs)), get_context("spawn")) as pool:
        waiting = {pool.submit(_row, *job): i for i, job in enumerate(jobs)}
        for done in _progress(as_completed(waiting), len(jobs), hidden=args.json):
            rows[waiting[done]] = done.result()
    kernels = [rows[i] for i in sorted(rows)]
    return {"ok": not any(_faults(r) for r in kernels), "kernels": kernels}


def _choices(arch: int, patch: int, dtype: str):
    from ..triton import compiled

    return [((p, road, c), default) for p, road, c, default in compiled.shipped(arch, patch, dtype)]


def _row(arch: int, patch: int, dtype: str, choice, default: bool) -> dict[str, Any]:
    from .. import tuning
    from ..triton import compiled

    p, road, c = choice
    counted = compiled.measure(p, tuning.NOMINAL[arch], compiled.DTYPES[dtype][2], (road, c))
    config = {name: getattr(c, name) for name in ("BM", "BN", "BK", "warps", "stages")}
    kernel = counted.pop("kernel")
    return {"kernel": kernel, "arch": f"sm_{arch}", "patch": patch, "dtype": dtype, "config": config,
            "default": default, **counted}  # fmt: skip


def _faults(row: dict[str, Any]) -> list[str]:
    """What a default configuration must not have."""
    from .. import tuning

    if not row["default"]:
        return []
    arch = int(row["arch"].removeprefix("sm_"))
    limit = tuning.NOMINAL[arch].shared_bytes
    product = row["dtype"] != "fp32" and row["kernel"] not in ("sums", "kept", "finish")
    needed = None if not product else "wgmma" if arch == 90 else "mma"
    checks = (
        (row["spill_bytes"] > 0, f"{row['spill_bytes']} bytes spilt"),
        (row["shared_bytes"] > limit, f"{row['shared_bytes']} bytes of shared memory, {limit} fit"),
        (needed is not None and row[needed] == 0, f"no {needed}"),
    )
    return [text for wrong, text in checks if wrong]


def _progress(items, total: int, hidden: bool):
    from rich.progress import track

    return track(items, "compiling", total=total, disable=hidden, transient=True)


def show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = ("kernel", "arch", "patch", "dtype", "registers", "spill_bytes", "shared_bytes", "wgmma", "mma", "tma",
               "load_bytes")  # fmt: skip
    table = Table("tile", "default", *(c.replace("_", " ") for c in columns), "")
    for row in result["kernels"]:
        c = row["config"]
        tile = f"{c['BM']}x{c['BN']}x{c['BK']} " * (c["BM"] > 0) + f"{c['warps']}w {c['stages']}s"
        table.add_row(tile, "yes" if row["default"] else "", *(str(row[n]) for n in columns), "; ".join(_faults(row)))
    console = Console()
    (console if console.is_terminal else Console(width=150)).print(table)  # a file has room for what a row holds
    print("every default configuration is sound" if result["ok"] else "a default configuration is not sound")
