"""What every launch needs beside its plan: the device's figures, the flags, the weight and the channels' constants."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ...gpu import capturing
from ...problem import PatchProblem
from .. import common
from . import toolchain
from .configs import Config
from .forward_plan import Order

BACKEND = "triton"
# As Triton names CUDA_ERROR_INVALID_VALUE of cuTensorMapEncodeTiled; any other error is no refusal.
REFUSED = "Triton Error [CUDA]: Failed to create tensor map descriptor: invalid argument"


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, as they were decorated, or would be."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def kernel_of(name: str):
    from . import backward_kernels, forward_kernels

    return getattr(forward_kernels, name, None) or getattr(backward_kernels, name)


def constants_of(constants: dict[str, object]) -> dict[str, object]:
    """A plan's constants, dtypes as Triton names them."""
    import triton.language as tl

    names = {
        torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64,
    }  # fmt: skip
    return {k: names.get(v, v) if isinstance(v, torch.dtype) else v for k, v in constants.items()}


def options(config: Config) -> dict[str, object]:
    return {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}


def bound(kernel: str, config: Config, grid: int, scalars: dict, constants: dict) -> Callable[..., None]:
    """The kernel with every argument that is no tensor; it is called with its tensors, which come first in it.

    Triton binds the arguments of every launch and looks up what it compiled for the like of them, which costs the host
    9 µs where a linear layer costs it 3. Here only dtypes and alignments of tensors may differ: what Triton compiled
    for aligned ones is launched at once for others of their dtypes, in 3 µs.
    """
    jit = kernel_of(kernel)
    others = scalars | constants_of(constants)
    rest = tuple(others[name] for name in jit.arg_names[-len(others) :])
    compiled: dict[tuple[Any, ...], Callable[..., None]] = {}

    def run(*tensors: Any) -> None:
        addresses, kinds = 0, []
        for t in tensors:
            if isinstance(t, torch.Tensor):
                addresses |= t.data_ptr()
                kinds.append(t.dtype)
            else:
                kinds.append(None)  # or a descriptor, whose address is no part of what is compiled
        like, usual = tuple(kinds), addresses % 16 == 0 and not _watched(jit)
        if usual and (found := compiled.get(like)) is not None:
            return found(*tensors, *rest)
        made = toolchain.launch(jit[(grid, 1, 1)], *tensors, *rest, **options(config))
        if usual and made is not None:  # the interpreter makes nothing
            compiled[like] = made[(grid, 1, 1)]
        return None

    return run


def _watched(jit: Any) -> bool:
    """Whether somebody has Triton call hooks, or compile in another way, from now on."""
    knobs = sys.modules["triton"].knobs
    return bool(
        getattr(jit, "pre_run_hooks", ())  # the interpreter has none, as another Triton may have none of these
        or getattr(knobs.compilation, "instrumentation_mode", "")
        or getattr(knobs.runtime, "add_stages_inspection_hook", None)
    )


def refused(error: Exception) -> bool:
    """Whether the driver refused a tensor map, which it checks at a launch: what it won't cut, threads can gather."""
    return str(error).startswith(REFUSED)


def packed(p: PatchProblem, order: Order, columns: int, weight: torch.Tensor) -> torch.Tensor:
    """The weight [D, columns] in the kernel's order and dtype: the parameter itself where it is that already.

    Never cached. A copy is a few microseconds before a launch that is worth it; a cache would have to notice every
    write, and neither `.data` nor FSDP2, which refills a parameter's storage, raises the parameter's version.
    """
    weight = weight if weight.ndim == 5 else weight.unsqueeze(2)
    return _in_order(p, order, weight.to(p.compute_dtype), columns)


def centred(p: PatchProblem, order: Order, columns: int) -> torch.Tensor:
    """[2, columns]: m and a of y = (x − m)·a for each element of a patch, in the weight's order."""
    dtype, key = p.sum_dtype, (p, order, columns)
    if (found := _constants.get(key)) is not None:
        return found
    if capturing(p.device):
        # Memory of a graph's pool must not outlive it in our cache.
        return _each_in_order(p, order, columns, common.centred(p, dtype))
    # Made on the host: when the copy returns, it is there for every stream.
    made = _each_in_order(p, order, columns, torch.tensor(p.centred, dtype=dtype)).to(p.device)
    return _constants.setdefault(key, made) if len(_constants) < 1024 else made


_constants: dict[tuple[PatchProblem, Order, int], torch.Tensor] = {}  # none is dropped: a captured graph may read it


def _each_in_order(p: PatchProblem, order: Order, columns: int, channels: torch.Tensor) -> torch.Tensor:
    """[2, C] -> [2, columns]"""
    return _in_order(p, order, channels.view(2, p.C, 1, 1, 1).expand(2, p.C, *p.P), columns)


def _in_order(p: PatchProblem, order: Order, x: torch.Tensor, columns: int) -> torch.Tensor:
    """[n, C, P_t, P_h, P_w] -> [n, columns], in the order in which the kernel meets the pixels, zeros behind them."""
    if order.channels_last:
        x = x.permute(0, 2, 3, 4, 1)
    if order.steps is not None:
        C, P_h, P_w, RK, XK = order.steps
        x = x.reshape(-1, C, P_h // RK, RK, P_w // XK, XK).transpose(3, 4)
    x = x.reshape(x.shape[0], p.K)
    return F.pad(x, (0, columns - p.K)) if columns > p.K else x.contiguous()


class Descriptor:
    """A tensor map of these sizes. The first is checked by Triton, which takes 9 µs; those after it differ in their
    address alone, whose alignment is a part of the plan."""

    def __init__(self, shape: list[int], strides: list[int], block: list[int]):
        self.sizes = shape, strides, block
        self.fields: dict[str, Any] = {}
        self.kind: Any = None

    def __call__(self, base: torch.Tensor) -> Any:
        if self.kind is None:
            from triton.tools.tensor_descriptor import TensorDescriptor

            made = TensorDescriptor(base, *self.sizes)
            self.fields = {name: value for name, value in vars(made).items() if name != "base"}
            self.kind = TensorDescriptor
            return made
        made = object.__new__(self.kind)
        vars(made).update(self.fields, base=base)
        return made
