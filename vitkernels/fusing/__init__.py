"""`fuse` and `unfuse`: front ends of other libraries' models, sent through `patch_embed` and back."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from importlib import import_module

from torch import nn

from ..dispatch import check_name
from . import swapping
from .report import FrontEnd, Report
from .swapping import Row, full_name, fused_class, overridden, restore

# Each has an adapter here of its own name, imported when a class of that library was found and not before.
ADAPTERS = ("timm", "torchvision", "transformers", "vit_pytorch")

__all__ = ["FrontEnd", "Report", "fuse", "unfuse"]


def fuse(model: nn.Module, backend: str = "auto") -> Report:
    """Send every known front end in `model` through `patch_embed`, in place.

    Parameters stay where they are: state_dict, optimiser, training mode and hooks see no difference, and copies and
    pickles of the model are fused too. A second call sees what changed since, and sets another backend.

    A fused model takes what the model took, and floats of any dtype. Integer pixels meet the library's own code, which
    refuses them or not: only the model knows how it wants them normalised. It runs the library's code too where a part
    has hooks or was replaced since, where all modules have hooks, and under torch.jit and torch.fx.

    Returns:
        A list of `FrontEnd`, one for each that was found, fused or not; it prints as a table. What can't be read (a
        model that an older release of its library pickled) is left alone, with the reason.

    Raises:
        ValueError: no such backend. A backend that can't take a problem raises NotImplementedError when it meets it.
        RuntimeError: something else swapped the class of a fused module meanwhile (FSDP, for one).
    """
    check_name(backend)
    unfuse(model)
    report, seen = Report(), set()
    for name, module in model.named_modules():
        row = _row_of(module)
        if row is None:
            continue
        seen.update(module.modules())
        cls, reason = full_name(type(module)), _swap(module, row, backend)
        report.append(FrontEnd(name, cls, reason is None, reason or row.what))
    report += _without_adapter(model, seen)
    return report


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`, in place."""
    for name, module in model.named_modules():
        restore(name, module)


def _row_of(module: nn.Module) -> Row | None:
    for cls in type(module).__mro__:
        library = cls.__module__.partition(".")[0]
        if library in ADAPTERS and (row := _adapter(library)[0].get(full_name(cls))):
            return row
    return None


@lru_cache(maxsize=len(ADAPTERS))
def _adapter(library: str) -> tuple[dict[str, Row], str]:
    """Its table; an empty one, and why, where this release of the library lacks what the adapter imports."""
    try:
        return import_module(f".{library}", __name__).TABLE, ""
    except Exception as error:
        return {}, _tolerated(error)


def _swap(module: nn.Module, row: Row, backend: str) -> str | None:
    """Fuse one front end, or say why it is left alone: no module's fault keeps the others from being fused."""
    try:
        if (reason := _why_not(module, row)) is not None:
            return reason
        parts = [(module.get_submodule(path), mixin) for path, (mixin, _) in row.parts.items()]
        classes = [fused_class(mixin, type(part), backend) for part, mixin in parts]
        for (part, _), cls in zip(parts, classes, strict=True):
            part.__class__ = cls
    except Exception as error:
        unfuse(module)
        return _tolerated(error)
    return None


def _tolerated(error: Exception) -> str:
    """An error's class and first line; raised in our own tests, where it is a mistake of ours."""
    if swapping.STRICT:
        raise error
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _why_not(module: nn.Module, row: Row) -> str | None:
    for path, (mixin, of) in row.parts.items():
        try:
            part = module.get_submodule(path)
        except AttributeError:
            return f"has no {path}"
        if reason := overridden(part, mixin, of):
            return f"{path} {reason}" if path else reason
    return row.why_not(module)


def _without_adapter(model: nn.Module, seen: set[nn.Module]) -> Iterator[FrontEnd]:
    """Owners of what looks like the patch projection of a front end, but for modules already seen."""
    listed = set()
    for path, module in model.named_modules():
        if module in seen or not _patchifies(module):
            continue
        owner_path, owner = path, module
        while owner_path and (owner is module or isinstance(owner, nn.Sequential | nn.ModuleList)):
            owner_path = owner_path.rpartition(".")[0]
            owner = model.get_submodule(owner_path)
        if owner in listed or full_name(type(owner)).startswith("vitkernels."):
            continue
        listed.add(owner)
        where = type(owner).__name__
        if owner_path:
            where += f" in {type(model.get_submodule(owner_path.rpartition('.')[0])).__name__}"
        library = type(owner).__module__.partition(".")[0]
        broken = _adapter(library)[1] if library in ADAPTERS else ""
        note = f"the adapter for {library} can't be used: {broken}" if broken else f"no adapter for {where} yet"
        yield FrontEnd(owner_path, full_name(type(owner)), False, note)


def _patchifies(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        if not all(hasattr(module, name) for name in ("kernel_size", "stride", "in_channels")):  # an older release's
            return False
        return module.kernel_size == module.stride and max(module.stride) > 1 and module.in_channels <= 4
    return type(module).__name__ == "Rearrange" and "(h p1)" in str(getattr(module, "pattern", ""))
