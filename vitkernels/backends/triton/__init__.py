"""The Triton backend: what it takes, and how. forward_launch.py and backward_launch.py launch what
forward_plan.py and backward_plan.py say of the kernels in forward_kernels.py and backward_kernels.py."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import numpy
import torch

from ...gpu import OLDEST, gpu_of, not_nvidia, tf32
from ...problem import PatchProblem
from .. import fallbacks
from ..patch_layout import product_of
from . import toolchain
from .backward_launch import backward as backward
from .backward_plan import cells_of
from .forward_launch import forward as forward
from .forward_plan import kernels_of
from .launch import BACKEND, interpreted

INT32 = 2**31
HOW = {"gather": "pixels gathered by threads", "descriptor": "patches cut by the copy engine"}
SLACK = 1 << 17  # rows that a kernel may count past the end, of its last tile or of its last part


def how(p: PatchProblem) -> str:
    kernel, *_ = kernels_of(p, gpu_of(p.device), product_of(p, tf32()), not fallbacks.happened(BACKEND, p))
    return HOW[kernel]


@lru_cache(maxsize=1)
def _missing() -> str:
    try:
        import triton
    except ImportError as error:
        return f"Triton can't be imported: {error}"
    if interpreted() and _version(triton) < (3, 7) and _version(numpy) >= (2, 4):
        return f"the interpreter of Triton {triton.__version__} needs NumPy below 2.4, here is {numpy.__version__}"
    return ""


def _triton_version() -> tuple[int, ...]:
    import triton

    return _version(triton)


def _version(module: ModuleType) -> tuple[int, ...]:
    return tuple(int(n) for n in module.__version__.split(".")[:2])


def why_not(p: PatchProblem) -> list[str]:
    if missing := _missing() or fallbacks.unusable(BACKEND):
        return [missing]
    if p.device.type == "cuda" and (other := not_nvidia()):
        return [other]
    reasons = []
    if p.device.type == "cuda":
        if lacking := toolchain.missing():
            reasons.append(lacking)
        gpu = gpu_of(p.device)
        if gpu.arch < OLDEST:
            reasons.append(f"{gpu.name} is sm_{gpu.arch}; the kernels need sm_{OLDEST} or later")
    elif not (p.on_cpu and interpreted()):
        reasons.append(f"images are on {p.device}; Triton needs a CUDA device (or its interpreter, TRITON_INTERPRET=1)")
    for name, rows in (("N", p.N), ("B·N", p.B * p.rows), ("B·T", p.B * p.T), ("B·cells", p.B * cells_of(p))):
        if rows + SLACK >= INT32:
            reasons.append(f"{name} = {rows} rows do not fit 32 bits ({INT32})")
    loaded = [d for d in (p.image_dtype, p.out_dtype) if d != torch.float64]
    if p.compute_dtype == torch.float64 and loaded and not interpreted() and _triton_version() < (3, 7):
        # "Currently fp64 don't support largeK MMA": the forward's pixels, the backward's dY
        reasons.append(f"Triton before 3.7 can't multiply in fp64 what it loads as {loaded[0]}")
    return reasons
