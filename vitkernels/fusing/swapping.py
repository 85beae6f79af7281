"""How a module is fused: its class is swapped for a subclass that sends the front end through `patch_embed`.

Nothing is stored on the instance and no parameter moves, so state_dict, optimiser and hooks see no difference.
Pickles of fused models name this file's `_rebuilt` and the adapters' classes: those keep their places.
"""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from .. import problem
from ..eager import is_traced
from ..functional import patch_embed
from ..layers import eager_dtype, padding_of

STRICT = False  # whether what goes wrong in reading a module is raised: for our own tests
Read = TypeVar("Read")
Reader: TypeAlias = Callable[..., Read | None]


class Fused:
    """Put in front of a library's class; a subclass overrides what has to run otherwise.

    Where anything is out of the ordinary (a hook, a wrapped projection, integer pixels, a wrong size), the override
    calls super(): then the library's own code gives the library's own result, or error.
    """

    _vk_base: type[nn.Module]
    _vk_mixin: type[Fused]
    _vk_backend: str

    def __reduce_ex__(self, protocol):
        # The subclass goes by its base's name, so pickle and deepcopy can't look it up.
        _, _, *state = super().__reduce_ex__(protocol)
        return _rebuilt, (self._vk_mixin, self._vk_base, self._vk_backend), *state

    def __prepare_scriptable__(self):
        """What torch.jit.script compiles in place of this module: the library's own code on the same parameters."""
        plain = self._vk_base.__new__(self._vk_base)
        vars(plain).update(vars(self), _modules=self._modules.copy())  # whose items are replaced next
        return plain


class Tokens(NamedTuple):
    """Finished tokens on their way through the calls that would have made them. No tensor, so that nobody's map, of
    whatever shape, is taken for them."""

    tokens: torch.Tensor  # [B, T+N, D]


def at_each_call(why_not: Callable[[Any], str | None]) -> Callable[[Reader[Read]], Reader[Read]]:
    """Decorates what reads a fused module and its input before a front end is run as one operation.

    None, and then the library's own code runs, where that or `why_not` says so; where torch.jit, torch.fx or torch.onnx
    trace, whose graphs are to run without this package; where a hook on all modules (profilers, FLOP counters) wants to
    see every call; and where something can't be read, as of an older release's model or a part that was replaced: an
    error, if it is one, is the library's.
    """

    def decorated(read: Reader[Read]) -> Reader[Read]:
        @wraps(read)
        def guarded(module: Any, images: Any, *others: Any) -> Read | None:
            if (reason := unreadable(images)) is None:
                try:
                    if (reason := why_not(module)) is None and (front := read(module, images, *others)) is not None:
                        count(module, ONE_CALL)
                        return front
                except Exception as error:
                    if STRICT:
                        raise
                    reason = f"{type(error).__name__}: {error}"
            count(module, reason or f"{list(images.shape)} {images.dtype}")
            return None

        return guarded

    return decorated


def unreadable(images: Any) -> str | None:
    if _has_any_global_hook():
        return "hooks on all modules"
    return None if isinstance(images, torch.Tensor) and not is_traced() else "tracing"


ONE_CALL = "one call"
CALLS: WeakKeyDictionary[nn.Module, Counter[str]] = WeakKeyDictionary()  # of fused modules: one call, or why it was not
MOST_REASONS = 20


def count(module: nn.Module, how: str) -> None:
    if torch.compiler.is_compiling():
        return
    if (calls := CALLS.get(module)) is None:
        calls = CALLS[module] = Counter()
    calls[how if how in calls or len(calls) < MOST_REASONS else "and others"] += 1


class Row(NamedTuple):
    """A front end that can be fused; adapters keep them in a table by the full name of the library's class."""

    parts: dict[str, tuple[type[Fused], str]]  # path ("" is the module itself) -> what goes in front of which class
    why_not: Callable[[nn.Module], str | None]  # what stands in the way in this instance; asked at every call as well
    what: str
    projects: bool = True  # whether the projection is among the parts; otherwise it is fused by its structure


def fused_class(mixin: type[Fused], base: type[nn.Module], backend: str) -> type[nn.Module]:
    key = mixin, base, backend
    if key not in _CLASSES:
        _CLASSES[key] = _made(*key)
    return _CLASSES[key]


_CLASSES: dict[tuple[type, type, str], type[nn.Module]] = {}


def _made(mixin: type[Fused], base: type[nn.Module], backend: str) -> type[nn.Module]:
    names = {
        "_vk_mixin": mixin,
        "_vk_base": base,
        "_vk_backend": backend,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return types.new_class(base.__name__, (mixin, base), exec_body=lambda namespace: namespace.update(names))


def _rebuilt(mixin: type[Fused], base: type[nn.Module], backend: str) -> nn.Module:
    cls = fused_class(mixin, base, backend)
    return cls.__new__(cls)  # type: ignore[call-overload]


def restore(name: str, module: nn.Module) -> None:
    """Give a fused module its own class back."""
    cls = type(module)
    if not issubclass(cls, Fused):
        return
    if "_vk_base" not in vars(cls):
        raise RuntimeError(f"{name or 'the model'} got the class {cls.__name__} after it was fused: undo that first")
    module.__class__ = cls._vk_base
    CALLS.pop(module, None)


def full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def overridden(part: nn.Module, mixin: type[Fused], of: str) -> str | None:
    """Why the mixin can't go in front of this module: it does not run the library's own methods, as `of` has them."""
    library = next((c for c in type(part).__mro__ if full_name(c) == of), None)
    if library is None:
        return f"is a {type(part).__name__}, not a {of.rpartition('.')[2]}"
    for name in vars(mixin):
        if name.startswith("__"):
            continue
        if name in vars(part):
            return f"has its {name} replaced on the instance"
        if getattr(type(part), name) is not getattr(library, name):
            return f"overrides {name}"
    return None


def replaced(module: nn.Module, name: str) -> str | None:
    return f"{name} was replaced on the instance" if name in vars(module) else None


def takes(conv: Any, images: torch.Tensor) -> bool:
    """Whether these are images that a plain `conv` takes, but for the dtype of their floats."""
    dims = len(conv.kernel_size) + 2
    return images.ndim == dims and images.shape[1] == conv.in_channels and images.is_floating_point()


def grid_of(conv: Any, images: torch.Tensor) -> tuple[int, ...]:
    return problem.grid_of(images.shape[2:], padding_of(conv), conv.kernel_size, conv.stride)


def embed(
    conv: Any,
    images: torch.Tensor,
    backend: str,
    *,
    pos_embed: torch.Tensor | None = None,
    prefix: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """`patch_embed` with the parameters of a convolution, in the dtype that eager PyTorch would give: [B,T+N,D]."""
    return patch_embed(
        images, conv.weight, conv.bias, pos_embed=pos_embed, prefix=prefix, keep=keep, stride=conv.stride,
        padding=padding_of(conv), out_dtype=eager_dtype(conv.weight, pos_embed, prefix), backend=backend,
    )  # fmt: skip
