"""What the machine refused in this process. Of the driver: the problem is then done in another way, and the driver not
asked again. Of the compiler: the backend is not used again."""

from __future__ import annotations

import warnings

from ..problem import PatchProblem

_reasons: dict[tuple[str, PatchProblem], str] = {}
_unusable: dict[str, str] = {}


class Unusable(Exception):
    """A backend found, before anything was launched, that it can't be used on this machine; `unusable` says why."""


def given_up(backend: str, reason: str) -> Unusable:
    """To be raised. Once there is a warning; the backend's `why_not` has the reason from then on."""
    if backend not in _unusable:
        _unusable[backend] = reason
        warnings.warn(f"backend {backend!r} is not used: {reason}", stacklevel=5)
    return Unusable(reason)


def unusable(backend: str) -> str:
    """Why not, since a call in this process; "": it may be used."""
    return _unusable.get(backend, "")


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
