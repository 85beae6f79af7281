"""How a report says it: cases, implementations, modes, and the machine, in words that people know."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

WORDS = {
    "timm_eager": "Conv2d chain (timm)",
    "conv_channels_last": "Conv2d, channels-last",
    "reshape_linear": "reshape + linear",
    "compile_conv": "compiled Conv2d",
    "compile_linear": "compiled linear",
    "compile_conv_max": "compiled Conv2d, max",
    "compile_linear_max": "compiled linear, max",
    "embed_all_then_gather": "embed all, gather",
    "before": "before fuse",
    "fused": "after fuse",
    "float": "float pixels",
    "normalise_on_device": "uint8, normalised there",
    "uint8": "uint8 pixels",
    "copy": "device copy",
    "gemm": "bare product",
    "empty": "empty launch",
}
MODES = {
    "forward": "forward",
    "backward": "backward alone",
    "both": "forward and backward",
    "images": "images' gradient alone",
    "inference": "inference",
    "training": "training step",
    "pipeline": "input pipeline",
}
TIMINGS = {"eager": "eager call", "graph": "CUDA graph"}
DTYPES = ("bf16", "fp16", "tf32", "fp32")
SIZES = {192: "Ti", 384: "S", 768: "B", 1024: "L", 1152: "So400m", 1280: "H", 1408: "g", 1536: "g", 1664: "G"}


def parts(case: str) -> dict[str, Any]:
    """The name of a `bench.Case`, taken apart; {} of anything else."""
    found = re.fullmatch(
        r"B(?P<batch>\d+)-((?P<frames>\d+)f)?(?P<image>\d+(x\d+)*)-P(?P<patch>\d+(x\d+)*)-D(?P<dim>\d+)-(?P<dtype>\w+)"
        r"(-(?P<pixels>uint8|bf16|fp16|fp32|tf32))?(?P<autocast>-autocast)?(-C(?P<chans>\d+))?(-T(?P<prefix>\d+))?"
        r"(-keep(?P<keep>\d+(\.\d+)?))?(?P<hwc>-hwc)?",
        case,
    )
    named = {k: v for k, v in found.groupdict().items() if v is not None} if found else {}
    return named | {k: int(named[k]) for k in ("batch", "frames", "dim", "chans", "prefix") if k in named}


def case_words(case: str, dtype: str = "", batch: float | None = None) -> str:
    """A case's name in words: "B8-224-P16-D768-bf16" is "ViT-B/16 · 224 · B 8 · bf16"; of a model, with its dtype."""
    known = parts(case)
    if not known:
        source, _, name = case.rpartition(":")
        vit = re.fullmatch(r"vit_(tiny|small|base|large|huge|giant)_patch(\d+)_(\d+)", name)
        if vit:
            short = {"tiny": "Ti", "huge": "H", "giant": "g"}.get(vit[1], vit[1][0].upper())
            name = f"ViT-{short}/{vit[2]} · {vit[3]}"
        return " · ".join(filter(None, (name, source, f"B {batch:g}" if batch else "", dtype)))
    patch, image = known["patch"].split("x"), known["image"].replace("x", "×")
    if "frames" in known:
        tubelet = patch.pop(0)
        image = f"{known['frames']} frames of {image}" + (f", {tubelet} a patch" if tubelet != "2" else "")
    width, size = SIZES.get(known["dim"]), "×".join(patch)
    words = [f"ViT-{width}/{size}" if width else f"D {known['dim']} /{size}"]
    words += [image, f"B {known['batch']}", dtype_words(known)]
    extra = {
        "autocast": "autocast",
        "chans": "{} channels",
        "prefix": "T {}",
        "keep": "keep {} %",
        "hwc": "channels-last",
    }
    known |= {"keep": f"{100 * float(known['keep']):g}"} if "keep" in known else {}
    return " · ".join([*words, *(text.format(known[name]) for name, text in extra.items() if name in known)])


def dtype_words(row: dict[str, Any]) -> str:
    """ "bf16", or where pixels are of another dtype "uint8 → bf16"."""
    pixels = row.get("pixels") or row["dtype"]
    return row["dtype"] if pixels == row["dtype"] else f"{pixels} → {row['dtype']}"


def small_print(runs: Sequence[dict[str, Any]], commands: int = 3) -> tuple[str, str]:
    """Machine, versions and commit in a line; the commands in another, what they share where there are more."""

    def said(key: str, before: str = "") -> str:
        each = (before + scalars(run["header"][key]) for run in runs if run["header"].get(key))
        return " / ".join(dict.fromkeys(each))

    facts = [said("gpu"), said("driver", "driver "), said("cpu"), said("environment")]
    facts += [said(key, f"{key} ") for key in ("torch", "triton", "vitkernels", "commit")]
    lines = list(dict.fromkeys(str(run["header"].get("command") or "an unknown command") for run in runs))
    if len(lines) > commands:
        words = zip(*(line.split(" ") for line in lines), strict=False)
        shared = " ".join(group[0] for group in takewhile(lambda group: len(set(group)) == 1, words))
        lines = [f"{shared} … ({len(lines)} commands; each file says its own)"]
    return " · ".join(filter(None, facts)), "; ".join(lines)


def impl_words(name: str) -> str:
    return WORDS.get(name, name)


def how_words(mode: str, timing: str) -> str:
    """ "Forward, CUDA graph"."""
    words = f"{MODES.get(mode, mode)}, {TIMINGS.get(timing, timing)}"
    return words[0].upper() + words[1:]


def scalars(value: Any) -> str:
    """What a header holds, in a line."""
    return ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value or "")
