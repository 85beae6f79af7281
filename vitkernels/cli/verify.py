"""Check every backend on random problems: its error against fp64, beside what eager PyTorch loses in the same dtype.

With --repeat, each is launched N times beside copies, other kernels and pauses, and every result must have the bits of
the first: a kernel may be wrong now and then.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from typing import Any

HELP = "check every backend against fp64 on random problems"


def arguments(parser: argparse.ArgumentParser) -> None:
    from ..dispatch import MODULES

    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--backend", choices=("all", "auto", *MODULES), default="all")
    parser.add_argument("--cases", type=int, default=16, help="random problems, each in four dtypes (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="of the first problem; the next has seed + 1 (default: 0)")
    parser.add_argument("--gradients", action="store_true", help="check the gradients too")
    help = "launches of each, beside other work, that must all give the same bits (default: 1)"
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help=help)
    parser.add_argument("--interpret", action="store_true", help="run Triton's kernels in its interpreter, on the CPU")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.cases < 1:
        raise ValueError(f"--cases must be at least 1, got {args.cases}")
    if args.repeat < 1:
        raise ValueError(f"--repeat must be at least 1, got {args.repeat}")
    if args.interpret:
        if args.device == "cuda":
            raise ValueError("--interpret runs on the CPU, --device cuda does not")
        if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError("--interpret comes too late: Triton is imported already; set TRITON_INTERPRET=1 instead")
        os.environ["TRITON_INTERPRET"] = "1"
        args.device = "cpu"

    from rich.console import Console
    from rich.progress import Progress

    from ..testing import verify

    with Progress(console=Console(stderr=True), transient=True, disable=args.json) as progress:
        task = progress.add_task("verify", total=None)
        return verify.run(
            args.device, args.backend, args.cases, args.seed, args.gradients,
            lambda done, of: progress.update(task, completed=done, total=of), args.repeat,
        )  # fmt: skip


def show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console, rows = Console(), result["rows"]
    table = Table(title=f"Error against fp64 on {result['device']}; the bound is 2 × eager's error + rounding")
    for name in ("backend", "dtype", "what"):
        table.add_column(name)
    for name in ("passed", "failed", "error", "eager", "bound"):
        table.add_column(name, justify="right", no_wrap=True)
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["ok"] is not None:
            groups.setdefault((row["backend"], row["dtype"], row.get("what", "")), []).append(row)
    for key, group in sorted(groups.items()):
        measured = [r for r in group if r["bound"]]  # the figures are those of the row that is nearest to its bound
        worst = max(measured, key=lambda r: math.inf if r["error"] is None else r["error"] / r["bound"], default={})
        failed = sum(not r["ok"] for r in group)
        figures = (f"{worst[n]:.1e}" if worst.get(n) is not None else "-" for n in ("error", "eager_error", "bound"))
        table.add_row(*key, str(len(group) - failed), str(failed), *figures, style="red" if failed else None)
    console.print(table)
    declined: dict[tuple[str, str], int] = {}
    for row in rows:
        if row["ok"] is None:
            key = row["backend"], row["reason"]
            declined[key] = declined.get(key, 0) + 1
        elif not row["ok"]:
            what = f"{row['backend']}, {row['dtype']}, {row.get('what', 'call')}: {row['reason']}; {row['case']}"
            console.print(f"failed: {what}", style="red", markup=False)
    for (name, reason), count in declined.items():
        console.print(f"declined {count} ×: {name}: {reason}", markup=False)
    console.print("ok" if result["ok"] else "not ok", style="green" if result["ok"] else "red")
