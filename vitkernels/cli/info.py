"""Say what this machine has and which backend would run on it; for the others, every reason why not."""

from __future__ import annotations

import argparse
import os
import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

HELP = "machine, versions, and which backend would run here"

PACKAGES = ("torch", "triton", "numpy", "timm", "transformers", "torchvision", "vit_pytorch")
BACKENDS = {
    "triton": "Triton kernels, forward and backward",
    "cuda": "CUDA C++ kernels, forward and backward",
    "reference": "the definition, in plain PyTorch: any device, any dtype, every problem",
}
PRODUCTS = {  # kinds of dispatch.MEASURED
    "half": "16-bit products",
    "half, padded for wgmma": "16-bit products for which `cuda` would pad patches (P = 14)",
    "half, copied for wgmma": "16-bit products of pixels that threads of `cuda` copy (keep lists, videos, …)",
    "half, tokens copied for wgmma": "16-bit products for which `cuda` would copy the tokens' gradients (float32, …)",
    "half, not by wgmma": "16-bit products where `cuda` would not use wgmma (small patches, odd rows, …)",
    "fp32": "float32",
    "tf32": "float32 as TF32",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    help = "print a table of the docs: backends (the default), auto, what it takes, or fused, what fuse knows"
    parser.add_argument("--markdown", nargs="?", const="backends", choices=TABLES, help=help)


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.markdown:
        return {"markdown": TABLES[args.markdown]()}
    from ..backends import fallbacks

    problems = _problems()
    return {
        "machine": machine(),
        "versions": versions(),
        "backends": [_backend(name, problems) for name in next(iter(problems.values()))],
        "auto": {title: explanation.chosen for title, explanation in problems.items()},
        "choices": {title: _choices(explanation) for title, explanation in problems.items()},
        "fallbacks": fallbacks.listed(),
    }


def show(result: dict[str, Any]) -> None:
    if "markdown" in result:
        print(result["markdown"])
        return
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    machine, console = result["machine"], Console()
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_row("cpu", f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} torch threads")
    for gpu in machine["gpus"]:
        facts.add_row("gpu", ", ".join(f"{value}" if key == "name" else f"{key} {value}" for key, value in gpu.items()))
    if not machine["gpus"]:
        facts.add_row("gpu", "none")
    facts.add_row("system", machine["system"])
    for name, number in result["versions"].items():
        facts.add_row(name, escape(number) if number else "[dim]not installed[/]")
    console.print(facts)

    table = Table(box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("backend", "runs here", "problem", "why not"):
        table.add_column(column)
    for backend in result["backends"]:
        for i, (title, reasons) in enumerate(backend["problems"].items()):
            taken = " (auto takes it)" if result["auto"][title] == backend["name"] else ""
            here = "yes" if backend["available"] else "no"
            table.add_row(*((backend["name"], here) if i == 0 else ("", "")), title + taken, "; ".join(reasons))
    console.print(table)
    for title, choices in result["choices"].items():
        for what, found in choices.items() if "cuda" in title else ():
            console.print("{}, {}: auto takes {backend} ({source})".format(title, what, **found), highlight=False)
    for fallback in result["fallbacks"]:
        console.print(escape("{backend} fell back for {problem}: {reason}".format(**fallback)), soft_wrap=True)
    if not result["fallbacks"]:
        console.print("fallbacks in this process: none")


def machine() -> dict[str, Any]:
    """Processor and GPUs; the latter from the driver's own tool, which creates no CUDA context."""
    import torch

    from .. import cpu

    return {
        "cpu": cpu.name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "gpus": _gpus(),
    }


def versions() -> dict[str, str | None]:
    """Of Python, of this package, of those it works with, of nvcc, and of what built the extension, or why none did.

    None: not installed.
    """
    from .. import __version__
    from ..backends.cuda import extension
    from ..bench.environment import output

    found: dict[str, str | None] = {"python": platform.python_version(), "vitkernels": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    release = next((line for line in (output("nvcc", "--version") or "").splitlines() if "release" in line), None)
    return found | {"nvcc": release and release.rpartition("V")[2], "cuda extension": extension.about()}


def backend_table() -> str:
    """README's table of backends: the same on every machine."""
    from ..dispatch import MODULES

    return "\n".join(["| backend | what it is |", "| --- | --- |", *(f"| `{n}` | {BACKENDS[n]} |" for n in MODULES)])


def auto_table() -> str:
    """docs/gpus.md's table of what `auto` tries where, and why."""
    from ..dispatch import CPU, DIRECTIONS, MEASURED, RULES

    rows = [f"| CPUs | everything | {_tried(CPU)} | {CPU.why} |"]
    for (direction, some), row in RULES.items():
        kind = f", {PRODUCTS[some]}" if some else ", else" if (direction, "half") in RULES else ""
        what = DIRECTIONS[direction] + kind
        rows.append(f"| NVIDIA GPUs, but for what follows | {what} | {_tried(row)} | {row.why} |")
    for (arch, direction, kind), row in MEASURED.items():
        rows.append(f"| sm_{arch} | {DIRECTIONS[direction]}, {PRODUCTS[kind]} | {_tried(row)} | {row.why} |")
    return "\n".join(["| device | what | `auto` tries | because |", "| --- | --- | --- | --- |", *rows])


def _tried(row: Any) -> str:
    return ", ".join(f"`{name}`" for name in row.backends)


def fused_table() -> str:
    """README's table of what `fuse` knows."""
    from ..fusing import ADAPTERS

    rows = ["| library | class | what becomes one call |", "| --- | --- | --- |"]
    for library in ADAPTERS:
        classes: dict[str, list[str]] = {}
        for name, row in import_module(f"vitkernels.fusing.{library}").TABLE.items():
            classes.setdefault(row.what, []).append(f"`{name.rpartition('.')[2]}`")
        rows += [f"| {library} | {', '.join(names)} | {what} |" for what, names in classes.items()]
    rows.append("| any | `Conv2d`, `Conv3d` of patches that do not overlap, at most 4 channels | projection |")
    rows.append("| any | `Rearrange` of einops, a norm or none, `Linear` in a `Sequential` | projection |")
    return "\n".join(rows)


TABLES = {"backends": backend_table, "auto": auto_table, "fused": fused_table}


def _problems() -> dict[str, Any]:
    """Representative problems -> what `explain` says about each, on every kind of device that is here."""
    import torch

    from .. import explain

    def vit(device: str, patch: int, width: int, images: torch.dtype, weight: torch.dtype):
        return explain(
            torch.empty(1, 3, 224, 224, dtype=images, device=device),
            torch.empty(width, 3, patch, patch, dtype=weight, device=device),
        )

    found = {"ViT-B/16, fp32, on cpu": vit("cpu", 16, 768, torch.float32, torch.float32)}
    if torch.cuda.is_available():
        found["ViT-B/16, uint8 -> bf16, on cuda"] = vit("cuda", 16, 768, torch.uint8, torch.bfloat16)
        found["ViT-L/14, bf16, on cuda"] = vit("cuda", 14, 1024, torch.bfloat16, torch.bfloat16)
    return found


def _backend(name: str, problems: dict[str, Any]) -> dict[str, Any]:
    each = {title: explanation[name] for title, explanation in problems.items()}
    available = not all(each.values())
    reasons = [] if available else list(dict.fromkeys(reason for reasons in each.values() for reason in reasons))
    return {"name": name, "available": available, "reasons": reasons, "problems": each}


def _choices(explanation: Any) -> dict[str, dict[str, str]]:
    """Direction -> which backend `auto` takes, why, and where that comes from: shipped, rule or measured here."""
    return {
        what: {"backend": backend, "why": why, "source": explanation.sources[what]}
        for what, (backend, why) in explanation.auto.items()
    }


def _gpus() -> list[dict[str, str]]:
    keys = ("name", "compute capability", "driver", "memory")
    from ..bench.environment import output

    query = "--query-gpu=name,compute_cap,driver_version,memory.total"
    lines = (output("nvidia-smi", query, "--format=csv,noheader") or "").splitlines()
    return [dict(zip(keys, map(str.strip, line.split(",")), strict=True)) for line in lines if line.count(",") == 3]
