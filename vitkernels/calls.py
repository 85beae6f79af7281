"""What a call is, found again at one look where it was made before: that costs the host 2 µs, and 20 the first time.

PyTorch's own guards, by which torch.compile recognises its inputs, say whether tensors have the sizes, strides, dtypes,
devices, types and dispatch keys of others; the keys tell of transforms, modes, negative views and autocast. Nothing
that is remembered depends on what a tensor holds or where it lies.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import _C
from torch.autograd import forward_ad

from .problem import Arguments, PatchProblem, arguments_of, problem_of

_Guards: Any
try:
    from torch._C._dynamo.guards import TensorGuards as _Guards
except ImportError:  # a PyTorch that keeps them elsewhere: every call is looked at anew
    _Guards = None

Tensors = tuple[Any, ...]  # images, weight, bias, pos_embed, prefix, keep
MOST_OF_A_WEIGHT = 8  # image sizes, layouts, with gradients and without
MOST_WEIGHTS = 1024
_PLAIN = {torch.Tensor, torch.nn.Parameter}
_CONSTANT = {type(None), int, float, str, tuple, torch.dtype, Arguments}


class Call(NamedTuple):
    arguments: Arguments
    problem: PatchProblem | None = None  # None: not asked for, as sizes may be symbols
    plain: bool = False  # PyTorch's dispatcher has nothing to do in it
    learns: bool = False  # a tensor requires a gradient
    inferred: bool = True  # a tensor may be of inference mode


class _Known(NamedTuple):
    call: Call
    given: Callable[[Tensors], tuple[torch.Tensor, ...]]  # those that are not None
    like: Callable[..., bool]  # whether these are tensors like those of the call
    options: tuple[Any, ...]
    autocast: torch.dtype | None


_known: dict[tuple[Any, ...], tuple[_Known, ...]] = {}


def call_of(tensors: Tensors, *options: Any) -> Call:
    """Check the inputs; options are stride, padding, mean, std, scale and out_dtype."""
    quiet = is_quiet()
    if quiet and (found := _found(tensors, options)) is not None:
        return found
    images, weight, *_ = tensors
    return _made(tensors, arguments_of(images, weight, *options), options, quiet)


def known_call(tensors: Tensors, arguments: Arguments) -> Call:
    """The same of arguments that a call had, as its derivatives have them. Other tensors they may have: what saved the
    call's may hand out others, and a parameter's `.data` may be exchanged."""
    quiet = is_quiet()
    if quiet and (found := _found(tensors, (arguments,))) is not None:
        return found
    return _made(tensors, arguments, (arguments,), quiet)


def _made(tensors: Tensors, arguments: Arguments, options: tuple[Any, ...], quiet: bool) -> Call:
    images, weight, bias, pos_embed, prefix, keep = tensors
    p = problem_of(images, weight, bias, pos_embed, prefix, keep, arguments)
    given = [t for t in tensors if t is not None]
    learns, inferred = any(t.requires_grad for t in given), any(t.is_inference() for t in given)
    call = Call(arguments, p, quiet and are_plain(tensors), learns, inferred)
    if call.plain and _Guards is not None and all(type(option) in _CONSTANT for option in options):
        _remember(tensors, options, call)
    return call


def _found(tensors: Tensors, options: tuple[Any, ...]) -> Call | None:
    autocast = _autocast(tensors) if _C._is_any_autocast_enabled() else None
    for known in _known.get(_key(tensors), ()):
        # The very same options: a scale of True equals one of 1, and is none.
        if known.like(*known.given(tensors)) and all(map(is_, known.options, options)) and known.autocast is autocast:
            return known.call
    return None


def _remember(tensors: Tensors, options: tuple[Any, ...], call: Call) -> None:
    places = itemgetter(*[i for i, t in enumerate(tensors) if t is not None])
    given = places(tensors)
    guards = _Guards(
        *given,
        dynamic_dims_sizes=[list(t.shape) for t in given],
        dynamic_dims_strides=[list(t.stride()) for t in given],
    )
    if len(_known) >= MOST_WEIGHTS:
        _known.clear()
    key, new = _key(tensors), _Known(call, places, guards.check, options, _autocast(tensors))
    _known[key] = (new, *_known.get(key, ())[: MOST_OF_A_WEIGHT - 1])


def _key(tensors: Tensors) -> tuple[Any, ...]:
    """The weight's address is but where to look first: what is found there is compared."""
    _, weight, bias, pos_embed, prefix, keep = tensors
    return id(weight), bias is None, pos_embed is None, prefix is None, keep is None


def _autocast(tensors: Tensors) -> torch.dtype | None:
    """The dtype that autocast would take, which is no dispatch key, as is whether it is on."""
    if not _C._is_any_autocast_enabled():
        return None
    return torch.get_autocast_dtype(tensors[0].device.type)


def is_quiet() -> bool:
    """Whether nobody watches or transforms what is called: no transform, mode, trace or profiler."""
    return not (
        in_forward_mode() or _C._len_torch_dispatch_stack() or _C._len_torch_function_stack() or _C._is_tracing()
        or torch._C._autograd._profiler_enabled()
    )  # fmt: skip


def in_forward_mode() -> bool:
    return forward_ad._current_level >= 0 or _C._are_functorch_transforms_active()


def are_plain(tensors: Tensors) -> bool:
    """Whether tensors are what they look like."""
    return not tensors[0].is_meta and all(
        t is None or (type(t) in _PLAIN and not t.is_neg() and not t._is_zerotensor()) for t in tensors
    )
