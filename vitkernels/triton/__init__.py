"""The Triton backend: declares what it takes (`why_not`), plans the launch (plan.py), launches (kernels.py)."""

from __future__ import annotations

import os
from functools import lru_cache

import torch
import torch.nn.functional as F

from .. import reference, tuning
from ..problem import PatchProblem
from ..tuning import Config, Gpu
from .plan import Plan, make_plan, no_descriptor, product_of

INT32 = 2**31


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, as they were decorated, or would be."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@lru_cache(maxsize=1)
def _missing() -> str:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton can't be imported: {error}"
    return ""


def why_not(p: PatchProblem) -> list[str]:
    if missing := _missing():
        return [missing]
    reasons = []
    if p.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(p.device)
        if major < 8:
            reasons.append(f"{torch.cuda.get_device_name(p.device)} is sm_{major}{minor}; the kernels need sm_80 or later")
    elif not (p.device.type == "cpu" and interpreted()):
        reasons.append(f"images are on {p.device}; Triton needs a CUDA device (or its interpreter, TRITON_INTERPRET=1)")
    for name, rows in (("B·N", p.B * p.rows), ("B·T", p.B * p.T)):
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
    interpret = interpreted()
    # A picture that is only written as prefix tokens (an empty keep list) has no tile and needs no road.
    plan = make_plan(p, gpu_of(p.device), images.data_ptr() % 16 == 0, tf32(), interpret, choice)
    pos_embed, prefix, bias = (_rows_dense(t) for t in (pos_embed, prefix, bias))
    tensors = {
        "bias": bias, "pos": pos_embed, "prefix": prefix, "out": out,
        "centred": _centred(p, plan) if plan.constants["NORMALISED"] else None,
    }  # fmt: skip
    weight = packed(p, plan, weight)
    if plan.road == "descriptor":
        tensors |= _descriptors(plan, images, weight, out[:, p.T :])
    else:
        tensors |= {"images": images, "weight": weight, "keep": None if keep is None else keep.contiguous()}
    strides = {
        f"{name}_{axis}": stride
        for name, axes, t in (("pos", "bn", pos_embed), ("prefix", "bt", prefix))
        for axis, stride in zip(axes, _batch_strides(t), strict=True)
    }
    kernel, constants = _kernel(plan)
    with torch.cuda.device_of(images):
        kernel[(plan.grid,)](
            **tensors, **plan.scalars, **strides, **constants,
            num_warps=plan.config.warps, num_stages=plan.config.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def _kernel(plan: Plan):
    """The plan's kernel and its constants, dtypes as Triton names them."""
    import triton.language as tl

    from . import kernels

    names = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}
    kernel = {"gather": kernels.gather_kernel, "descriptor": kernels.descriptor_kernel}[plan.road]
    return kernel, {k: names.get(v, v) if isinstance(v, torch.dtype) else v for k, v in plan.constants.items()}


def packed(p: PatchProblem, plan: Plan, weight: torch.Tensor) -> torch.Tensor:
    """The weight [D, weight_columns] in the kernel's order and dtype: the parameter itself where it is that already.

    Never cached. A copy is a few microseconds of a launch that is worth it; a cache would have to notice every write,
    and FSDP2 refills a parameter's storage without raising its version, as `.data` does.
    """
    return _in_order(p, plan, weight.to(p.compute_dtype))


def _centred(p: PatchProblem, plan: Plan) -> torch.Tensor:
    """[2, K or K_PAD]: m and a of y = (x − m)·a for each element of a patch, in the weight's order."""
    sums = plan.constants["SUM"]
    m_a = reference.centred(p, sums)  # type: ignore[arg-type]
    each = m_a.view(2, p.C, 1, 1, 1).expand(2, p.C, *p.P)
    width = plan.constants.get("K_PAD", plan.weight_columns)
    return _padded(_in_order(p, plan, each, pad=False), width)  # type: ignore[arg-type]


def _in_order(p: PatchProblem, plan: Plan, x: torch.Tensor, pad: bool = True) -> torch.Tensor:
    """[n, C, P_t, P_h, P_w] -> [n, columns], in the order in which the kernel meets the pixels."""
    if plan.channels_last:
        x = x.permute(0, 2, 3, 4, 1)
    if plan.steps is not None:
        RK, XK = plan.steps
        C, P_h, P_w = (plan.constants[n] for n in ("C", "P_h", "P_w"))
        x = x.reshape(-1, C, P_h // RK, RK, P_w // XK, XK).transpose(3, 4)  # type: ignore[operator,arg-type]
    x = x.reshape(x.shape[0], p.K)
    return _padded(x, plan.weight_columns) if pad else x


def _padded(x: torch.Tensor, columns: int) -> torch.Tensor:
    return F.pad(x, (0, columns - x.shape[1])) if columns > x.shape[1] else x.contiguous()


def _rows_dense(t: torch.Tensor | None) -> torch.Tensor | None:
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


def _batch_strides(t: torch.Tensor | None) -> tuple[int, int]:
    """(between images, between rows) of a [1|B, rows, D] table; 0 where all images share it."""
    return (0, 0) if t is None else (t.stride(0) if t.shape[0] > 1 else 0, t.stride(1))


def _descriptors(plan: Plan, images: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor) -> dict[str, object]:
    from triton.tools.tensor_descriptor import TensorDescriptor

    bases = {"image_desc": images, "weight_desc": weight, "out_desc": tokens}
    return {name: TensorDescriptor(bases[name], *geometry) for name, geometry in plan.descriptors.items()}
