"""The Triton backward: launches what backward_plan.py planned; the kernels are in backward_kernels.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ...gpu import bind_context, gpu_of, on_device_of, tf32
from ...problem import PatchProblem
from .. import fallbacks, reference
from ..common import Grads, canonical, empty, masked, own_tables, scattered
from ..common import centred as channels_centred
from .backward_plan import Grad, Launch, Reduction, Wanted, image_launch, reduction
from .config_cache import planned
from .configs import Choice
from .forward_plan import Order
from .launch import BACKEND, Descriptor, bound, centred, interpreted, packed, refused

Strides = tuple[int, ...]


class Prepared(NamedTuple):
    """Launches but for their tensors."""

    plan: Reduction
    descriptors: list[Descriptor]  # of images and tokens' gradient, for `weight`
    weight: Callable[..., None] | None  # of their tensors, as the others
    reduce: Callable[..., None]
    kept: Callable[..., None]
    finish: Callable[..., None]


@planned
def _prepared_reduction(
    p,
    grad: Grad,
    learnt: tuple[Strides | None, ...],  # of the gradients of weight, bias, pos_embed and prefix; None: nobody asks
    tf32,
    interpreted,
    choice,
) -> Prepared:
    plan = reduction(p, gpu_of(p.device), grad, Wanted(*(s is not None for s in learnt)), tf32, interpreted, choice)
    of_grad = _named("grad", "bnd", grad.strides)
    names = ("weight", "dcthw"), ("bias", "d"), ("pos", "rd"), ("prefix", "rd")
    steps: dict[str, int] = {}
    for (name, axes), strides in zip(names, learnt, strict=True):
        steps |= _named(name, axes, strides)
    sizes = (plan.weight and plan.weight.descriptors) or {}
    return Prepared(
        plan,
        [Descriptor(*sizes[name]) for name in ("image_desc", "grad_desc") if sizes],
        plan.weight and _bound(plan.weight, {}),
        _bound(plan.reduce, of_grad),
        _bound(plan.kept, of_grad),
        _bound(plan.finish, steps),
    )


@planned
def _prepared_images(
    p, strides, grad_dtype, grad_strides, T, tf32, interpreted, tile
) -> tuple[Launch, Order, Callable]:
    plan, order = image_launch(p, strides, gpu_of(p.device), grad_dtype, tf32, interpreted, tile)
    return plan, order, _bound(plan, {"T": T, **_named("grad", "bnd", grad_strides)})


def _bound(plan: Launch, steps: dict[str, int]) -> Callable[..., None]:
    return bound(plan.kernel, plan.config, plan.grid, plan.scalars | steps, plan.constants)


def _named(name: str, axes: str, strides: Strides | None) -> dict[str, int]:
    steps = (0,) * len(axes) if strides is None else strides[-len(axes) :]
    return {f"{name}_{axis}": step for axis, step in zip(axes, steps, strict=True)}


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
    choice: Choice | None = None,  # weight, weight_descriptor or images and its tile, instead of the tables'
) -> None:
    images, weight, _, _, _, keep = canonical(images, weight, None, None, None, keep)
    d_images, d_weight, d_bias, d_pos, d_prefix, _ = canonical(*grads)
    if grad.numel() == 0 or p.rows == 0:
        return reference.backward(p, grad, images, weight, bias, pos_embed, prefix, keep, grads)
    keep = None if keep is None else keep.contiguous()
    of_images = choice is not None and choice[0] == "images"
    if d_images is not None:
        _images(p, grad, weight, keep, d_images, choice[1] if choice and of_images else None)
    d_pos, d_prefix = own_tables(p, grad, keep, d_pos, d_prefix)
    if any(g is not None for g in (d_weight, d_bias, d_pos, d_prefix)):
        _reduce(p, grad, images, keep, (d_weight, d_bias, d_pos, d_prefix), None if of_images else choice)
    return None


def _reduce(p, grad, images, keep, learnt, choice) -> None:
    aligned = (images.data_ptr() | grad.data_ptr()) % 16 == 0 and not fallbacks.happened(BACKEND, p)
    strides = tuple([None if g is None else g.stride() for g in learnt])
    prepared = _prepared_reduction(p, Grad(grad.dtype, grad.stride(), aligned), strides, tf32(), interpreted(), choice)
    try:
        _launch(p, prepared, grad, images, keep, *learnt)
    except RuntimeError as error:
        if prepared.weight is None or choice is not None or not refused(error):
            raise
        fallbacks.remember(BACKEND, p, f"{' '.join(str(error).split())}; pixels are gathered")
        _reduce(p, grad, images, keep, learnt, choice)


def _launch(p, prepared: Prepared, grad, images, keep, d_weight, d_bias, d_pos, d_prefix) -> None:
    plan, dtype = prepared.plan, p.sum_dtype
    weight_parts, table_parts, _ = parts = [
        empty(images, plan.parts[name], dtype) if all(plan.parts[name]) else None
        for name in ("weight_parts", "table_parts", "bias_parts")
    ]
    with on_device_of(images):
        if prepared.weight is not None and plan.weight is not None:
            of_images, of_grad = prepared.descriptors
            bind_context(p.device)  # Triton does so only after it has made the descriptors
            constants = centred(p, plan.order, p.K) if plan.weight.constants["NORMALISED"] else None
            prepared.weight(of_images(images), of_grad(grad.narrow(1, p.T, p.rows)), constants, weight_parts)
        if plan.reduce.grid:
            constants = centred(p, plan.order, plan.padded_K) if plan.reduce.constants["NORMALISED"] else None
            prepared.reduce(images, grad, constants, keep, *parts)
        if plan.kept.grid:
            prepared.kept(grad, keep, table_parts)
        prepared.finish(*parts, d_weight, d_bias, d_pos, d_prefix)


def _images(p, grad, weight, keep, d_images, tile) -> None:
    T = p.T
    if keep is not None:  # back at their places among all patches, first
        grad, keep = masked(p, grad, keep)
        grad, T = scattered(p, grad[:, T:], keep, per_image=True), 0
    plan, order, images_kernel = _prepared_images(
        p, d_images.stride(), grad.dtype, grad.stride(), T, tf32(), interpreted(), tile
    )
    factor = channels_centred(p, p.sum_dtype)[1] if plan.constants["NORMALISED"] else None
    with on_device_of(grad):
        images_kernel(grad, packed(p, order, p.K, weight), factor, d_images)
