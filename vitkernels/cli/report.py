"""Draw results and make a page of them: ours beside the peers, the roofline, what failed, and what got slower.

Takes what `vitkernels bench --json`, benchmarks/ and the GPU suite leave behind.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import ticking

HELP = "figures and a page of stored results; fails on a regression"
PAGE = "index.html"
KEYS = ("case", "mode", "timing", "impl")


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="a results file, or a folder with such, however deep")
    add("--out", type=Path, default=Path("report"), metavar="DIR", help="of figures and page (report)")
    add("--compare", metavar="OLD", help="older results: exit status 1 where ours got slower against its yardsticks")
    add("--noise", type=float, default=0.05, metavar="SHARE", help="the noise band is at least that wide (0.05: 5 %%)")
    add("--markdown", action="store_true", help="print docs/measured.md's tables, and write nothing")
    add("--no-figures", action="store_true", help="a page without figures, which needs no matplotlib")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from ..report import compare, summary
    from ..report.results import load

    with ticking(args.json or args.markdown) as tick:
        results = load(args.paths, tick)
        old = load([args.compare], tick) if args.compare else None
        comparison = compare.compare(results, old, args.noise) if old else None
        paired = compare.regressions(results.rows, args.noise)
        failed = [line for line in (*(comparison or ()), *paired) if line["verdict"] in compare.FAILED]
        result: dict[str, Any] = {
            "ok": not failed,
            "made_of": [run["file"] for run in results.runs],
            "skipped": [{"file": file, "why": why} for file, why in results.skipped],
            "rows": len(results.rows),
            "summary": summary.summary(results),
            "worst": [
                {name: getattr(entry, name) for name in ("device", "case", "mode", "timing", "title")}
                | {"best_peer": entry.best[0]["impl"], "ratio": entry.best[1], "spread": entry.best[2]}
                for entry in summary.worst(results)
                if entry.best
            ],
            "errors": [{name: row[name] for name in (*KEYS, "error")} for row in summary.errors(results)],
            "noise": args.noise,
            "comparison": comparison,
            "paired": paired,
        }
        if args.markdown:
            return result | {"files": [], "markdown": summary.markdown(results)}
        figures = []
        if not args.no_figures:
            from ..report import figures as drawings

            args.out.mkdir(parents=True, exist_ok=True)
            figures = drawings.draw(results, args.out, tick)
        from ..report.page import page

        args.out.mkdir(parents=True, exist_ok=True)
        tick(PAGE)
        text = page(results, figures, comparison, paired, old, args.noise)
        (args.out / PAGE).write_text(text, encoding="utf-8")
    return result | {"files": [str(args.out / PAGE), *(file for figure in figures for file in figure["files"])]}


def show(result: dict[str, Any]) -> None:
    if "markdown" in result:
        print(result["markdown"])
        _regressions(result, stderr=True)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)  # names in files may look like markup
    console.print(f"{result['rows']} rows of {len(result['made_of'])} files:")
    for file in result["made_of"]:
        console.print(f"  {file}", soft_wrap=True)
    for each in result["skipped"]:
        console.print(f"  skipped {each['file']}: {each['why']}", style="dim", soft_wrap=True)
    if result["summary"]:
        title = "The best peer's time over ours, geometric mean: above 1, ours is faster"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        several = len({group["device"] for group in result["summary"]}) > 1
        for column in ["device"] * several + ["mode", "timing", "dtype"]:
            table.add_column(column, no_wrap=column != "device")
        for column in ("cases", "mean", "least", "most", "faster"):
            table.add_column(column, justify="right", no_wrap=True)
        for g in result["summary"]:
            mode = f"{g['mode']} (model)" if g["model"] else g["mode"]
            cells = [g["device"]] * several + [mode, g["timing"], g["dtype"], str(g["cases"])]
            cells += [f"{g[name]:.2f} ×" for name in ("geometric_mean", "least", "greatest")]
            table.add_row(*cells, str(g["faster"]))
        console.print(table)
    if result["errors"]:
        console.print(f"{len(result['errors'])} rows have no time:")
    for row in result["errors"][:10]:
        text = f"  {row['impl']}, {row['case']}, {row['mode']}, {row['timing']}: {row['error']}"
        console.print(text)
    if more := result["errors"][10:]:
        console.print(f"  and {len(more)} more, on the page")
    _regressions(result)
    drawn = len(result["files"]) - 1
    figures = f", and {drawn} figure files beside it" if drawn else ", without figures"
    console.print(f"written: {result['files'][0]}{figures}")


def _regressions(result: dict[str, Any], stderr: bool = False) -> None:
    from rich.console import Console

    from ..report.compare import FAILED

    console = Console(stderr=stderr, highlight=False, markup=False)
    lines = [*(result["comparison"] or ()), *result["paired"]]
    if not lines:
        return
    for line in lines:
        against = f" against {line['against']}" if "against" in line else ""
        what = f"{line['verdict']}: {line['impl']}{against}, {line['case']}, {line['mode']}, {line['timing']}"
        if line["verdict"] in FAILED:
            detail = line.get("error") or f"{line['change'] - 1:+.1%}, beyond ±{line['band']:.1%}"
            if line["ms"] and line["old_ms"]:
                detail += f" ({line['ms']:.4g} ms, {line['old_ms']:.4g} ms then; by {', '.join(line['yardsticks'])})"
            console.print(f"{what}: {detail}", style="red")
        elif line["verdict"] in ("missing", "no yardstick"):
            console.print(what, style="dim")
    counts = {v: sum(line["verdict"] == v for line in lines) for v in dict.fromkeys(line["verdict"] for line in lines)}
    text = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    bands = [line["band"] for line in lines if line["band"]]
    band = (
        f"; noise bands from ±{min(bands):.1%} to ±{max(bands):.1%}, at least ±{result['noise']:.1%}" if bands else ""
    )
    console.print(f"compared: {text}{band}")
    console.print("ok" if result["ok"] else "regressions", style="green" if result["ok"] else "red")
