"""The CUDA C++ backend's place: it declares why it can't run."""

from __future__ import annotations

import torch

from .problem import PatchProblem


def why_not(p: PatchProblem) -> list[str]:
    return ["the CUDA C++ extension is not part of this version"]


def how(p: PatchProblem) -> str:
    return ""


def forward(p: PatchProblem, *tensors: torch.Tensor | None) -> torch.Tensor:
    raise AssertionError("why_not says it can't run")
