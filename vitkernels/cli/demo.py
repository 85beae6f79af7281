"""Photographs as uint8 through a timm model, before and after `vitkernels.fuse`: times, differences, a picture."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

HELP = "photographs through a timm model, before and after fusing; leaves a picture"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo-output"), metavar="DIR", help="default: demo-output")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, …; default: the GPU where there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU")
    parser.add_argument("--model", default="vit_base_patch16_224", help="of timm, with random weights; %(default)s")
    parser.add_argument("--batch", type=int, metavar="N", help="default: 64 on a GPU, else each photograph once")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed runs of the model; %(default)s")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="in place of the photographs")


def run(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from rich.console import Console
    from rich.progress import track

    from .info import machine

    for name in ("batch", "repeats"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    device, name = _device(args.device), args.dtype
    on_gpu = device.type == "cuda"
    try:
        from ..demo.figure import draw
        from ..demo.run import demonstrate

        console = Console(stderr=True)
        hidden = args.json or not console.is_terminal
        shown = demonstrate(
            args.model,
            device=device,
            dtype=getattr(torch, name or ("bfloat16" if on_gpu else "float32")),
            batch=args.batch or (64 if on_gpu else None),
            files=args.image,
            repeats=args.repeats,
            track=lambda loop, what: track(loop, f"{what:<12}", console=console, transient=True, disable=hidden),
        )
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; the demo needs pip install 'vitkernels[demo]'") from error

    here = machine()
    where = torch.cuda.get_device_name(device) if on_gpu else f"{here['cpu']}, threads: {here['threads']}"
    args.out.mkdir(parents=True, exist_ok=True)
    picture = args.out / "vitkernels-demo.png"
    draw(shown, where, picture)
    arrays = ("images", "tokens", "pos_embed")
    return {
        "ok": shown.ok,
        "machine": here,
        "ran_on": where,
        "batch": len(shown.images),
        "repeats": args.repeats,
        **{key: value for key, value in asdict(shown).items() if key not in arrays},
        "front_end": _before_after(*shown.front_end),
        "whole_model": _before_after(*shown.whole_model),
        "picture": str(picture),
    }


def show(result: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(
        f"[bold]{result['model']}[/], a batch of {result['batch']}, {result['dtype']}, on {result['ran_on']}; "
        f"backend [bold]{result['backend']}[/]"
    )
    for found in result["fused"]:
        console.print(
            f"{'fused' if found['fused'] else 'left alone'}: {found['cls']}, {found['note']}", highlight=False
        )
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("step")
    for column in ("before, ms", "after, ms", "ratio", "max |difference|"):
        table.add_column(column, justify="right")
    for step, key, difference in (
        ("front end", "front_end", "token_difference"),
        ("whole model", "whole_model", "logit_difference"),
    ):
        times = result[key]
        spreads = (
            f"{_ms(t['median'])}\n[dim]{_ms(t['low'])}–{_ms(t['high'])}[/]" for t in (times["before"], times["after"])
        )
        table.add_row(step, *spreads, f"{times['ratio']:.2f} ×", f"{result[difference]:.1e}")
    console.print(table)

    before, after = result["token_errors"]
    verdict = "[green]They agree.[/]" if result["ok"] else "[bold red]They do not agree.[/]"
    console.print(
        f"{verdict} Tokens against float64: {before:.1e} before, {after:.1e} after; allowed: "
        f"{result['token_error_allowed']:.1e}. Logits may differ by {result['logit_difference_allowed']:.1e}.\n"
        f"The front end is {result['share']:.2%} of this model's operations, so the model's time barely changes: what "
        "changes is the front end's own time, its memory traffic and its exactness.\n"
        "Front end: uint8 pixels to tokens, an eager chain of five passes against one call. Whole model: normalised "
        "pixels to logits, before and after fuse. Medians, with quartiles in grey.\n"
        f"Picture: [bold]{result['picture']}[/]"
    )


def _ms(time: float) -> str:
    return f"{time:.0f}" if time >= 100 else f"{time:.2f}"


def _device(name: str | None) -> Any:
    import torch

    here = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if here else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"--device {name}: {error}") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not here):
        raise ValueError(f"--device {name}: there is no such device here")
    return device


def _before_after(before: Any, after: Any) -> dict[str, Any]:
    return {"before": before._asdict(), "after": after._asdict(), "ratio": before.median / after.median}
