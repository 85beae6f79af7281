"""The one place where a backend is chosen."""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import ModuleType

import torch

from . import fallbacks
from .problem import PatchProblem

# Every backend is a module with `why_not(problem) -> reasons`, `how(problem) -> what would happen, for people`,
# `forward(problem, *tensors) -> tokens`, and `backward(problem, grad, *tensors, grads)`, which writes the gradients.
MODULES = {"triton": ".triton", "cuda": ".cuda", "reference": ".reference"}
# What `auto` tries, first to last. Triton's interpreter, on a CPU, runs only when it is named. `cuda` joins once a file
# of benchmarks/results shows it right, and fast, on the GPU's architecture: so far it has not been run on one.
AUTO = {"cuda": ("triton", "reference")}


def backend(name: str) -> ModuleType:
    return importlib.import_module(MODULES[name], __package__)


def check_name(name: str) -> None:
    if name not in ("auto", *MODULES):
        raise ValueError(f"backend must be one of auto, {', '.join(MODULES)}; got {name!r}")


def why_not(p: PatchProblem, name: str) -> list[str]:
    """Every reason why this backend can't take the problem; none: it can."""
    return backend(name).why_not(p)


@lru_cache(maxsize=1024)
def choose(p: PatchProblem, name: str) -> ModuleType:
    check_name(name)
    if name == "auto":
        return next(b for n in AUTO.get(p.device.type, ("reference",)) if not (b := backend(n)).why_not(p))
    if reasons := why_not(p, name):
        raise NotImplementedError(f"backend {name!r} can't take this problem ({p}): {'; '.join(reasons)}")
    return backend(name)


class Explanation(dict[str, list[str]]):
    """Backend -> the reasons why it would not run; an empty list: it would. `chosen` is what `auto` takes, `notes`
    are how each would do it, and `fallbacks` why some no longer do it in another way, since a call in this process."""

    def __init__(self, p: PatchProblem):
        super().__init__((name, why_not(p, name)) for name in MODULES)
        self.problem = p
        self.chosen = choose(p, "auto").__name__.rpartition(".")[2]
        self.notes = {name: backend(name).how(p) for name, reasons in self.items() if not reasons}
        self.fallbacks = fallbacks.of(p)

    def __str__(self) -> str:
        lines = [str(self.problem)]
        for name, reasons in self.items():
            mark = "auto takes it" if name == self.chosen else "would run"
            lines.append(f"  {name:<10}" + ("no: " + "; ".join(reasons) if reasons else f"{mark}, {self.notes[name]}"))
            if name in self.fallbacks:
                lines.append(f"  {'':<10}fell back: {self.fallbacks[name]}")
        return "\n".join(lines)


def canonical(images, weight, bias, pos_embed, prefix, keep) -> tuple[torch.Tensor | None, ...]:
    """The tensors as every backend reads them: a picture is a video of one frame, tables have a batch dimension."""
    images, weight = (t if t is None or t.ndim == 5 else t.unsqueeze(2) for t in (images, weight))
    pos_embed, prefix = (t if t is None or t.ndim == 3 else t.unsqueeze(0) for t in (pos_embed, prefix))
    return images, weight, bias, pos_embed, prefix, keep
