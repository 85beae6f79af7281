"""Tokens that are not computed yet: what a model's own code does with a projection's result, until it needs numbers.

A front end's own code flattens the map that a convolution gave, puts tokens in front and adds a table. Here it does so
to `Pending`, which notes it; then one `patch_embed` computes it all. No class needs to be known for that, and code that
does something else gets the tokens as they were by then.

`Pending` is no tensor, and does not leave the calls in which it was made: what keeps tensors for itself (a checkpoint,
an autograd.Function, a hook) doesn't meet it. The methods of `Pending` follow PyTorch's aliasing: views share a source,
what is written in place is written to the source.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._pytree import tree_map

from ..functional import patch_embed
from ..layers import eager_dtype, touched
from . import swapping
from .swapping import ONE_CALL, Fused, count

SIZES = ("shape", "ndim", "dim", "ndimension", "size", "numel", "nelement")
VIEWS = ("transpose", "swapaxes", "swapdims", "permute", "movedim", "view", "unflatten", "squeeze", "unsqueeze")
MAYBE_VIEWS = ("flatten", "reshape")
CAT = ("cat", "concat", "concatenate")
ADD = ("add", "__add__", "__radd__")
_LEAVES = (torch.Tensor, int, float, str, type(None))


class Elsewhere(Exception):
    """The plain call is right, and this one given up. So where pending tokens are needed and the projection was not
    called: without gradients, as inside an autograd.Function, or in a checkpoint."""


def _modes() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._autograd._top_saved_tensors_default_hooks(True),  # a checkpoint's
    )


class Source:
    """Tokens [B,T+N,D]: a convolution's, with what was added to them and put in front."""

    def __init__(
        self,
        images: torch.Tensor,  # [B,C,(T,)H,W]
        weight: torch.Tensor,  # [D,C,(P_t,)P_h,P_w]
        bias: torch.Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        grid: Sequence[int],
        backend: str,
    ):
        self.images, self.weight, self.bias, self.stride, self.padding = images, weight, bias, stride, padding
        self.grid, self.backend = grid, backend
        self.dtype = eager_dtype(weight)
        self.modes = _modes()
        self.pos: torch.Tensor | None = None
        self.prefix: torch.Tensor | None = None
        self.value: torch.Tensor | None = None

    def sizes(self) -> tuple[int, int, int]:
        T = 0 if self.prefix is None else self.prefix.shape[-2]
        return self.images.shape[0], T + math.prod(self.grid), self.weight.shape[0]

    def plus(self, *, pos: torch.Tensor | None = None, prefix: torch.Tensor | None = None) -> Source:
        new = Source.__new__(Source)
        vars(new).update(vars(self))
        for name, added in (("pos", pos), ("prefix", prefix)):
            if added is not None:
                setattr(new, name, added)
                new.dtype = torch.promote_types(new.dtype, added.dtype)
        return new

    def tokens(self) -> torch.Tensor:
        if self.value is None:
            if _modes() != self.modes:
                raise Elsewhere("needed without gradients, or in a checkpoint")
            self.value = patch_embed(
                self.images, self.weight, self.bias, pos_embed=self.pos, prefix=self.prefix,
                stride=self.stride, padding=self.padding, out_dtype=self.dtype, backend=self.backend,
            )  # fmt: skip
        return self.value


class Pending:
    """A view of a source's tokens. Its methods are a tensor's; what is none of these here is the computed tensor's."""

    def __init__(self, source: Source, like: torch.Tensor, views: tuple[tuple[str, tuple, dict], ...] = ()):
        self.source = source
        self.like = like  # of the same sizes and order, on the meta device
        self.views = views  # of the tokens, one after the other

    @classmethod
    def tokens(cls, source: Source) -> Pending:
        return cls(source, torch.empty(source.sizes(), device="meta"))

    @classmethod
    def map(cls, conv: Any, images: torch.Tensor, padding: Sequence[int], grid: Sequence[int], backend: str) -> Pending:
        """What a convolution gives, [B,D,(G_t,)G_h,G_w]."""
        source = Source(images, conv.weight, conv.bias, conv.stride, padding, grid, backend)
        return cls.tokens(source).transpose(1, 2).unflatten(2, grid)

    def computed(self) -> torch.Tensor:
        tokens = self.source.tokens()
        for name, args, kwargs in self.views:
            tokens = getattr(tokens, name)(*args, **kwargs)
        return tokens

    def __getattr__(self, name: str) -> Any:
        if name in SIZES:
            return getattr(self.like, name)
        if name in VIEWS or name in MAYBE_VIEWS:
            return lambda *args, **kwargs: self._view(name, args, kwargs)
        return getattr(self.computed(), name)

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def device(self) -> torch.device:
        return self.source.images.device

    def to(self, *args: Any, **kwargs: Any) -> Any:
        here = all(arg in (self.dtype, self.device) for arg in (*args, *kwargs.values()))
        return self if here else self.computed().to(*args, **kwargs)

    def contiguous(self) -> Any:
        return self if self.like.is_contiguous() else self.computed().contiguous()

    def add(self, other: Any, **kwargs: Any) -> Any:
        return self._plus(other) if not kwargs else self.computed().add(other, **kwargs)

    def __add__(self, other: Any) -> Any:
        return self._plus(other)

    __radd__ = __add__

    def __iadd__(self, other: Any) -> Any:
        pos = self._as_positions(other)
        if pos is None or torch.promote_types(self.dtype, pos.dtype) != self.dtype:
            self.computed().add_(other)
        else:
            self.source.pos = pos
        return self

    def add_(self, other: Any, **kwargs: Any) -> Any:
        return self.__iadd__(other) if not kwargs else self.computed().add_(other, **kwargs)

    def _view(self, name: str, args: tuple, kwargs: dict) -> Any:
        like = getattr(self.like, name)(*args, **kwargs)
        if like.dtype != self.like.dtype:  # a view of the bits
            return getattr(self.computed(), name)(*args, **kwargs)
        if name in MAYBE_VIEWS:
            try:
                name, args, kwargs = "view", (like.shape,), {}
                like = self.like.view(*args)
            except RuntimeError:  # a copy
                return self.computed().reshape(*args)
        return Pending(self.source, like, (*self.views, (name, args, kwargs)))

    def _is_tokens(self) -> bool:
        return self.like.shape == self.source.sizes() and self.like.is_contiguous()

    def _plus(self, table: Any) -> Any:
        """The sum with a table of positions, of all images or of each."""
        if (pos := self._as_positions(table)) is None:
            return self.computed() + table
        return Pending(self.source.plus(pos=pos), self.like, self.views)

    def _as_positions(self, table: Any) -> torch.Tensor | None:
        """[1,T+N,D] or [B,T+N,D], if it is one."""
        source, like = self.source, self.like
        if not _is_floats(table, source) or source.value is not None or source.pos is not None:
            return None
        shape = (1,) * (like.ndim - table.ndim) + tuple(table.shape)
        if len(shape) != like.ndim or any(size not in (1, of) for size, of in zip(shape, like.shape, strict=True)):
            return None
        B, rows, D = source.sizes()
        if self._is_tokens() and shape[1:] == (rows, D):  # as below, by one view of four
            return table.view(shape)
        order = sorted(range(like.ndim), key=like.stride, reverse=True)  # of the tokens in memory
        table = table.reshape(shape).permute(order)
        sizes = [like.shape[axis] for axis in order]
        if sizes[0] == B and table.shape[0] == 1:
            return table.expand(1, *sizes[1:]).reshape(1, rows, D)
        return table.expand(sizes).reshape(B, rows, D)

    def _behind(self, head: Sequence[Any]) -> Pending | None:
        """With tokens in front."""
        source = self.source
        B, rows, D = source.sizes()
        if not self._is_tokens() or source.value is not None or not all(_is_floats(t, source) for t in head):
            return None
        if any(t.ndim != 3 or t.shape[0] != B or t.shape[2] != D for t in head):
            return None
        T = 0 if source.prefix is None else source.prefix.shape[1]
        if source.pos is not None and source.pos.shape[1] != rows - T:  # it has rows for a prefix
            return None
        parts = [*head, *([] if source.prefix is None else [source.prefix])]
        one = [t[:1] for t in parts if t.stride(0) == 0 or t.shape[0] == 1]  # the same for all images
        parts = one if len(one) == len(parts) else [t.expand(B, -1, -1) for t in parts]
        return Pending.tokens(source.plus(prefix=parts[0] if len(parts) == 1 else torch.cat(parts, 1)))

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in CAT and not kwargs.keys() - {"dim", "axis"}:
            tensors, dim = args[0], (*args[1:], *kwargs.values(), 0)[0]
            *head, last = tensors
            if head and isinstance(last, Pending) and dim in (1, -2) and (pending := last._behind(head)) is not None:
                return pending
        elif name in ADD and len(args) == 2 and not kwargs:
            one, other = args if isinstance(args[0], Pending) else args[::-1]
            return one._plus(other)
        elif name in (*VIEWS, *MAYBE_VIEWS) and isinstance(args[0], Pending):
            return args[0]._view(name, args[1:], kwargs)
        return func(*computed(args), **computed(kwargs))


def _by_numbers(name: str) -> Callable[..., Any]:
    function = getattr(torch.Tensor, name)

    def method(self: Pending, *args: Any) -> Any:
        return function(self.computed(), *computed(args))

    return method


_BY_NUMBERS = (
    "__sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __floordiv__ __mod__ __pow__ __rpow__ __matmul__ "
    "__rmatmul__ __neg__ __abs__ __invert__ __getitem__ __setitem__ __iter__ __len__ __bool__ __float__ __int__ "
    "__eq__ __ne__ __lt__ __le__ __gt__ __ge__ __and__ __or__ __contains__ __array__"
)
for _name in _BY_NUMBERS.split():
    setattr(Pending, _name, _by_numbers(_name))


def _is_floats(tensor: Any, source: Source) -> bool:
    if not isinstance(tensor, torch.Tensor) or tensor.ndim == 0 or not tensor.is_floating_point():
        return False
    return source.modes == _modes() and tensor.device == source.images.device


def computed(tree: Any) -> Any:
    """With tensors in place of what is pending."""
    kind = type(tree)
    if kind is Pending:
        return tree.computed()
    if isinstance(tree, _LEAVES):
        return tree
    if kind in (tuple, list):  # as most are; tree_map takes 10 µs, and more where its code has left the cache
        return kind(map(computed, tree))
    if kind is dict:
        return {name: computed(leaf) for name, leaf in tree.items()}
    return tree_map(lambda leaf: leaf.computed() if isinstance(leaf, Pending) else leaf, tree)


class _Noting(threading.local):
    on = False


_NOTING = _Noting()


def noting() -> bool:
    """Whether a fused convolution is to give `Pending` tokens."""
    return _NOTING.on


def noted(
    module: nn.Module, inside: Iterable[nn.Module], forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """A module's forward in which fused projections give `Pending` tokens, and what it returns, computed.

    The plain forward, where a hook on a module inside, a compiler or a tracer would see what is pending, or something
    takes no such thing.
    """
    if torch.compiler.is_compiling():
        return forward(*args, **kwargs)
    reason = "hooks on all modules" if _has_any_global_hook() else "tracing" if torch.jit.is_tracing() else None
    if reason := reason or next((reason for part in inside if (reason := touched("a module inside", part))), None):
        count(module, reason)
        return forward(*args, **kwargs)
    mistake = None
    before, _NOTING.on = _NOTING.on, True
    try:
        out = computed(forward(*args, **kwargs))
    except Elsewhere as elsewhere:
        reason = str(elsewhere)
    except Exception as error:  # the library's, which is raised below again; or of what takes nothing but tensors
        reason = f"{type(error).__name__}: {error}"
        mistake = error if swapping.STRICT else None
    else:
        count(module, ONE_CALL)
        return out
    finally:
        _NOTING.on = before
    # Not before the exception is gone, and with it what it keeps open: a checkpoint, in torch 2.11.
    count(module, reason)
    out = forward(*args, **kwargs)
    if mistake is not None:
        raise mistake
    return out


def why_not(embedding: nn.Module) -> str | None:
    """Whose hook would see what is pending."""
    _, *inside = embedding.named_modules()
    return next((reason for name, module in inside if (reason := touched(name, module))), None)


class Embedding(Fused):
    """A module around a projection that adds positions to it and puts tokens in front, or does whatever it does."""

    def forward(self, *args, **kwargs):
        _, *inside = self.modules()
        return noted(self, inside, super().forward, *args, **kwargs)
