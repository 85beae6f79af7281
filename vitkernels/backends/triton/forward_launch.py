"""The Triton forward: launches what forward_plan.py planned; the kernels are in forward_kernels.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ...gpu import bind_context, gpu_of, on_device_of, rounds
from ...problem import Layout, PatchProblem
from .. import fallbacks
from ..common import empty
from ..patch_layout import weight_in_order
from .config_cache import planned
from .configs import Config
from .forward_plan import Plan, make_plan
from .launch import BACKEND, Descriptor, bound, centred, interpreted, packed, refused


class Prepared(NamedTuple):
    """A launch but for its tensors."""

    plan: Plan
    kernel: Callable[..., None]  # of its tensors
    descriptors: list[Descriptor]  # of images, weight and tokens; none: pixels are gathered
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
    if prepared.gathers:
        bias, pos_embed, prefix = (t if t is None else t.contiguous() for t in (bias, pos_embed, prefix))
    if prepared.packs:
        weight = packed(p, plan.order, plan.weight_columns, weight)
    constants = centred(p, plan.order, plan.padded_K) if prepared.normalised else None
    with on_device_of(images):
        if prepared.descriptors:
            of_image, of_weight, of_out = prepared.descriptors
            bind_context(p.device)  # Triton does so only after it has made the descriptors
            prepared.kernel(
                of_image(images), of_weight(weight.clone() if weight.data_ptr() % 16 else weight),
                of_out(out.narrow(1, p.T, p.rows)), constants, bias, pos_embed, prefix, out,
            )  # fmt: skip
        else:
            keep = None if keep is None else keep.contiguous()
            prepared.kernel(images, weight, constants, bias, pos_embed, prefix, keep, out)


@planned
def _prepared(p: PatchProblem, aligned: bool, tf32: bool, interpreted: bool, choice) -> Prepared:
    plan = make_plan(p, gpu_of(p.device), aligned, tf32, interpreted, choice)
    _, _, bias, *tables, _ = p.tensors
    gathers = any(t is not None and t.strides[-1] != 1 for t in (bias, *tables))
    scalars = plan.scalars | _steps(p, tables, gathers)
    in_order = plan.order.steps is None and plan.weight_columns == p.K and weight_in_order(p, plan.order.channels_last)
    return Prepared(
        plan,
        bound(f"{plan.kernel}_kernel", plan.config, plan.grid, scalars, plan.constants),
        [Descriptor(*plan.descriptors[name]) for name in ("image_desc", "weight_desc", "out_desc") if plan.descriptors],
        normalised=bool(plan.constants["NORMALISED"]),
        packs=not in_order or (p.D > 1 and p.weight_strides[0] != p.K),
        gathers=gathers,
    )


def _steps(p: PatchProblem, tables: list[Layout | None], copied: bool) -> dict[str, int]:
    """The tables' strides between images (0 where all share one) and between rows; of copies, where they are made."""
    steps = [(0, 0) if table is None else table.strides[:2] for table in tables]
    if copied:
        steps = [(rows * p.D if image else 0, p.D) for rows, (image, _) in zip((p.pos_rows, p.T), steps, strict=True)]
    (pos_b, pos_n), (prefix_b, prefix_t) = steps
    return {"pos_b": pos_b, "pos_n": pos_n, "prefix_b": prefix_b, "prefix_t": prefix_t}
