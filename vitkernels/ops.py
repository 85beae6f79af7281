"""The one place where PyTorch is told about the operation: schema, fake, autograd, FLOP count.

`define` + `impl` inside an `autograd.Function` costs 7 µs a call with gradients, `register_autograd` 20 µs
(torch 2.15, 2 cores of an AMD EPYC; 9 and 26 µs in 2.11): hence the Function outside.
"""

from __future__ import annotations

import math

import torch
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from . import dispatch
from .gradients import backward
from .problem import Arguments, PatchProblem, check_keep, problem_of

_TENSORS = "Tensor images, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? prefix, Tensor? keep"
_ARGUMENTS = (
    "SymInt[] stride, SymInt[] padding, float[]? mean, float[]? std, float scale, "
    "ScalarType compute_dtype, ScalarType out_dtype, str backend"
)

library = torch.library.Library("vitkernels", "DEF")
for schema in (
    f"patch_embed({_TENSORS}, {_ARGUMENTS}) -> Tensor",
    f"patch_embed_backward(Tensor grad, {_TENSORS}, {_ARGUMENTS}, bool[] needs) -> Tensor[]",
):
    library.define(schema, tags=torch.Tag.pt2_compliant_tag)


def _problem(images, weight, bias, pos_embed, prefix, keep, stride, padding, mean, std, *rest) -> PatchProblem:
    mean, std = (v if v is None else tuple(v) for v in (mean, std))
    arguments = Arguments(tuple(stride), tuple(padding), mean, std, *rest)
    return problem_of(images, weight, bias, pos_embed, prefix, keep, arguments)


def _forward(*args):
    tensors, (*arguments, backend) = args[:6], args[6:]
    p = _problem(*tensors, *arguments)
    check_keep(p, tensors[5])
    return dispatch.choose(p, backend).forward(p, *dispatch.canonical(*tensors))


def _forward_fake(*args):
    p = _problem(*args[:-1])
    return args[0].new_empty(p.out_shape, dtype=p.out_dtype)


def _backward(grad, *args):
    tensors, (*arguments, _backend, needs) = args[:6], args[6:]
    p = _problem(*tensors, *arguments)
    with torch.autocast(grad.device.type, enabled=False):  # the product's dtype was settled by the forward
        grads = backward(p, grad, *dispatch.canonical(*tensors), needs=tuple(needs))
    return [g.reshape(t.shape) for g, t in zip(grads, tensors, strict=False) if g is not None]


def _backward_fake(grad, *args):
    tensors, needs = args[:5], args[-1]
    return [t.new_empty(t.shape) for t, need in zip(tensors, needs, strict=True) if need]


library.impl("patch_embed", _forward, "CompositeExplicitAutograd")
library.impl("patch_embed_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("vitkernels::patch_embed", _forward_fake, lib=library)
torch.library.register_fake("vitkernels::patch_embed_backward", _backward_fake, lib=library)

_op = torch.ops.vitkernels.patch_embed.default
_op_backward = torch.ops.vitkernels.patch_embed_backward.default


def _product_flops(out_shape, weight_shape, prefix_shape) -> int:
    T = 0 if prefix_shape is None else prefix_shape[-2]
    return 2 * out_shape[0] * (out_shape[1] - T) * math.prod(weight_shape)


@register_flop_formula(torch.ops.vitkernels.patch_embed)
def _flops(images, weight, bias, pos_embed, prefix, *_, out_shape, **__) -> int:
    return _product_flops(out_shape, weight, prefix)


@register_flop_formula(torch.ops.vitkernels.patch_embed_backward)
def _flops_backward(grad, images, weight, bias, pos_embed, prefix, *rest, **_) -> int:
    needs = rest[-1]
    return _product_flops(grad, weight, prefix) * (needs[0] + needs[1])


class _PatchEmbed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        ctx.save_for_backward(*args[:6])
        ctx.arguments = args[6:]
        return _below_autograd(*args)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        needs = list(ctx.needs_input_grad[:5])
        grads = iter(_op_backward(grad, *ctx.saved_tensors, *ctx.arguments, needs))
        return (*(next(grads) if need else None for need in needs), *(None,) * 9)


def _below_autograd(*args) -> torch.Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        return _op(*args)


def _autograd(*args) -> torch.Tensor:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:5]):
        return _PatchEmbed.apply(*args)
    return _below_autograd(*args)


library.impl("patch_embed", _autograd, "Autograd")  # for graphs that call the operation: torch.compile, torch.export


def patch_embed(tensors: tuple[torch.Tensor | None, ...], arguments: Arguments, backend: str) -> torch.Tensor:
    """Call the registered operation; eagerly without the detour through its Autograd kernel."""
    call = _op if torch.compiler.is_compiling() else _autograd
    return call(*tensors, *arguments, backend)
