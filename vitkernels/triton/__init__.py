"""The Triton backend: declares what it takes (`why_not`), plans the launch (plan.py), launches (kernels.py)."""

from __future__ import annotations

import os
import warnings
from functools import lru_cache, partial
from types import ModuleType

import numpy
import torch
import torch.nn.functional as F

from .. import reference, tuning
from ..problem import PatchProblem
from ..tuning import Config, Gpu
from .plan import Order, Plan, make_plan, no_descriptor, product_of

INT32 = 2**31


def how(p: PatchProblem) -> str:
    reasons = no_descriptor(p, gpu_of(p.device), product_of(p, tf32()), True)
    return f"gathering pixels by threads: {'; '.join(reasons)}" if reasons else "patches cut by the copy engine"


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, as they were decorated, or would be."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@lru_cache(maxsize=1)
def _missing() -> str:
    try:
        import triton
    except ImportError as error:
        return f"Triton can't be imported: {error}"
    if interpreted() and _version(triton) < (3, 7) and _version(numpy) >= (2, 4):
        return f"the interpreter of Triton {triton.__version__} needs NumPy below 2.4, here is {numpy.__version__}"
    return ""


def _version(module: ModuleType) -> tuple[int, ...]:
    return tuple(int(n) for n in module.__version__.split(".")[:2])


def why_not(p: PatchProblem) -> list[str]:
    if missing := _missing():
        return [missing]
    reasons = []
    if p.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(p.device)
        if major < 8:
            name = torch.cuda.get_device_name(p.device)
            reasons.append(f"{name} is sm_{major}{minor}; the kernels need sm_80 or later")
    elif not (p.device.type == "cpu" and interpreted()):
        reasons.append(f"images are on {p.device}; Triton needs a CUDA device (or its interpreter, TRITON_INTERPRET=1)")
    for name, rows in (("N", p.N), ("B·N", p.B * p.rows), ("B·T", p.B * p.T)):
        if rows + 256 >= INT32:  # the kernel counts the rows of its last tile past the end
            reasons.append(f"{name} = {rows} rows do not fit 32 bits ({INT32})")
    return reasons


@lru_cache(maxsize=64)
def gpu_of(device: torch.device) -> Gpu:
    if device.type == "cpu":
        return tuning.NOMINAL[90]._replace(name="interpreter")
    properties = torch.cuda.get_device_properties(device)
    arch = properties.major * 10 + properties.minor
    return Gpu(properties.name, arch, properties.multi_processor_count, properties.shared_memory_per_block_optin)


def tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def tuning_key(p: PatchProblem, gpu: Gpu, aligned: bool) -> str:
    product = product_of(p, tf32())
    return tuning.key(p, product, not no_descriptor(p, gpu, product, aligned))


def candidates(p: PatchProblem, gpu: Gpu, aligned: bool) -> list[tuple[str, Config]]:
    """(road, tile) to try when tuning, the default first."""
    product = product_of(p, tf32())
    roads = ["gather"] if no_descriptor(p, gpu, product, aligned) else ["descriptor", "gather"]
    found: dict[tuple[str, Config], None] = {(roads[0], tuning.default(p, roads[0], product, gpu)): None}
    for road in roads:
        for c in tuning.rows(gpu.arch, road, product):
            for BM in {c.BM, c.BM // 2, c.BM * 2} & {32, 64, 128}:
                for stages in (2, 3, 4, 5):
                    for warps in {c.warps, 4, 8}:
                        changed = c._replace(BM=BM, stages=stages, warps=warps)
                        if BM * c.BN // warps <= 128 * 256 // 8 and tuning.fitted(p, changed, gpu) == changed:
                            found[road, changed] = None
    return list(found)


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
    aligned = images.data_ptr() % 16 == 0 and p not in _refused
    plan, kernel = _prepared(p, aligned, tf32(), interpreted(), choice)
    try:
        _launch(p, plan, kernel, images, weight, bias, pos_embed, prefix, keep, out)
    except RuntimeError as error:
        if plan.road != "descriptor" or choice is not None or "invalid argument" not in str(error):
            raise
        # The driver checks a descriptor when it is launched; what it refuses, threads can still gather.
        warnings.warn(f"the driver refused the tensor descriptors of {p}: {error}; pixels are gathered", stacklevel=2)
        _refused.add(p)
        return forward(p, images, weight, bias, pos_embed, prefix, keep)
    return out


_refused: set[PatchProblem] = set()


def _launch(p, plan: Plan, kernel, images, weight, bias, pos_embed, prefix, keep, out) -> None:
    weight = packed(p, plan, weight)
    tensors: dict[str, object] = {
        "bias": bias, "pos": pos_embed, "prefix": prefix, "out": out,
        "centred": _centred(p, plan) if plan.constants["NORMALISED"] else None,
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
        kernel(**tensors, **strides)


@lru_cache(maxsize=1024)
def _prepared(p: PatchProblem, aligned: bool, tf32: bool, interpreted: bool, choice) -> tuple[Plan, partial]:
    """The plan, and its kernel with every argument that is no tensor's."""
    plan = make_plan(p, gpu_of(p.device), aligned, tf32, interpreted, choice)
    kernel, constants = kernel_of(plan)
    return plan, partial(kernel[(plan.grid,)], **plan.scalars, **constants, **options(plan))


def forget_plans() -> None:
    """Plan again at the next call: the measured tiles have changed."""
    make_plan.cache_clear()
    _prepared.cache_clear()


def options(plan: Plan) -> dict[str, object]:
    return {"num_warps": plan.config.warps, "num_stages": plan.config.stages, "enable_fp_fusion": True}


def kernel_of(plan: Plan):
    """The plan's kernel and its constants, dtypes as Triton names them."""
    import triton.language as tl

    from . import kernels

    names = {
        torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64,
    }  # fmt: skip
    kernel = {"gather": kernels.gather_kernel, "descriptor": kernels.descriptor_kernel}[plan.road]
    return kernel, {k: names.get(v, v) if isinstance(v, torch.dtype) else v for k, v in plan.constants.items()}


def packed(p: PatchProblem, plan: Plan, weight: torch.Tensor) -> torch.Tensor:
    """The weight [D, weight_columns] in the kernel's order and dtype: the parameter itself where it is that already.

    Never cached. A copy is a few microseconds before a launch that is worth it; a cache would have to notice every
    write, and neither `.data` nor FSDP2, which refills a parameter's storage, raises the parameter's version.
    """
    rows = _in_order(p, plan.order, weight.to(p.compute_dtype), plan.weight_columns)
    return rows.clone() if plan.road == "descriptor" and rows.data_ptr() % 16 else rows


def _centred(p: PatchProblem, plan: Plan) -> torch.Tensor:
    """[2, padded_K]: m and a of y = (x − m)·a for each element of a patch, in the weight's order."""
    dtype = plan.constants["SUM"]
    if p.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # Memory of a graph's pool must not outlive it in our cache.
        return _each_in_order(p, plan.order, plan.padded_K, reference.centred(p, dtype))
    return _centred_constant(p, plan.order, plan.padded_K, dtype)


@lru_cache(maxsize=256)
def _centred_constant(p: PatchProblem, order: Order, columns: int, dtype: torch.dtype) -> torch.Tensor:
    # Made on the host: when the copy returns, it is there for every stream.
    return _each_in_order(p, order, columns, torch.tensor(p.centred, dtype=dtype)).to(p.device)


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
