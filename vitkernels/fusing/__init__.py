"""`fuse` and `unfuse`: front ends of other libraries' models, sent through `patch_embed` and back."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

from torch import nn

from ..dispatch import check_name
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
    refuses them or not: only the model knows how it wants them normalised. `torch.fx.symbolic_trace` needs
    the model unfused.

    Returns:
        A list of `FrontEnd`, one for each that was found, fused or not; it prints as a table.

    Raises:
        ValueError: no such backend. A backend that can't take a problem raises NotImplementedError when it meets it.
        RuntimeError: something else swapped the class of a fused module meanwhile (FSDP, for one).
    """
    check_name(backend)
    unfuse(model)
    report, seen = Report(), set()
    for name, module in model.named_modules():
        row = next(_rows(module), None)
        if row is None:
            continue
        seen.update(module.modules())
        reason = _why_not(module, row)
        report.append(FrontEnd(name, full_name(type(module)), reason is None, reason or row.what))
        if reason is None:
            for path, (mixin, _) in row.parts.items():
                part = module.get_submodule(path)
                part.__class__ = fused_class(mixin, type(part), backend)
    report += _without_adapter(model, seen)
    return report


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`, in place."""
    for name, module in model.named_modules():
        restore(name, module)


def _rows(module: nn.Module) -> Iterator[Row]:
    for cls in type(module).__mro__:
        library = cls.__module__.partition(".")[0]
        if library in ADAPTERS:
            table = import_module(f".{library}", __name__).TABLE
            if row := table.get(full_name(cls)):
                yield row


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
        yield FrontEnd(owner_path, full_name(type(owner)), False, f"no adapter for {where} yet")


def _patchifies(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        return module.kernel_size == module.stride and max(module.stride) > 1 and module.in_channels <= 4
    return type(module).__name__ == "Rearrange" and "(h p1)" in str(getattr(module, "pattern", ""))
