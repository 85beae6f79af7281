"""Search the fastest tile for a shape on this GPU and remember it in the user's cache.

Later calls of `patch_embed` with the same shape (batches count by their power of two) use what it found. With
--backends it times whole backends instead, over a table of shapes, and later calls with backend="auto" take the
fastest. Killed, it goes on where it was when it is started again. --list and --forget work without a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .options import case_of, device_of, dtype_of, shape_arguments

HELP = "search the fastest tiles for your shapes on this GPU and remember them"
DIRECTIONS = {"forward": ("forward",), "backward": ("weight", "images"), "both": ("forward", "weight", "images"),
              "images": ("images",)}  # fmt: skip


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", metavar="SPEC", help="the shape of this model's front end: timm:NAME, transformers:CLASS, …")
    shape_arguments(parser, batch="1,8,64,256")
    add("--seconds", type=float, default=60, help="at most, for each batch and kernel (60)")
    add("--backends", action="store_true", help="time the backends, for `auto` to take the fastest on this GPU")
    add("--ship", action="store_true", help="keep what is found in the package itself: for its maintainers")
    add("--list", action="store_true", help="show what is remembered, for every GPU")
    add("--forget", nargs="?", const="", metavar="GPU", help="clear the user's cache of this GPU, or of the one named")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.list:
        return _listed()
    if args.forget is not None:
        return _forgotten(args.forget)
    import torch

    if args.backends:
        return _backends(args)
    from ..bench import op
    from ..bench.timing import alive, short
    from ..tuning.tune import tune

    device = device_of(args)
    if torch.device(device).type != "cuda":
        raise NotImplementedError("tuning times kernels, which needs a CUDA GPU: torch.cuda.is_available() is False")
    dtype, found = dtype_of(args, device), []
    make = _front_end(args.model, dtype, args.pixels) if args.model else None
    with _progress(args.json) as bar:
        for batch in args.batch:
            case = case_of(args, device, batch)
            for direction in DIRECTIONS[args.mode]:
                if direction == "images" and args.pixels == "uint8":
                    continue  # bytes have no gradient
                row: dict[str, Any] = {"batch": batch, "direction": direction}
                found.append(row)
                try:
                    with op.settings(case):
                        call = make(batch, device) if make else case.call(device)
                        progress = bar(f"B={batch} {direction}")
                        row |= tune(call, direction=direction, seconds=args.seconds, progress=progress, ship=args.ship)
                except RuntimeError as error:  # torch's of memory and of the device; another batch may do
                    row["error"] = short(error)
                    try:
                        alive(torch.device(device))
                    except RuntimeError:
                        row["error"] += "; the GPU is lost to this process: run again, it goes on behind this candidate"
                        return {"gpu": None, "tuned": found, "ok": False}
    gpu = torch.cuda.get_device_name(device)
    return {"gpu": gpu, "tuned": found, "ok": not any("error" in row for row in found)}


def _backends(args: argparse.Namespace) -> dict[str, Any]:
    from ..tuning.backends import GpuLost, tune_backends

    if args.ship:
        raise ValueError("--ship keeps tiles; what --backends finds ships as a row of dispatch.MEASURED: docs/gpus.md")
    with _progress(args.json) as bar:
        try:
            found = tune_backends(device_of(args), progress=bar("backends"))
        except GpuLost as error:
            return {"rows": [], "failed": [str(error)], "ok": False}
    return found | {"ok": not found["failed"]}


def _front_end(spec: str, dtype: str, pixels: str | None) -> Callable[[int, str], dict[str, Any]]:
    """batch, device -> random arguments of `patch_embed` as this model would call it once fused."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from .. import fuse
    from ..bench.cases import DTYPES, IMAGENET, PIXELS
    from ..bench.model import load_model

    class Met(Exception):
        pass

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.vitkernels.patch_embed.default:
                raise Met(args)
            return func(*args, **(kwargs or {}))

    model, shape = load_model(spec)
    report = fuse(model.eval(), backend="reference")
    try:
        with torch.no_grad(), Record():
            model(torch.zeros(1, *shape))
    except Met as met:
        images, weight, bias, pos_embed, prefix, _, stride, padding = met.args[0][:8]
    else:
        raise ValueError(f"{spec} has no front end that fuse knows: {' '.join(str(report).split())}")
    table = {"weight": weight, "bias": bias, "pos_embed": pos_embed, "prefix": prefix}

    def call(batch: int, device: str) -> dict[str, Any]:
        def random(like: torch.Tensor, *shape: int) -> torch.Tensor:
            return (torch.randn(shape or like.shape, device=device) / 16).to(DTYPES[dtype])

        kind = PIXELS[pixels or dtype]
        size = batch, *images.shape[1:]
        made: dict[str, Any] = {name: t if t is None else random(t) for name, t in table.items()}
        if kind == torch.uint8:
            made |= {"images": torch.randint(256, size, dtype=kind, device=device), **IMAGENET}
        else:
            made["images"] = torch.randn(size, device=device).to(kind)
        return made | {"stride": tuple(stride), "padding": tuple(padding)}

    return call


def _listed() -> dict[str, Any]:
    from ..backends import measured, user_cache
    from ..backends.triton import config_cache

    kinds = ((measured.sound, measured.is_stale), (lambda _, entry: config_cache.sound(entry), config_cache.is_stale))
    entries = [
        {**entry, "stale": is_stale(entry)}
        for entry in user_cache.listed()
        for sound, is_stale in kinds
        if sound(entry["key"], entry)
    ]
    return {**config_cache.compiled_from(), "folder": str(user_cache.folder()), "entries": entries}


def _forgotten(gpu: str) -> dict[str, Any]:
    from ..backends import user_cache

    if not gpu:
        import torch

        if torch.cuda.is_available():
            gpu = torch.cuda.get_device_name()
        else:
            names = sorted({f.stem for f in user_cache.folder().glob("*.json")})
            if len(names) > 1:
                raise ValueError(f"there is no GPU here: say which to forget, --forget {' | '.join(names)}")
            gpu = names[0] if names else "no GPU"
    return {"gpu": gpu, "forgotten": [str(f) for f in user_cache.forget(gpu)]}


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str], Any]]:
    """A bar on stderr for each search: the candidate, the best so far, the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(),
        TextColumn("best {task.fields[best]}, at most {task.fields[left]:.0f} s left · {task.fields[what]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True) as bar:

        def begin(title: str) -> Callable[[Any], None]:
            for task in bar.task_ids:
                bar.remove_task(task)
            task = bar.add_task(title, total=None, best="–", left=0.0, what="")

            def update(event: Any) -> None:
                best = "–" if event.best_ms == float("inf") else f"{event.best_ms * 1e3:.1f} µs"
                left = max(0.0, event.seconds_left)
                bar.update(task, completed=event.done, total=event.total, best=best, left=left, what=event.text)

            return update

        yield begin


def show(result: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if "forgotten" in result:
        console.print("\n".join(f"removed {file}" for file in result["forgotten"]) or "there was nothing to forget")
        return
    if "entries" in result:
        table = Table("GPU", "problems", "tile, or backends", "µs", "× default", "measured", box=box.SIMPLE_HEAD)
        for entry in result["entries"]:
            when = f"{entry.get('date', '?')}, Triton {entry.get('triton', '?')}" + ", stale" * entry["stale"]
            source = ", shipped" * entry["shipped"]
            cells = (", ".join(entry["backends"]), "", "") if "backends" in entry else _cells(entry)
            table.add_row(entry["gpu"], entry["key"], *cells, when + source)
        console.print(table if result["entries"] else f"nothing is remembered in {result['folder']}")
        return
    if "rows" in result:
        _show_backends(result, console)
        return
    table = Table("batch", "kernel", "tile", "µs", "× default", "tried", title=result["gpu"], box=box.SIMPLE_HEAD)
    for row in result["tuned"]:
        if "error" not in row:
            counts = f"{row['tried']} of {row['candidates']}" + f", {row['resumed']} before" * (row["resumed"] > 0)
            table.add_row(str(row["batch"]), row["key"].partition("/")[0], *_cells(row), counts)
    console.print(table)
    for row in result["tuned"]:
        if "error" in row:
            text = f"B={row['batch']} {row['direction']}: {row['error']}"
            console.print(text, style="red", markup=False, highlight=False)


def _show_backends(result: dict[str, Any], console: Any) -> None:
    """Milliseconds of every shape, and what `auto` takes from now on."""
    from rich import box
    from rich.table import Table

    from ..dispatch import DIRECTIONS

    for row in result["rows"]:
        names = list(dict.fromkeys(name for found in row["ms"].values() for name in found))
        table = Table("shape", *(f"{name}, µs" for name in names), box=box.SIMPLE_HEAD, title_justify="left",
                      title=f"{DIRECTIONS[row['direction']]}, {row['kind']}")  # fmt: skip
        for case, found in row["ms"].items():
            table.add_row(case, *(f"{1e3 * ms:.1f}" if (ms := found.get(name)) else "–" for name in names))
        console.print(table)
        console.print(f"auto takes {', then '.join(row['backends'])}: {row['why']}\n", highlight=False)
    for text in result["failed"]:
        console.print(text, style="red", markup=False, highlight=False)
    if result["rows"]:
        console.print(f"{result['gpu']}: kept in {result['file']}", highlight=False, soft_wrap=True)


def _cells(entry: dict[str, Any]) -> tuple[str, str, str]:
    """Tile, time, and how many times as fast as the table's own."""
    BM, BN, BK, warps, stages, *_ = entry["config"]
    ms, default = entry.get("ms"), entry.get("default_ms")
    return (
        f"{entry['kernel']} {BM}×{BN}×{BK} {warps}w {stages}s",
        f"{ms * 1e3:.1f}" if ms else "?",
        f"{default / ms:.2f}" if ms and default else "?",
    )
