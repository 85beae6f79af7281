"""The Triton forward: launches what forward_plan.py planned; the kernels are in forward_kernels.py."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch

from ...gpu import bind_context, gpu_of, on_device_of, rounds
from ...problem import PatchProblem
from .. import fallbacks
from ..common import empty
from ..patch_layout import weight_in_order
from .config_cache import planned
from .configs import Config
from .forward_plan import Plan, make_plan
from .launch import BACKEND, Descriptor, bound, centred, interpreted, packed, refused
from .toolchain import launch


class Prepared(NamedTuple):
    """A launch but for its tensors."""

    plan: Plan
    kernel: partial[None]  # with every argument that is no tensor's
    descriptors: dict[str, Descriptor]
    normalised: bool
    packs: bool  # the weight is no operand as it lies
    gathers: bool  # the elements of a row of bias, position or prefix are apart


def forward(
    p: PatchProblem,
    images: torch.Tensor,  # [B, C, F, H, W], or without F
    weight: torch.Tensor,  # [D, C, P_t, P_h, P_w], or without P_t
    bias: torch.Tensor | None,  # [D]
    pos_embed: torch.Tensor | None,  # [1|B, N|T+N, D], or without 1; how all of them lie, p.tensors says
    prefix: torch.Tensor | None,  # [1|B, T, D], or without 1
    keep: torch.Tensor | None,  # [B, N_keep]
    *,
    choice: tuple[str, Config] | None = None,  # a kernel and its tile, instead of the tables'
) -> torch.Tensor:  # [B, T+N, D]
    out = empty(images, p.out_shape, p.out_dtype)
    if out.numel() == 0:
        return out
    aligned = images.data_ptr() % 16 == 0 and not fallbacks.happened(BACKEND, p)
    prepared = _prepared(p, aligned, rounds(p.compute_dtype), interpreted(), choice)
    try:
        _launch(p, prepared, images, weight, bias, pos_embed, prefix, keep, out)
    except RuntimeError as error:
        if prepared.plan.kernel != "descriptor" or choice is not None or not refused(error):
            raise
        # The driver checks a descriptor when it is launched; what it refuses, threads can still gather.
        fallbacks.remember(BACKEND, p, f"{' '.join(str(error).split())}; pixels are gathered")
        return forward(p, images, weight, bias, pos_embed, prefix, keep)
    return out


def _launch(p, prepared: Prepared, images, weight, bias, pos_embed, prefix, keep, out) -> None:
    plan = prepared.plan
    tensors = {"bias": bias, "pos": pos_embed, "prefix": prefix, "out": out, "centred": None}
    if prepared.gathers:
        tensors |= _side_by_side(p, bias, pos_embed, prefix)
    if prepared.packs:
        weight = packed(p, plan.order, plan.weight_columns, weight)
    if prepared.normalised:
        tensors["centred"] = centred(p, plan.order, plan.padded_K)
    if prepared.descriptors:
        bases = {"image_desc": images, "out_desc": out.narrow(1, p.T, p.rows),
                 "weight_desc": weight.clone() if weight.data_ptr() % 16 else weight}  # fmt: skip
        for name, descriptor in prepared.descriptors.items():
            tensors[name] = descriptor(bases[name])
    else:
        tensors |= {"images": images, "weight": weight, "keep": None if keep is None else keep.contiguous()}
    with on_device_of(images):
        if prepared.descriptors:
            bind_context(p.device)  # Triton does so only after it has made the descriptors
        launch(prepared.kernel, **tensors)


@planned
def _prepared(p: PatchProblem, aligned: bool, tf32: bool, interpreted: bool, choice) -> Prepared:
    plan = make_plan(p, gpu_of(p.device), aligned, tf32, interpreted, choice)
    _, _, bias, *tables, _ = p.tensors
    kernel = bound(f"{plan.kernel}_kernel", plan.config, plan.grid, plan.scalars, plan.constants)
    in_order = plan.order.steps is None and plan.weight_columns == p.K and weight_in_order(p, plan.order.channels_last)
    return Prepared(
        plan,
        partial(kernel, **_steps(*(None if table is None else table.strides[:2] for table in tables))),
        {name: Descriptor(*sizes) for name, sizes in plan.descriptors.items()},
        normalised=bool(plan.constants["NORMALISED"]),
        packs=not in_order or (p.D > 1 and p.weight_strides[0] != p.K),
        gathers=any(t is not None and t.strides[-1] != 1 for t in (bias, *tables)),
    )


def _steps(pos: tuple[int, ...] | None, prefix: tuple[int, ...] | None) -> dict[str, int]:
    """The tables' strides between images (0 where all share one) and between rows."""
    (pos_b, pos_n), (prefix_b, prefix_t) = (table or (0, 0) for table in (pos, prefix))
    return {"pos_b": pos_b, "pos_n": pos_n, "prefix_b": prefix_b, "prefix_t": prefix_t}


def _side_by_side(p: PatchProblem, bias, pos_embed, prefix) -> dict[str, Any]:
    """Bias and tables in copies of which kernels can read a row, and their strides."""
    bias, *tables = (t if t is None else t.contiguous() for t in (bias, pos_embed, prefix))
    steps = (None if t is None else (t[0].numel() if t.ndim == 3 and len(t) > 1 else 0, p.D) for t in tables)
    return {"bias": bias, "pos": tables[0], "prefix": tables[1], **_steps(*steps)}
