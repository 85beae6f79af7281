"""What the driver refused in this process: the problem is then done in another way, and the driver not asked again."""

from __future__ import annotations

import warnings

from ..problem import PatchProblem

_reasons: dict[tuple[str, PatchProblem], str] = {}


def remember(backend: str, p: PatchProblem, reason: str) -> None:
    """Once there is a warning; explain and info show it from then on."""
    if (backend, p) not in _reasons:
        _reasons[backend, p] = reason
        warnings.warn(f"{p}: {reason}", stacklevel=3)


def happened(backend: str, p: PatchProblem) -> bool:
    return (backend, p) in _reasons


def of(p: PatchProblem) -> dict[str, str]:
    """Backend -> why it does the problem in another way than it would."""
    return {backend: reason for (backend, problem), reason in _reasons.items() if problem == p}


def listed() -> list[dict[str, str]]:
    return [{"backend": backend, "problem": str(p), "reason": reason} for (backend, p), reason in _reasons.items()]
