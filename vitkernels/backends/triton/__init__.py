"""The Triton backend: what it takes (`why_not`), and the forward, planned by plan.py, run by kernels.py."""

from __future__ import annotations

from functools import lru_cache, partial
from types import ModuleType

import numpy
import torch

from ...gpu import Gpu, bind_context, gpu_of, tf32
from ...problem import PatchProblem
from .. import fallbacks
from . import configs
from .backward import backward as backward
from .backward import forget as forget_gradients
from .backward_plan import cells_of, gradient_candidates
from .configs import Config
from .forward_plan import Plan, make_plan, product_of, roads_of
from .launch import bound, centred, interpreted, packed

INT32 = 2**31
HOW = {"gather": "pixels gathered by threads", "descriptor": "patches cut by the copy engine"}
# As Triton names CUDA_ERROR_INVALID_VALUE of cuTensorMapEncodeTiled; any other error is no refusal.
REFUSED = "Triton Error [CUDA]: Failed to create tensor map descriptor: invalid argument"
BACKEND = "triton"
SLACK = 1 << 17  # rows that a kernel may count past the end, of its last tile or of its last part


def how(p: PatchProblem) -> str:
    road, *_ = roads_of(p, gpu_of(p.device), product_of(p, tf32()), not fallbacks.happened(BACKEND, p))
    return HOW[road]


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
    if missing := _missing():
        return [missing]
    reasons = []
    if p.device.type == "cuda":
        gpu = gpu_of(p.device)
        if gpu.arch < 80:
            reasons.append(f"{gpu.name} is sm_{gpu.arch}; the kernels need sm_80 or later")
    elif not (p.device.type == "cpu" and interpreted()):
        reasons.append(f"images are on {p.device}; Triton needs a CUDA device (or its interpreter, TRITON_INTERPRET=1)")
    for name, rows in (("N", p.N), ("B·N", p.B * p.rows), ("B·T", p.B * p.T), ("B·cells", p.B * cells_of(p))):
        if rows + SLACK >= INT32:
            reasons.append(f"{name} = {rows} rows do not fit 32 bits ({INT32})")
    loaded = [d for d in (p.image_dtype, p.out_dtype) if d != torch.float64]
    if p.compute_dtype == torch.float64 and loaded and not interpreted() and _triton_version() < (3, 7):
        # "Currently fp64 don't support largeK MMA": the forward's pixels, the backward's dY
        reasons.append(f"Triton before 3.7 can't multiply in fp64 what it loads as {loaded[0]}")
    return reasons


def tuning_key(p: PatchProblem, gpu: Gpu, aligned: bool, road: str = "forward") -> str:
    product = product_of(p, tf32())
    return configs.key(p, product, road == "forward" and "descriptor" in roads_of(p, gpu, product, aligned), road)


def candidates(p: PatchProblem, gpu: Gpu, aligned: bool, road: str = "forward") -> list[tuple[str, Config]]:
    """(road, tile) to try when tuning the forward, or a road of the backward: the default first, then by promise."""
    product = product_of(p, tf32())
    if road != "forward":
        return gradient_candidates(p, gpu, product, road)
    roads = roads_of(p, gpu, product, aligned)
    found = [
        (road, c)
        for road in roads
        for row in configs.rows(gpu.arch, road, product)
        for c in configs.variants(configs.fitted(p, row, gpu))
        if configs.fitted(p, c, gpu) == c
    ]
    sizes = p.image_dtype.itemsize, p.compute_dtype.itemsize
    return configs.ranked(
        (roads[0], configs.default(p, roads[0], product, gpu)), found,
        lambda choice: configs.estimate(p.B * p.rows, p.D, p.K, choice[1], gpu, product, *sizes),
    )  # fmt: skip


def forward(
    p: PatchProblem,
    images: torch.Tensor,  # [B, C, F, H, W]
    weight: torch.Tensor,  # [D, C, P_t, P_h, P_w]
    bias: torch.Tensor | None,  # [D]
    pos_embed: torch.Tensor | None,  # [1|B, N|T+N, D]
    prefix: torch.Tensor | None,  # [1|B, T, D]
    keep: torch.Tensor | None,  # [B, N_keep]
    *,
    choice: tuple[str, Config] | None = None,  # a road and a tile, instead of the tables'
) -> torch.Tensor:  # [B, T+N, D]
    out = images.new_empty(p.out_shape, dtype=p.out_dtype)
    if out.numel() == 0:
        return out
    pos_embed, prefix, bias = (
        t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (pos_embed, prefix, bias)
    )
    keep = None if keep is None else keep.contiguous()
    aligned = images.data_ptr() % 16 == 0 and not fallbacks.happened(BACKEND, p)
    plan, kernel = _prepared(p, aligned, tf32(), interpreted(), choice)
    try:
        _launch(p, plan, kernel, images, weight, bias, pos_embed, prefix, keep, out)
    except RuntimeError as error:
        if plan.road != "descriptor" or choice is not None or not str(error).startswith(REFUSED):
            raise
        # The driver checks a descriptor when it is launched; what it refuses, threads can still gather.
        fallbacks.remember(BACKEND, p, f"{' '.join(str(error).split())}; pixels are gathered")
        return forward(p, images, weight, bias, pos_embed, prefix, keep)
    return out


def _launch(p, plan: Plan, kernel, images, weight, bias, pos_embed, prefix, keep, out) -> None:
    weight = packed(p, plan.order, plan.weight_columns, weight)
    if plan.road == "descriptor" and weight.data_ptr() % 16:
        weight = weight.clone()
    tensors: dict[str, object] = {
        "bias": bias, "pos": pos_embed, "prefix": prefix, "out": out,
        "centred": centred(p, plan.order, plan.padded_K) if plan.constants["NORMALISED"] else None,
    }  # fmt: skip
    if plan.road == "descriptor":
        from triton.tools.tensor_descriptor import TensorDescriptor

        bases = {"image_desc": images, "weight_desc": weight, "out_desc": out[:, p.T :]}
        tensors |= {name: TensorDescriptor(bases[name], *shape) for name, shape in plan.descriptors.items()}
    else:
        tensors |= {"images": images, "weight": weight, "keep": keep}
    strides = {  # between images (0 where all share one table) and between rows
        f"{name}_{axis}": 0 if t is None or (dim == 0 and t.shape[0] == 1) else t.stride(dim)
        for name, t in (("pos", pos_embed), ("prefix", prefix))
        for dim, axis in enumerate("bn" if name == "pos" else "bt")
    }
    with torch.cuda.device_of(images):
        if plan.descriptors:
            bind_context(p.device)  # Triton does so only after it has made the descriptors
        kernel(**tensors, **strides)


@lru_cache(maxsize=1024)
def _prepared(p: PatchProblem, aligned: bool, tf32: bool, interpreted: bool, choice) -> tuple[Plan, partial]:
    """The plan, and its kernel with every argument that is no tensor's."""
    plan = make_plan(p, gpu_of(p.device), aligned, tf32, interpreted, choice)
    return plan, bound(f"{plan.road}_kernel", plan.config, plan.grid, plan.scalars, plan.constants)


def forget_plans() -> None:
    """Plan again at the next call: the measured tiles have changed."""
    make_plan.cache_clear()
    _prepared.cache_clear()
    forget_gradients()
