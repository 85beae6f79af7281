"""The CUDA C++ backend: csrc/, built as `vitkernels._cuda`. Everything is allocated here; C++ gets raw pointers, sizes,
strides and the current stream, plans the launch (csrc/forward/plan.h, backward_plan.h) and makes it."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch

from ...gpu import gpu_of, tf32
from ...problem import PatchProblem
from .. import fallbacks
from ..reference import gradients, unfold
from . import extension

# As csrc/common/problem.h numbers them
DTYPES = (
    torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip
BACKEND = "cuda"
_NUMBER = {dtype: i for i, dtype in enumerate(DTYPES)}


def why_not(p: PatchProblem) -> list[str]:
    if missing := extension.missing():
        return [missing]
    device_type = extension.load().device_type
    if p.device.type != device_type:
        return [f"images are on {p.device}; the CUDA C++ kernels need a {device_type.upper()} device"]
    arch = gpu_of(p.device).arch
    if device_type == "cuda" and not any(covers(built, arch) for built in _built()):
        built = ", ".join(_built()) or "nobody knows which"
        return [f"the GPU is sm_{arch}; the extension was built for {built} (TORCH_CUDA_ARCH_LIST)"]
    problem, figures = _problem(p, tf32()), _gpu(p.device)
    reasons = extension.load().why_not(problem, figures)
    refused = extension.load().backward_refused(problem)
    return reasons + [refused] * bool(refused)


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
    """The forward's road, for tensors that begin on 16 bytes and a dense weight."""
    weight = _dense((p.D, p.C, *p.P))
    plan = _plan(p, tf32(), fallbacks.happened(BACKEND, p), 0, 0, _NUMBER[p.weight_dtype], weight)
    return extension.load().how(_problem(p, tf32()), plan)


@lru_cache(maxsize=1024)
def no_wgmma(p: PatchProblem) -> str:
    """Why the weight's gradient is not multiplied by wgmma, for dense gradients of the tokens; "": it is."""
    images = (0, _NUMBER[p.image_dtype], *p.image_strides)
    grad = (0, _NUMBER[p.out_dtype], *_dense(p.out_shape))
    return extension.load().no_hopper_weight(_problem(p, tf32()), _gpu(p.device), images, grad)


def candidates(p: PatchProblem, images: torch.Tensor, weight: torch.Tensor) -> dict[str, Any]:
    """Every plan of the forward that can take the problem, by what it would do."""
    module, problem = extension.load(), _problem(p, tf32())
    found = module.forward_candidates(problem, _gpu(p.device), *_ends(p, *_places(images, weight)))
    return {module.how(problem, plan): plan for plan in found}


def forward(
    p: PatchProblem,
    images: torch.Tensor,  # [B, C, F, H, W]
    weight: torch.Tensor,  # [D, C, P_t, P_h, P_w]
    bias: torch.Tensor | None,  # [D]
    pos_embed: torch.Tensor | None,  # [1|B, N|T+N, D]
    prefix: torch.Tensor | None,  # [1|B, T, D]
    keep: torch.Tensor | None,  # [B, rows]
    *,
    plan: Any = None,  # one of `candidates`, instead of the cheapest
) -> torch.Tensor:  # [B, T+rows, D]
    out = images.new_empty(p.out_shape, dtype=p.out_dtype)
    if out.numel() == 0:
        return out
    rounded, centred = tf32(), _centred(p)
    taken = plan or _plan(p, rounded, fallbacks.happened(BACKEND, p), *_places(images, weight))
    scratch = images.new_empty(taken.scratch_bytes, dtype=torch.uint8) if taken.scratch_bytes else None
    try:
        with torch.cuda.device_of(images):
            extension.load().forward(
                _problem(p, rounded), taken, _plain(images), _plain(weight), _plain(bias), _table(pos_embed),
                _table(prefix), _plain(keep), _plain(centred), _plain(out),
                0 if scratch is None else scratch.data_ptr(), _stream(p),
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
    grads: gradients.Grads,  # of images, weight, bias, pos_embed and prefix, to be written; None: nobody asks
) -> None:
    d_images, d_weight, d_bias, d_pos, d_prefix = grads
    if grad.numel() == 0 or p.rows == 0:
        return gradients.backward(p, grad, images, weight, bias, pos_embed, prefix, keep, grads)
    d_pos, d_prefix = gradients.own_tables(p, grad, keep, d_pos, d_prefix)
    if all(g is None for g in (d_images, d_weight, d_bias, d_pos, d_prefix)):
        return None
    centred = _centred(p)  # held until the launch: below is but its address
    everything = (grad, images, weight, keep, centred, d_images, d_weight, d_bias, d_pos, d_prefix)
    tensors = tuple(map(_plain, everything))
    module, problem = extension.load(), _problem(p, tf32())
    plan = module.plan_backward(problem, _gpu(p.device, fallbacks.happened(BACKEND, p)), tensors)
    scratch = images.new_empty(plan.scratch_bytes, dtype=torch.uint8)
    try:
        with torch.cuda.device_of(images):
            module.backward(problem, plan, tensors, scratch.data_ptr(), _stream(p))
    except extension.load().Refused as error:
        _leave_the_copy_engine(p, error)
        return backward(p, grad, images, weight, bias, pos_embed, prefix, keep, grads)
    return None


def _leave_the_copy_engine(p: PatchProblem, error: Exception) -> None:
    """For what came before it needs no tensor map, and so nothing that the driver refuses."""
    fallbacks.remember(BACKEND, p, f"{error}; the copy engine is not used")


@lru_cache(maxsize=1024)
def _problem(p: PatchProblem, rounded: bool) -> Any:
    return extension.load().Problem({
        "B": p.B, "C": p.C, "F": p.F, "H": p.H, "W": p.W, "P": p.P, "S": p.S, "pad": p.pad, "G": p.G,
        "D": p.D, "T": p.T, "N": p.N, "rows": p.rows, "K": p.K, "keep": p.n_keep is not None, "pos_rows": p.pos_rows,
        "strides": p.image_strides, "normalised": p.normalised, "scale": p.scale, "tf32": rounded,
        "image": _NUMBER[p.image_dtype], "weight": _NUMBER[p.weight_dtype], "compute": _NUMBER[p.compute_dtype],
        "out": _NUMBER[p.out_dtype],
    })  # fmt: skip


@lru_cache(maxsize=64)
def _gpu(device: torch.device, refused: bool = False) -> Any:
    gpu, arch = gpu_of(device), gpu_of(device).arch
    if arch == 90 and refused:
        arch = 89  # the roads of what came before
    if arch == 90 and device.type == "cuda" and not any(a[:4] in ("9.0a", "9.0+") for a in _built()):
        arch = 89  # without code of sm_90a
    return extension.load().Gpu(arch, gpu.multiprocessors, gpu.shared_bytes)


@lru_cache(maxsize=1024)
def _plan(p: PatchProblem, rounded: bool, refused: bool, *places: Any) -> Any:
    return extension.load().plan_forward(_problem(p, rounded), _gpu(p.device, refused), *_ends(p, *places))


def _places(images: torch.Tensor, weight: torch.Tensor) -> tuple[Any, ...]:
    """What a plan asks of the tensors beside the problem: alignments, and how the weight lies."""
    return images.data_ptr() % 16, weight.data_ptr() % 16, _NUMBER[weight.dtype], weight.stride()


def _ends(p: PatchProblem, images: int, weight: int, dtype: int, strides: tuple[int, ...]) -> tuple[Any, Any]:
    return (images, _NUMBER[p.image_dtype], *p.image_strides), (weight, dtype, *strides)


def _centred(p: PatchProblem) -> torch.Tensor | None:
    return unfold.centred(p, unfold.sum_dtype(p)) if _problem(p, tf32()).normalised else None


def _plain(t: torch.Tensor | None) -> tuple[int, ...] | None:
    return None if t is None else (t.data_ptr(), _NUMBER[t.dtype], *t.stride())


def _table(t: torch.Tensor | None) -> tuple[int, ...] | None:
    """A table of one row of images is that of all."""
    if t is None:
        return None
    b, *others = t.stride()
    return t.data_ptr(), _NUMBER[t.dtype], 0 if t.shape[0] == 1 else b, *others


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a dense tensor."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _stream(p: PatchProblem) -> int:
    return torch.cuda.current_stream(p.device).cuda_stream if p.device.type == "cuda" else 0
