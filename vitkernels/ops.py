"""The one place where PyTorch is told about the operation: schema, fake, FLOP count, derivatives, vmap.

`define` + `impl` inside an `autograd.Function` costs 7 µs a call with gradients, `register_autograd` 20 µs
(torch 2.15, 2 cores of an AMD EPYC; 9 and 26 µs in 2.11): hence the Function outside. And where PyTorch has nothing to
do in between (`calls.py`), a call does not go through its dispatcher at all, which on an H200's machine took 25 µs.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils.flop_counter import register_flop_formula

from . import dispatch
from .calls import Call, are_plain, in_forward_mode, known_call
from .eager import eager, is_traced
from .problem import Arguments, PatchProblem, check_keep, problem_of
from .sharded import are_dtensors, by_image

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


def _arguments(stride, padding, mean, std, *rest) -> Arguments:
    """Of what the dispatcher hands on, which are lists."""
    mean, std = (v if v is None else tuple(v) for v in (mean, std))
    return Arguments(tuple(stride), tuple(padding), mean, std, *rest)


def _forward(*args):
    tensors, (*arguments, backend) = args[:6], args[6:]
    return _direct(problem_of(*tensors, _arguments(*arguments)), tensors, backend)


def _forward_fake(*args):
    tensors, (*arguments, _) = args[:6], args[6:]
    p = problem_of(*tensors, _arguments(*arguments))
    return args[0].new_empty(p.out_shape, dtype=p.out_dtype)


def _backward(grad, *args):
    tensors, (*arguments, backend, needs) = args[:6], args[6:]
    return _direct_backward(problem_of(*tensors, _arguments(*arguments)), grad, tensors, backend, needs)


def _backward_fake(grad, *args):
    tensors, needs = args[:5], args[-1]
    return [torch.empty_like(t) for t, need in zip(tensors, needs, strict=True) if need]


library.impl("patch_embed", _forward, "CompositeExplicitAutograd")
library.impl("patch_embed_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("vitkernels::patch_embed", _forward_fake, lib=library)
torch.library.register_fake("vitkernels::patch_embed_backward", _backward_fake, lib=library)

_op = torch.ops.vitkernels.patch_embed.default
_op_backward = torch.ops.vitkernels.patch_embed_backward.default
_in_torch_func = torch._C._are_functorch_transforms_active


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


# Tokens are linear in the images, and in all that is learnt together: every derivative is one of the two calls again.
# Not `torch.autograd.Function`: for torch.func that wants a `setup_context`, which costs every call 16 µs. So the
# dispatcher comes to the Autograd kernels below once for each of torch.func's levels; eagerly it would be a detour.


class _PatchEmbed(_SingleLevelFunction):
    @staticmethod
    def forward(ctx, images, weight, bias, pos_embed, prefix, keep, call, backend):
        tensors = images, weight, bias, pos_embed, prefix, keep
        ctx.arguments = call.arguments, backend
        if call.plain and not call.inferred:
            ctx.save_for_backward(images, weight, bias, pos_embed, prefix, keep)
        else:
            of_images, of_weight, *_ = ctx.needs_input_grad
            _save(ctx, tensors, read=2 if of_images or of_weight else 0)
        if call.plain:
            return _direct(call.problem, tensors, backend)
        return _below_function(_op, (*tensors, *call.arguments, backend))

    @staticmethod
    def backward(ctx, grad):
        needs = list(ctx.needs_input_grad[:5])
        return *_spread(_call_backward(grad, _saved(ctx), *ctx.arguments, needs), needs), None, None, None

    @staticmethod
    def jvp(ctx, *d):
        return _change(_saved(ctx), *ctx.arguments, d[:5])


class _PatchEmbedBackward(_SingleLevelFunction):
    @staticmethod
    def forward(ctx, *args):
        _save(ctx, args[:7], read=3)
        ctx.set_materialize_grads(False)
        ctx.arguments, ctx.needs = (_arguments(*args[7:-2]), args[-2]), args[-1]
        return tuple(_below_function(_op_backward, args))

    @staticmethod
    def backward(ctx, *grads):
        grad, *tensors = _saved(ctx)
        d = _spread(grads, ctx.needs)
        d_grad = _change(tensors, *ctx.arguments, d) if ctx.needs_input_grad[0] else None
        return d_grad, *_change_of_grads(grad, tensors, *ctx.arguments, d, ctx.needs_input_grad[1:3]), *(None,) * 13

    @staticmethod
    def jvp(ctx, d_grad, *d):
        grad, *tensors = _saved(ctx)
        changes = [*_change_of_grads(grad, tensors, *ctx.arguments, d, ctx.needs), None, None, None]
        if d_grad is not None:
            more = _spread(_call_backward(d_grad, tensors, *ctx.arguments, ctx.needs), ctx.needs)
            changes = [_sum(a, b) for a, b in zip(changes, more, strict=True)]
        needed = ((c, t) for c, t, need in zip(changes, tensors[:5], ctx.needs, strict=True) if need)
        return tuple(torch.zeros_like(t) if c is None else c for c, t in needed)


def _save(ctx, tensors, read: int) -> None:
    """What a derivative needs. An inference tensor can't be saved, but may be held: where it has no gradient of its own
    (8-bit pixels, a keep list), and where it is past those `read` first whose values a derivative reads."""
    if any(t is not None and t.is_inference() for t in tensors):
        held = [
            t is not None and t.is_inference() and (i >= read or not t.is_floating_point())
            for i, t in enumerate(tensors)
        ]
        ctx.held = [t if hold else None for t, hold in zip(tensors, held, strict=True)]
        tensors = [None if hold else t for t, hold in zip(tensors, held, strict=True)]
    ctx.save_for_backward(*tensors)
    if in_forward_mode():
        ctx.set_materialize_grads(False)
        ctx.save_for_forward(*tensors)


def _saved(ctx):
    saved, held = ctx.saved_tensors, getattr(ctx, "held", None)
    return saved if held is None else [s if h is None else h for s, h in zip(saved, held, strict=True)]


def _change(tensors, arguments: Arguments, backend: str, d) -> torch.Tensor | None:
    """Of the tokens, where images, weight, bias, pos_embed and prefix change by d; None is no change."""
    images, *learnt, keep = tensors
    d_images, *d_learnt = d
    by_learnt = by_images = None
    autocast = nullcontext() if images.is_meta else torch.autocast(images.device.type, enabled=False)
    with autocast:  # off, as in the backward
        if any(change is not None for change in d_learnt):
            zeros = (t if t is None else torch.zeros_like(t) for t in learnt)
            d_learnt = [zero if change is None else change for change, zero in zip(d_learnt, zeros, strict=True)]
            by_learnt = _call((images, *d_learnt, keep), arguments, backend)
        if d_images is not None:
            prefix = None if learnt[3] is None else torch.zeros_like(learnt[3])
            alone = (d_images, learnt[0], None, None, prefix, keep)
            by_images = _call(alone, arguments._replace(mean=None), backend)
    return _sum(by_learnt, by_images)


def _change_of_grads(
    grad, tensors, arguments: Arguments, backend: str, d, needs
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Of the images' gradient where the weight changes by d, and of the weight's where the images do."""
    images, weight, *others = tensors
    of_images = of_weight = None
    if needs[0] and d[1] is not None:
        only = [True, False, False, False, False]
        (of_images,) = _call_backward(grad, (images, d[1], *others), arguments, backend, only)
    if needs[1] and d[0] is not None:
        arguments, only = arguments._replace(mean=None), [False, True, False, False, False]
        (of_weight,) = _call_backward(grad, (d[0], weight, *others), arguments, backend, only)
    return of_images, of_weight


def _spread(grads, needs) -> list[torch.Tensor | None]:
    """Gradients of those inputs that need one, at the places of all five."""
    grads = iter(grads)
    return [next(grads) if need else None for need in needs]


def _sum(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return b if a is None else a if b is None else a + b


def _below_autograd(op, args):
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _below_function(op, args):
    """In a Function's forward PyTorch records nothing; of torch.func's levels, that goes for the one that is here."""
    if not _in_torch_func():
        return _below_autograd(op, args)
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        return _below_autograd(op, args)


def _recorded(op, args, inputs, function, *of_function):
    if _in_torch_func():
        with enable_single_level_autograd_function():  # the dispatcher comes here for one level after the other
            return function.apply(*of_function)
    if _differentiable(inputs) or in_forward_mode():
        return function.apply(*of_function)
    return _below_autograd(op, args)


def _differentiable(inputs) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


def _autograd(*args) -> torch.Tensor:
    tensors, (*arguments, backend) = args[:6], args[6:]
    return _recorded(_op, args, tensors[:5], _PatchEmbed, *tensors, Call(_arguments(*arguments)), backend)


def _autograd_backward(*args) -> list[torch.Tensor]:
    return list(_recorded(_op_backward, args, args[:3], _PatchEmbedBackward, *args))


def _dispatched() -> bool:
    return _in_torch_func() or torch.compiler.is_compiling()


def _call(tensors, arguments: Arguments, backend: str) -> torch.Tensor:
    return (_op if _dispatched() else _autograd)(*tensors, *arguments, backend)


def _call_backward(grad, tensors, arguments: Arguments, backend: str, needs) -> list[torch.Tensor]:
    if not (_dispatched() or _differentiable((grad, *tensors[:2]))):
        call = known_call(tensors, arguments)
        if call.problem is not None and call.plain and are_plain((grad,)):
            return _direct_backward(call.problem, grad, tensors, backend, needs)
    function = _op_backward if _dispatched() else _autograd_backward
    return function(grad, *tensors, *arguments, backend, needs)


def _direct(p: PatchProblem, tensors, backend: str) -> torch.Tensor:
    if tensors[5] is not None:
        check_keep(p, tensors[5])
    if not torch._C._is_any_autocast_enabled():
        return dispatch.run(p, backend, tensors)
    with torch._C._DisableAutocast():  # the problem has the dtypes
        return dispatch.run(p, backend, tensors)


def _direct_backward(p: PatchProblem, grad, tensors, backend: str, needs) -> list[torch.Tensor]:
    grads = tuple([torch.empty_like(t) if need else None for t, need in zip(tensors, needs, strict=False)])
    if not torch._C._is_any_autocast_enabled():
        dispatch.run_backward(p, backend, grad, tensors, grads)
    else:
        with torch._C._DisableAutocast():  # the product's dtype was settled by the forward
            dispatch.run_backward(p, backend, grad, tensors, grads)
    return [g for g in grads if g is not None]


def _vmap(info, in_dims, *args):
    V = info.batch_size
    if in_dims[1] is in_dims[2] is None:
        B, tensors = _folded(V, in_dims, args[:6])
        return _op(*tensors, *args[6:]).unflatten(0, (V, B)), 0
    return torch.stack(_one_by_one(_op, V, in_dims, args, 6)), 0


def _vmap_backward(info, in_dims, *args):
    V, needs = info.batch_size, args[-1]
    if in_dims[2] is None and not any(needs[1:]):
        B, tensors = _folded(V, in_dims[1:], args[1:7])
        grad = _fold(args[0], in_dims[0], V, B)
        return [g.unflatten(0, (V, B)) for g in _op_backward(grad, *tensors, *args[7:])], 0
    grads = _one_by_one(_op_backward, V, in_dims, args, 7)
    return [torch.stack(g) for g in zip(*grads, strict=True)], 0


def _folded(V, in_dims, tensors) -> tuple[int, list[torch.Tensor | None]]:
    """B, and the tensors of V·B images: where weight and bias are not mapped over, what is mapped over are images."""
    images, dim = tensors[0], in_dims[0]
    B = images.shape[0] if dim is None else images.movedim(dim, 0).shape[1]
    return B, [
        t if t is None or i in (1, 2) else _fold(t, dim, V, B, is_table=i in (3, 4))
        for i, (t, dim) in enumerate(zip(tensors, in_dims, strict=False))
    ]


def _fold(t, dim, V, B, is_table=False) -> torch.Tensor:
    t = t.unsqueeze(0) if dim is None else t.movedim(dim, 0)
    if is_table:
        t = t.unsqueeze(1) if t.ndim == 3 else t
        if t.shape[:2] == (1, 1):  # all images share it
            return t[0]
    return t.expand(V, B, *t.shape[2:]).flatten(0, 1)


def _one_by_one(op, V, in_dims, args, tensors) -> list:
    columns = [[t] * V if dim is None else t.unbind(dim) for t, dim in zip(args[:tensors], in_dims, strict=False)]
    return [op(*row, *args[tensors:]) for row in zip(*columns, strict=True)]


library.impl("patch_embed", _autograd, "Autograd")
library.impl("patch_embed_backward", _autograd_backward, "Autograd")
torch.library.register_vmap("vitkernels::patch_embed", _vmap, lib=library)
torch.library.register_vmap("vitkernels::patch_embed_backward", _vmap_backward, lib=library)


def _spelled_out(tensors: tuple[torch.Tensor | None, ...], call: Call) -> torch.Tensor:
    images, weight, bias, pos_embed, prefix, keep = tensors
    if call.problem is None:
        problem_of(images, weight, bias, pos_embed, prefix, keep, call.arguments)
    stride, padding, mean, std, scale, _, out_dtype = call.arguments
    return eager(
        images, weight, bias, pos_embed=pos_embed, prefix=prefix, stride=stride, padding=padding, mean=mean, std=std,
        scale=scale, keep=keep, out_dtype=out_dtype,
    )  # fmt: skip


def patch_embed(tensors: tuple[torch.Tensor | None, ...], call: Call, backend: str) -> torch.Tensor:
    if not call.plain:
        if is_traced():
            return _spelled_out(tensors, call)
        if are_dtensors(*tensors):
            return by_image(tensors, lambda own: _call(own, call.arguments, backend))
        return _call(tensors, call.arguments, backend)
    if call.learns and torch.is_grad_enabled():
        return _PatchEmbed.apply(*tensors, call, backend)
    assert call.problem is not None
    return _direct(call.problem, tensors, backend)
