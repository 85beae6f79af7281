"""The Triton forward: launches what forward_plan.py planned; the kernels are in forward_kernels.py."""

from __future__ import annotations

from functools import partial

import torch

from ...gpu import bind_context, gpu_of, tf32
from ...problem import PatchProblem
from .. import fallbacks
from ..common import canonical
from .config_cache import planned
from .configs import Config
from .forward_plan import Plan, make_plan
from .launch import bound, centred, interpreted, packed
from .toolchain import launch

# As Triton names CUDA_ERROR_INVALID_VALUE of cuTensorMapEncodeTiled; any other error is no refusal.
BACKEND = "triton"
REFUSED = "Triton Error [CUDA]: Failed to create tensor map descriptor: invalid argument"


def forward(
    p: PatchProblem,
    images: torch.Tensor,  # [B, C, F, H, W]
    weight: torch.Tensor,  # [D, C, P_t, P_h, P_w]
    bias: torch.Tensor | None,  # [D]
    pos_embed: torch.Tensor | None,  # [1|B, N|T+N, D]
    prefix: torch.Tensor | None,  # [1|B, T, D]
    keep: torch.Tensor | None,  # [B, N_keep]
    *,
    choice: tuple[str, Config] | None = None,  # a kernel and its tile, instead of the tables'
) -> torch.Tensor:  # [B, T+N, D]
    images, weight, bias, pos_embed, prefix, keep = canonical(images, weight, bias, pos_embed, prefix, keep)
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
        if plan.kernel != "descriptor" or choice is not None or not str(error).startswith(REFUSED):
            raise
        # The driver checks a descriptor when it is launched; what it refuses, threads can still gather.
        fallbacks.remember(BACKEND, p, f"{' '.join(str(error).split())}; pixels are gathered")
        return forward(p, images, weight, bias, pos_embed, prefix, keep)
    return out


def _launch(p, plan: Plan, kernel, images, weight, bias, pos_embed, prefix, keep, out) -> None:
    weight = packed(p, plan.order, plan.weight_columns, weight)
    if plan.kernel == "descriptor" and weight.data_ptr() % 16:
        weight = weight.clone()
    tensors: dict[str, object] = {
        "bias": bias, "pos": pos_embed, "prefix": prefix, "out": out,
        "centred": centred(p, plan.order, plan.padded_K) if plan.constants["NORMALISED"] else None,
    }  # fmt: skip
    if plan.kernel == "descriptor":
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
        launch(kernel, **tensors, **strides)


@planned
def _prepared(p: PatchProblem, aligned: bool, tf32: bool, interpreted: bool, choice) -> tuple[Plan, partial]:
    """The plan, and its kernel with every argument that is no tensor's."""
    plan = make_plan(p, gpu_of(p.device), aligned, tf32, interpreted, choice)
    return plan, bound(f"{plan.kernel}_kernel", plan.config, plan.grid, plan.scalars, plan.constants)
