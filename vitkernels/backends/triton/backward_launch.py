"""The Triton backward: launches what backward_plan.py planned; the kernels are in backward_kernels.py."""

from __future__ import annotations

from functools import lru_cache, partial
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
from .toolchain import launch


class Prepared(NamedTuple):
    """Launches but for their tensors."""

    plan: Reduction
    weight: partial[None] | None
    descriptors: dict[str, Descriptor]
    reduce: partial[None]
    kept: partial[None]
    finish: partial[None]


@planned
def _prepared_reduction(p, grad: Grad, wanted, tf32, interpreted, choice) -> Prepared:
    plan = reduction(p, gpu_of(p.device), grad, wanted, tf32, interpreted, choice)
    weight = plan.weight
    return Prepared(
        plan,
        weight and bound(*weight[:5]),
        {name: Descriptor(*sizes) for name, sizes in ((weight and weight.descriptors) or {}).items()},
        *(bound(*one[:5]) for one in (plan.reduce, plan.kept, plan.finish)),
    )


@planned
def _prepared_images(p, strides, grad_dtype, tf32, interpreted, tile) -> tuple[Launch, Order, partial]:
    plan, order = image_launch(p, strides, gpu_of(p.device), grad_dtype, tf32, interpreted, tile)
    return plan, order, bound(*plan[:5])


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
    wanted = Wanted(*(g is not None for g in learnt))
    prepared = _prepared_reduction(p, Grad(grad.dtype, grad.stride(), aligned), wanted, tf32(), interpreted(), choice)
    try:
        _launch(p, prepared, grad, images, keep, *learnt)
    except RuntimeError as error:
        if prepared.weight is None or choice is not None or not refused(error):
            raise
        fallbacks.remember(BACKEND, p, f"{' '.join(str(error).split())}; pixels are gathered")
        _reduce(p, grad, images, keep, learnt, choice)


def _launch(p, prepared: Prepared, grad, images, keep, d_weight, d_bias, d_pos, d_prefix) -> None:
    plan, dtype = prepared.plan, p.sum_dtype
    parts = {name: empty(images, shape, dtype) if all(shape) else None for name, shape in plan.parts.items()}
    with on_device_of(images):
        steps = _strides("grad", "bnd", grad)
        if prepared.weight is not None and plan.weight is not None:
            bind_context(p.device)  # Triton does so only after it has made the descriptors
            bases = {"image_desc": images, "grad_desc": grad.narrow(1, p.T, p.rows)}
            launch(
                prepared.weight, weight_parts=parts["weight_parts"],
                centred=centred(p, plan.order, p.K) if plan.weight.constants["NORMALISED"] else None,
                **{name: descriptor(bases[name]) for name, descriptor in prepared.descriptors.items()},
            )  # fmt: skip
        if plan.reduce.grid:
            launch(
                prepared.reduce, images=images, grad=grad, keep=keep, **parts, **steps,
                centred=centred(p, plan.order, plan.padded_K) if plan.reduce.constants["NORMALISED"] else None,
            )  # fmt: skip
        if plan.kept.grid:
            launch(prepared.kept, grad=grad, keep=keep, table_parts=parts["table_parts"], **steps)
        launch(
            prepared.finish, **parts, d_weight=d_weight, d_bias=d_bias, d_pos=d_pos, d_prefix=d_prefix,
            **_strides("weight", "dcthw", d_weight), **_strides("pos", "rd", d_pos),
            **_strides("prefix", "rd", d_prefix), **_strides("bias", "d", d_bias),
        )  # fmt: skip


def _images(p, grad, weight, keep, d_images, tile) -> None:
    T = p.T
    if keep is not None:  # back at their places among all patches, first
        grad, keep = masked(p, grad, keep)
        grad, T = scattered(p, grad[:, T:], keep, per_image=True), 0
    plan, order, images_kernel = _prepared_images(p, d_images.stride(), grad.dtype, tf32(), interpreted(), tile)
    factor = channels_centred(p, p.sum_dtype)[1] if plan.constants["NORMALISED"] else None
    with on_device_of(grad):
        launch(
            images_kernel, grad=grad, weight=packed(p, order, p.K, weight), factor=factor, d_images=d_images, T=T,
            **_strides("grad", "bnd", grad),
        )  # fmt: skip


def _strides(name: str, axes: str, t: torch.Tensor | None) -> dict[str, int]:
    return _named(name, axes, None if t is None else t.stride())


@lru_cache(maxsize=1024)
def _named(name: str, axes: str, strides: tuple[int, ...] | None) -> dict[str, int]:
    steps = (0,) * len(axes) if strides is None else strides[-len(axes) :]
    return {f"{name}_{axis}": step for axis, step in zip(axes, steps, strict=True)}
