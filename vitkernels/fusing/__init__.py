"""`fuse` and `unfuse`: front ends of other libraries' models, sent through `patch_embed` and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from importlib import import_module

from torch import nn

from ..dispatch import check_name
from . import pending, structure, swapping
from .report import FrontEnd, Report
from .swapping import Fused, Row, full_name, fused_class, overridden, restore

# Each has an adapter here of its own name, imported when a class of that library was found and not before.
ADAPTERS = ("timm", "torchvision", "transformers")
REARRANGE = "einops.layers.torch.Rearrange"

__all__ = ["FrontEnd", "Report", "fuse", "unfuse"]


def fuse(model: nn.Module, backend: str = "auto") -> Report:
    """Send every known front end in `model` through `patch_embed`, in place; of those that no adapter knows, the
    projection, where it is a plain convolution whose patches do not overlap.

    Parameters stay where they are: state_dict, optimiser, training mode and hooks see no difference, and copies and
    pickles of the model are fused too. A second call sees what changed since, and sets another backend.

    A fused model takes what the model took, and floats of any dtype. Integer pixels meet the library's own code, which
    refuses them or not: only the model knows how it wants them normalised. It runs the library's code too where a part
    has hooks or was replaced since, where all modules have hooks, and under torch.jit and torch.fx.

    Returns:
        A list of `FrontEnd`, one for each that was found, fused or not; it prints a line for each. What can't be read
        (a model that an older release of its library pickled) is left alone, with the reason. Its `calls()` say, after
        a run, how often each was one call, and how often and why the library's own code ran.

    Raises:
        ValueError: no such backend. A backend that can't take a problem raises NotImplementedError when it meets it.
        RuntimeError: something else swapped the class of a fused module meanwhile (FSDP, for one).
    """
    check_name(backend)
    unfuse(model)
    report = Report(model)
    known: set[nn.Module] = set()  # of front ends that adapters took, or could not even read
    left: dict[nn.Module, int] = {}  # modules of a front end whose projection its adapter left -> the entry
    for name, module in model.named_modules():
        row = _row_of(module)
        if row is None:
            continue
        cls, (reason, is_error) = full_name(type(module)), _swap(module, row, backend)
        if is_error or (reason is None and row.projects):
            known.update(module.modules())
        else:
            left.update(dict.fromkeys(module.modules(), len(report)))
        report.append(FrontEnd(name, cls, reason is None, reason or row.what))
    _by_structure(model, backend, report, known, left)
    if not report:
        report.extend(_linears_on_patches(model))
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


def _swap(module: nn.Module, row: Row, backend: str) -> tuple[str | None, bool]:
    """Fuse one front end, or say why it is left alone, and whether by an error: no module's fault keeps the others from
    being fused."""
    try:
        if (reason := _why_not(module, row)) is not None:
            return reason, False
        parts = [(module.get_submodule(path), mixin) for path, (mixin, _) in row.parts.items()]
        classes = [fused_class(mixin, type(part), backend) for part, mixin in parts]
        for (part, _), cls in zip(parts, classes, strict=True):
            part.__class__ = cls
    except Exception as error:
        unfuse(module)
        return _tolerated(error), True
    return None, False


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


def _by_structure(
    model: nn.Module, backend: str, report: Report, known: set[nn.Module], left: dict[nn.Module, int]
) -> None:
    """Fuse the projections that adapters left, or say why not: an entry for each owner of what looks like one."""
    listed = left.copy()
    for path, module in model.named_modules():
        if module in known or (kind := _kind(module)) is None:
            continue
        owner_path, owner = _owner(model, path)
        masks = any(part.startswith("mask_") for part in path.split(".")[-2:])  # SAM embeds them: no front end
        if masks or full_name(type(owner)).startswith("vitkernels."):
            continue
        mixin, why_not = kind
        of = {"": (mixin, full_name(type(module)))}
        reason, _ = _swap(module, Row(of, why_not, ""), backend)
        what = "projection only"
        if reason is None and _embedding_around(model, path, backend):
            what = "projection; position and prefix as its code adds them"
        at = listed.get(module, listed.get(owner))
        if at is None:
            at = listed[owner] = len(report)
            report.append(FrontEnd(owner_path, full_name(type(owner)), False, _broken_adapter(owner) or reason or ""))
        entry = report[at]
        if reason is None and not entry.fused:
            because = f": {entry.note}" if entry.note else ""
            report[at] = replace(entry, fused=True, note=f"{what}{because}")


def _embedding_around(model: nn.Module, path: str, backend: str) -> bool:
    """Fuse what adds position and prefix to a fused projection, where a module does nothing else; whether there is."""
    if (around := structure.embedding_around(model, path)) is None:
        return False
    embedding = model.get_submodule(around)
    of: dict[str, tuple[type[Fused], str]] = {"": (pending.Embedding, full_name(type(embedding)))}
    fused = isinstance(embedding, pending.Embedding)
    return fused or _swap(embedding, Row(of, pending.why_not, ""), backend)[0] is None


def _kind(module: nn.Module) -> tuple[type[Fused], Callable[..., str | None]] | None:
    """What goes in front of a module that looks like the projection of a front end, and what says why it can't."""
    if structure.patchifies(module):
        return structure.Projection, structure.why_not
    if isinstance(module, nn.Sequential) and len(module) and full_name(type(module[0])) == REARRANGE:
        from . import rearrange  # needs einops, which who has this class has

        if rearrange.projects(module):
            return rearrange.ToPatchEmbedding, rearrange.why_not
    return None


def _linears_on_patches(model: nn.Module) -> Iterator[FrontEnd]:
    """Front ends that are handed patches in rows (NaFlex, SigLIP 2, Llama 4, NaViT): a Linear is all there is."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and structure.of_patches(module.in_features):
            owner_path, owner = _owner(model, path)
            where = f"{path} {type(owner).__name__}".lower()
            if "patch" in where or "naflexembeds" in where:
                yield FrontEnd(owner_path, full_name(type(owner)), False, "a Linear on cut patches: nothing to gain")


def _owner(model: nn.Module, path: str) -> tuple[str, nn.Module]:
    """The module that a projection belongs to, past containers."""
    module = owner = model.get_submodule(path)
    while path and (owner is module or isinstance(owner, nn.Sequential | nn.ModuleList)):
        path = path.rpartition(".")[0]
        owner = model.get_submodule(path)
    return path, owner


def _broken_adapter(owner: nn.Module) -> str:
    library = type(owner).__module__.partition(".")[0]
    broken = _adapter(library)[1] if library in ADAPTERS else ""
    return broken and f"the adapter for {library} can't be used: {broken}"
