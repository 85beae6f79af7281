"""The CUDA C++ backend: csrc/, built as `vitkernels._cuda`. Everything is planned here
(forward_plan.py, backward_plan.py, images_plan.py) and allocated; C++ gets the plan, raw pointers, sizes, strides and
the current stream, and launches."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import prod
from typing import Any

import torch

from ...gpu import OLDEST, Gpu, gpu_of, not_nvidia, rounds, tf32
from ...problem import Layout, PatchProblem, video_strides
from .. import fallbacks, reference
from ..common import Grads, centred, empty, own_tables
from ..patch_layout import layout_of, product_of, scaling, within_image
from . import backward_plan, extension, forward_plan
from .backward_operands import OPERANDS, WGMMA_PIXELS, Grad, Operand
from .forward_loaders import LOADERS
from .forward_plan import Plan

# As csrc/problem.h numbers them
DTYPES = (
    torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip
BACKEND = "cuda"
LIMIT = 2**31 - 2**16
_NUMBER = {dtype: i for i, dtype in enumerate(DTYPES)}


def why_not(p: PatchProblem) -> list[str]:
    if missing := extension.missing():
        return [missing]
    device_type = extension.load().device_type
    if p.device.type != device_type:
        return [f"images are on {p.device}; the CUDA C++ kernels need a {device_type.upper()} device"]
    if device_type == "cuda" and (other := not_nvidia()):
        return [other]
    arch = gpu_of(p.device).arch
    if device_type == "cuda" and not any(covers(built, arch) for built in _built()):
        built = ", ".join(_built()) or "nobody knows which"
        return [f"the GPU is sm_{arch}; the extension was built for {built} (TORCH_CUDA_ARCH_LIST)"]
    return [f"the GPU is sm_{arch}; the kernels need sm_{OLDEST} or later"] * (arch < OLDEST) + too_large(p)


def too_large(p: PatchProblem) -> list[str]:
    """What kernels of either direction count in 32 bits: along an axis, and in a grid. Offsets are 64."""
    t, y, x = S = within_image(p)
    sizes = (p.F + 2 * p.pad[0], p.H + 2 * p.pad[1], p.W + 2 * p.pad[2])
    cells, of_a_cell = p.B * prod(-(-n // s) for n, s in zip(sizes, S, strict=True)), p.C * t * y * x
    windows = prod(-(-n // s) for n, s in zip(p.P, S, strict=True))
    counts = {
        "F + 2·padding + stride": sizes[0] + t, "H + 2·padding + stride": sizes[1] + y,
        "C·(W + 2·padding + stride)": (sizes[2] + x) * p.C,
        "B·N": p.B * p.rows, "B·T": p.B * p.T, "N": p.N, "K": p.K, "D": p.D, "T": p.T,
        "cells of B·image": cells,
        "channels of a cell": of_a_cell,
        "pixels, in tiles of 64 × 64,": -(-cells // 64) * -(-(of_a_cell + 8 * 64) // 64),
        "windows × steps of channels": windows * -(-p.D // 16),
        "tiles of dW": -(-p.D // 32) * -(-p.K // 32),
        "parts of dW": -(-p.D * p.K // backward_plan.FINISH_THREADS),
        "elements of the table": (p.T + p.N) * p.D // backward_plan.FINISH_THREADS,
    }  # fmt: skip
    return [f"{name} = {n} does not fit 32 bits" for name, n in counts.items() if n >= LIMIT]


def _built() -> list[str]:
    return extension.record().get("archs", [])


def covers(built: str, arch: int) -> bool:
    """Whether code built for "8.0", "9.0a" or "8.0+PTX" runs on sm_`arch`: machine code on its own generation, from
    its own version on; what is particular to one version ("a") only there; PTX on all that came later."""
    number, ptx = built.removesuffix("+PTX"), built.endswith("+PTX")
    major, minor = (int(n) for n in number.rstrip("af").split("."))
    version = major * 10 + minor
    if number.endswith("a"):
        return version == arch
    return version <= arch and (ptx or major == arch // 10)


def how(p: PatchProblem) -> str:
    """The forward, for tensors that begin on 16 bytes."""
    return forward_plan.make_plan(p, _gpu(p.device, fallbacks.happened(BACKEND, p)), tf32()).how


@lru_cache(maxsize=1024)
def weight_kind(p: PatchProblem) -> str:
    """Of dispatch.kind_of: how wgmma multiplies for the weight's gradient in 16 bits, where that of the tokens is
    dense."""
    if backward_plan.no_wgmma(p, _gpu(p.device), 0, Grad(0, ((p.T + p.rows) * p.D, p.D, 1))):
        copied = backward_plan.copied_plan(p, _gpu(p.device), False, 0, bias=True, pos=True, prefix=True)
        return "half, tokens copied for wgmma" if copied else "half, not by wgmma"
    if backward_plan.not_by_engine(p, 0):
        return "half, copied for wgmma"
    return "half, padded for wgmma" if layout_of(p).P[2] % WGMMA_PIXELS else "half"


def candidates(
    p: PatchProblem, images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
    pos_embed: torch.Tensor | None, prefix: torch.Tensor | None, keep: torch.Tensor | None,
) -> dict[str, Plan]:  # fmt: skip
    """Every plan of `forward` that can take these tensors, by what it would do."""
    at = images.data_ptr() % 16, weight.data_ptr() % 16, _address(pos_embed) % 16
    found, _ = forward_plan.candidates(p, _gpu(p.device), tf32(), *at)
    return {plan.how: plan for plan in found}


def forward(
    p: PatchProblem,
    images: torch.Tensor,  # [B, C, F, H, W], or without F
    weight: torch.Tensor,  # [D, C, P_t, P_h, P_w], or without P_t
    bias: torch.Tensor | None,  # [D]
    pos_embed: torch.Tensor | None,  # [1|B, N|T+N, D], or without 1; how all of them lie, p.tensors says
    prefix: torch.Tensor | None,  # [1|B, T, D], or without 1
    keep: torch.Tensor | None,  # [B, rows]
    *,
    plan: Plan | None = None,  # one of `candidates`, instead of the cheapest
) -> torch.Tensor:  # [B, T+rows, D]
    out = empty(images, p.out_shape, p.out_dtype)
    if 0 in p.out_shape:
        return out
    images_at, weight_at, pos_at = images.data_ptr(), weight.data_ptr(), _address(pos_embed)
    launch, normalised, scratch_bytes = _prepared(
        p, rounds(p.compute_dtype), fallbacks.happened(BACKEND, p), images_at % 16, weight_at % 16, pos_at % 16, plan
    )
    constants = centred(p, p.sum_dtype) if normalised else None
    scratch = empty(images, (scratch_bytes,), torch.uint8) if scratch_bytes else None
    try:
        launch(
            images_at, weight_at, _address(bias), pos_at, _address(prefix), _address(keep),
            _address(constants), out.data_ptr(), _address(scratch), _stream(images),
        )  # fmt: skip
    except extension.load().Refused as error:
        if plan is not None:
            raise
        _leave_the_copy_engine(p, error)
        return forward(p, images, weight, bias, pos_embed, prefix, keep)
    return out


def backward(
    p: PatchProblem,
    grad: torch.Tensor,  # [B, T + rows, D]
    images: torch.Tensor,  # [B, C, F, H, W]
    weight: torch.Tensor,  # [D, C, P_t, P_h, P_w]
    bias: torch.Tensor | None,  # [D]
    pos_embed: torch.Tensor | None,  # [1|B, N|T+N, D]
    prefix: torch.Tensor | None,  # [1|B, T, D]
    keep: torch.Tensor | None,  # [B, rows]
    grads: Grads,  # of images, weight, bias, pos_embed and prefix, to be written; None: nobody asks
    *,
    pairs: bool | None = None,  # of blocks for the weight's, instead of what backward_plan.PAIRS says
) -> None:
    d_images, d_weight, d_bias, d_pos, d_prefix = grads
    if grad.numel() == 0 or p.rows == 0:
        return reference.backward(p, grad, images, weight, bias, pos_embed, prefix, keep, grads)
    d_pos, d_prefix = own_tables(p, grad, keep, d_pos, d_prefix)
    if all(g is None for g in (d_images, d_weight, d_bias, d_pos, d_prefix)):
        return None
    images_at, grad_at = images.data_ptr(), grad.data_ptr()
    made = d_images, d_weight, d_bias, d_pos, d_prefix
    launch, normalised, scratch_bytes = _prepared_backward(
        p, rounds(p.compute_dtype), fallbacks.happened(BACKEND, p), images_at % 16, grad_at % 16,
        _address(d_images) % 16, grad.dtype, grad.stride(), backward_plan.PAIRS if pairs is None else pairs,
        *[None if g is None else g.stride() for g in made],
    )  # fmt: skip
    constants = centred(p, p.sum_dtype) if normalised else None
    scratch = empty(images, (scratch_bytes,), torch.uint8)
    try:
        launch(
            grad_at, images_at, weight.data_ptr(), _address(keep), _address(constants), *map(_address, made),
            scratch.data_ptr(), _stream(images),
        )  # fmt: skip
    except extension.load().Refused as error:
        _leave_the_copy_engine(p, error)
        return backward(p, grad, images, weight, bias, pos_embed, prefix, keep, grads)
    return None


def _leave_the_copy_engine(p: PatchProblem, error: Exception) -> None:
    """For what came before it needs no tensor map, and so nothing that the driver refuses."""
    fallbacks.remember(BACKEND, p, f"{error}; the copy engine is not used")


@lru_cache(maxsize=1024)
def _problem(p: PatchProblem, rounded: bool) -> Any:
    normalised, scaled = scaling(p, product_of(p, rounded))
    return extension.load().Problem({
        "B": p.B, "C": p.C, "F": p.F, "H": p.H, "W": p.W, "P": p.P, "S": within_image(p), "pad": p.pad, "G": p.G,
        "D": p.D, "T": p.T, "N": p.N, "rows": p.rows, "K": p.K, "keep": p.n_keep is not None, "pos_rows": p.pos_rows,
        "strides": p.image_strides, "normalised": normalised, "scale": p.scale if scaled else 1.0, "tf32": rounded,
        "image": _NUMBER[p.image_dtype], "weight": _NUMBER[p.weight_dtype], "compute": _NUMBER[p.compute_dtype],
        "out": _NUMBER[p.out_dtype], "text": str(p), "device": -1 if p.device.index is None else p.device.index,
    })  # fmt: skip


@lru_cache(maxsize=64)
def _gpu(device: torch.device, refused: bool = False) -> Gpu:
    gpu = gpu_of(device)
    without = device.type == "cuda" and not any(a[:4] in ("9.0a", "9.0+") for a in _built())
    return gpu._replace(arch=89) if gpu.arch == 90 and (refused or without) else gpu  # as what came before


@lru_cache(maxsize=1024)
def _prepared(
    p: PatchProblem, rounded: bool, refused: bool, images_at: int, weight_at: int, pos_at: int, plan: Plan | None
) -> tuple[Callable[..., None], bool, int]:
    """The launch, but for the addresses; whether it wants the channels' constants; the bytes of scratch memory."""
    plan = plan or forward_plan.make_plan(p, _gpu(p.device, refused), rounded, images_at, weight_at, pos_at)
    module, problem = extension.load(), _problem(p, rounded)
    made = (  # here, so dense
        Layout(p.sum_dtype, (p.C, 1)),
        Layout(p.out_dtype, (p.out_shape[1] * p.D, p.D, 1)),
    )
    taken = module.ForwardPlan({**plan._asdict(), "loader": list(LOADERS).index(plan.loader)})
    return module.Forward(problem, taken, _layouts(*p.tensors, *made)), problem.normalised, plan.scratch_bytes


def _layouts(*tensors: Layout | None) -> tuple[tuple[int, ...] | None, ...]:
    return tuple(t if t is None else (_NUMBER[t.dtype], *t.strides) for t in tensors)


@lru_cache(maxsize=1024)
def _prepared_backward(
    p: PatchProblem, rounded: bool, refused: bool, images_at: int, grad_at: int, d_images_at: int,
    grad_dtype: torch.dtype, grad_strides: tuple[int, int, int], pairs: bool, *made: tuple[int, ...] | None,
) -> tuple[Callable[..., None], bool, int]:  # fmt: skip
    """The same of the gradients; `made` are the strides of those that are asked for."""
    images, weight, bias, pos, prefix = made
    d_images = None if images is None else video_strides(images)
    plan = backward_plan.make_plan(
        p, _gpu(p.device, refused), rounded, images_at, Grad(grad_at, grad_strides), weight=weight is not None,
        bias=bias is not None, pos=pos is not None, prefix=prefix is not None, images=d_images,
        d_images_at=d_images_at, pairs=pairs,
    )  # fmt: skip
    module, problem = extension.load(), _problem(p, rounded)
    # Tables that are shared, as those of each image are not summed here
    canonical = (
        d_images, weight and video_strides(weight), bias, pos and (0, *pos[-2:]), prefix and (0, *prefix[-2:]),
    )  # fmt: skip
    grads = (
        Layout(t.dtype, s) if t is not None and s is not None else None
        for t, s in zip(p.tensors, canonical, strict=False)
    )
    read = Layout(grad_dtype, grad_strides), *p.tensors[:2], p.tensors[5], Layout(p.sum_dtype, (p.C, 1))
    layouts = _layouts(*read, *grads)
    return module.Backward(problem, module.BackwardPlan(_fields(plan)), layouts), problem.normalised, plan.scratch_bytes


def forget() -> None:
    """What was planned, of which GPU, and made by which extension."""
    for cached in (_gpu, _prepared, _prepared_backward, _problem, weight_kind):
        cached.cache_clear()


def _fields(plan: Any) -> Any:
    """Plans within plans as dictionaries, operands as (number of the loader, chunk)."""
    if isinstance(plan, Operand):
        return OPERANDS.index(plan.loader), plan.chunk
    if hasattr(plan, "_asdict"):
        return {name: _fields(value) for name, value in plan._asdict().items()}
    if isinstance(plan, tuple):
        return tuple(map(_fields, plan))
    return plan


def _address(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _stream(images: torch.Tensor) -> int:
    return torch._C._cuda_getCurrentRawStream(images.get_device()) if images.is_cuda else 0
