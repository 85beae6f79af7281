"""The one place where a backend is chosen."""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import torch

from .backends import fallbacks, measured
from .backends.cuda import extension
from .gpu import gpu_of, not_nvidia, rounds, tf32
from .problem import PatchProblem

MODULES = {"triton": ".backends.triton", "cuda": ".backends.cuda", "reference": ".backends.reference"}
NAMES = ("auto", *MODULES)
# "weight" stands for all that is learnt: weight, bias, position table and prefix.
DIRECTIONS = {"forward": "tokens", "weight": "parameters' gradients", "images": "images' gradient"}


class Row(NamedTuple):
    backends: tuple[str, ...]  # what `auto` tries, first to last
    why: str
    source: str = "rule"


# What was measured and ships: (architecture, direction, kind of product) -> row. Microseconds are of CUDA-graph replays
# on an H200, B = 256, at commit b74a4aa, from benchmarks/results/nvidia-h200; ViT-B/16 unless it says otherwise.
MEASURED: dict[tuple[int, str, str], Row] = {
    (90, "forward", "half"): Row(
        ("triton", "cuda", "reference"),
        "triton 157 µs, cuda 229, reshape + linear 497; ViT-L/14: 285, 769, 1,058; from uint8: 158 to 190 before it "
        "waited for its products, 350, 709",
    ),
    (90, "forward", "fp32"): Row(
        ("reference",),
        "forward and backward: reshape + linear, as the reference does it, 3,007 µs, triton 10,400, cuda 5,822 when it "
        "did not multiply by wgmma; that its forward does was not measured",
    ),
    (90, "weight", "half"): Row(
        ("cuda", "reference"), "cuda 176 µs, reshape + linear 257, triton 439; from uint8: 167, 258, 684"
    ),
    (90, "weight", "half, padded for wgmma"): Row(
        ("reference",),
        "ViT-L/14: reshape + linear 608 µs, triton 1,271, cuda 1,739 when it did not multiply these by wgmma; that it "
        "does was not measured",
    ),
    (90, "weight", "half, copied for wgmma"): Row(
        ("reference",),
        "keep 25 %: reshape + linear 211 µs, triton 405, cuda 280 when it did not multiply these by wgmma; that it "
        "does was not measured",
    ),
    (90, "weight", "half, tokens copied for wgmma"): Row(
        ("reference",),
        "of other patches: reshape + linear 608 and 211 µs, cuda 1,739 and 280 when not by wgmma; that these are was "
        "not measured",
    ),
    (90, "weight", "half, not by wgmma"): Row(
        ("reference",), "of other patches: reshape + linear 608 and 211 µs, cuda 1,739 and 280 when not by wgmma"
    ),
    (90, "weight", "fp32"): Row(("reference",), "reshape + linear 1,386 µs, cuda 1,989, triton 2,545"),
}
# GPUs that nobody measured, by what the H200 showed: (direction, kind of product; None: any other) -> row.
RULES: dict[tuple[str, str | None], Row] = {
    ("forward", "half"): Row(
        ("triton", "reference"), "not measured; on an H200 triton took 157 µs, reshape + linear 497"
    ),
    ("forward", None): Row(
        ("reference",),
        "not measured; on an H200, forward and backward in float32, reshape + linear was ahead of triton and cuda",
    ),
    ("weight", None): Row(
        ("reference",),
        "not measured; on an H200 reshape + linear took 257 µs, triton 439; triton was behind in other kinds too",
    ),
    ("images", None): Row(("triton", "reference"), "not measured"),
}
# Triton's interpreter, on a CPU, runs only when it is named.
CPU = Row(("reference",), "the definition is the fast way on a CPU")


def row_of(p: PatchProblem, direction: str) -> Row:
    """Which backends `auto` tries for this problem, and why in that order: what was measured on this machine
    (`vitkernels tune --backends`) goes before what ships, and that before the rules."""
    if p.device.type != "cuda":
        return CPU if p.on_cpu else Row(("reference",), "there are no kernels for this device")
    kind = kind_of(p, direction)
    if not not_nvidia():
        gpu = gpu_of(p.device)
        if here := measured.rows(gpu.name).get((direction, kind)):
            return Row(tuple(here["backends"]), here["why"], f"measured here on {here['date']}")
        if shipped := MEASURED.get((gpu.arch, direction, kind)):
            return shipped._replace(source="shipped")
    return RULES.get((direction, kind)) or RULES[direction, None]


def kind_of(p: PatchProblem, direction: str) -> str:
    """The kind of product of a direction: half, fp32, tf32, fp64, or half where `cuda` would not use wgmma, or not as
    it was measured."""
    from .backends.patch_layout import product_of  # a call on a CPU does without

    kind = product_of(p, tf32())
    if (direction, kind) == ("weight", "half") and not extension.missing():
        return backend("cuda").weight_kind(p)
    return kind


def backend(name: str) -> ModuleType:
    return importlib.import_module(MODULES[name], __package__)


def forget() -> None:
    """What was chosen so far: other measurements are there."""
    _choose.cache_clear()


def check_name(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"backend must be one of auto, {', '.join(MODULES)}; got {name!r}")


def why_not(p: PatchProblem, name: str) -> list[str]:
    """Every reason why this backend can't take the problem; none: it can."""
    return backend(name).why_not(p)


def choose(p: PatchProblem, name: str, direction: str = "forward") -> ModuleType:
    """The backend that takes the problem; NotImplementedError where the one that is named can't."""
    return _choose(p, name, direction, not p.on_cpu and rounds(p.compute_dtype))  # may be turned between calls


@lru_cache(maxsize=4096)
def _choose(p: PatchProblem, name: str, direction: str, rounded: bool) -> ModuleType:
    check_name(name)
    if name == "auto":
        return next(b for n in row_of(p, direction).backends if not (b := backend(n)).why_not(p))
    if reasons := why_not(p, name):
        raise NotImplementedError(f"backend {name!r} can't take this problem ({p}): {'; '.join(reasons)}")
    return backend(name)


def run(
    p: PatchProblem,
    name: str,
    tensors: tuple[torch.Tensor | None, ...],  # images … keep, as the problem has them
) -> torch.Tensor:
    """The tokens, by the backend that takes the problem."""
    try:
        return choose(p, name).forward(p, *tensors)
    except fallbacks.Unusable:  # on this machine, as the backend found: without it, then
        _choose.cache_clear()
        return choose(p, name).forward(p, *tensors)


def run_backward(
    p: PatchProblem,
    name: str,
    grad: torch.Tensor,  # [B, T + rows, D]
    tensors: tuple[torch.Tensor | None, ...],  # images … keep, as the problem has them
    grads: tuple[torch.Tensor | None, ...],  # of images … prefix, to be written, like them; None: nobody asks
) -> None:
    """The gradients, each by the backend that takes it."""
    try:
        _write(p, name, grad, tensors, grads)
    except fallbacks.Unusable:
        _choose.cache_clear()
        _write(p, name, grad, tensors, grads)


def _write(p: PatchProblem, name: str, grad, tensors, grads) -> None:
    for module, share in shares(p, name, grads).items():
        module.backward(p, grad, *tensors, grads=share)


def shares(
    p: PatchProblem, name: str, grads: tuple[torch.Tensor | None, ...]
) -> dict[ModuleType, tuple[torch.Tensor | None, ...]]:
    """Backend -> those of the gradients of images, weight, bias, pos_embed and prefix that it writes."""
    images, *learnt = grads
    found: dict[ModuleType, tuple[torch.Tensor | None, ...]] = {}
    if images is not None:
        found[choose(p, name, "images")] = images, None, None, None, None
    if any(grad is not None for grad in learnt):
        module = choose(p, name, "weight")
        found[module] = images if module in found else None, *learnt
    return found


class Explanation(dict[str, list[str]]):
    """Backend -> the reasons why it would not run; an empty list: it would.

    `chosen` is what `auto` takes for the tokens, and `auto` maps each of DIRECTIONS to (backend, why it comes first);
    `sources` says where that comes from, "shipped", "rule" or "measured here on 2026-01-31". `notes` are how each
    backend would do it, and `fallbacks` why some no longer do it in another way, since a call in this process.
    """

    def __init__(self, p: PatchProblem):
        super().__init__((name, why_not(p, name)) for name in MODULES)
        self.problem = p
        rows = {d: row_of(p, d) for d in DIRECTIONS if d != "images" or p.image_dtype.is_floating_point}
        self.sources = {direction: row.source for direction, row in rows.items()}
        self.auto = {
            direction: (choose(p, "auto", direction).__name__.rpartition(".")[2], row.why)
            for direction, row in rows.items()
        }
        self.chosen = self.auto["forward"][0]
        self.notes = {name: backend(name).how(p) for name, reasons in self.items() if not reasons}
        self.fallbacks = fallbacks.of(p)

    def takes(self, mode: str) -> str:
        """What `auto` takes in "forward", "backward" (of the parameters), "both" or "images": "triton, then cuda"."""
        directions = {"backward": ["weight"], "both": ["forward", "weight"]}.get(mode, [mode])
        return ", then ".join(dict.fromkeys(self.auto[direction][0] for direction in directions))

    def __str__(self) -> str:
        lines = [str(self.problem)]
        for name, reasons in self.items():
            mark = "auto takes it" if name == self.chosen else "would run"
            lines.append(f"  {name:<10}" + ("no: " + "; ".join(reasons) if reasons else f"{mark}, {self.notes[name]}"))
            if name in self.fallbacks:
                lines.append(f"  {'':<10}fell back: {self.fallbacks[name]}")
        if self.problem.device.type == "cuda":
            lines += [
                f"  auto takes {name} for the {DIRECTIONS[what]}: {why} ({self.sources[what]})"
                for what, (name, why) in self.auto.items()
            ]
        return "\n".join(lines)
