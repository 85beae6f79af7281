"""The device of this machine, and memory that shows what nobody wrote."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)


@pytest.fixture
def poisoned(monkeypatch):
    """Uninitialised memory comes as NaN, integers as their maximum: an output that is not written can't look right."""
    for home, names in (
        (torch, ("empty", "empty_like", "empty_strided")),
        (torch.Tensor, ("new_empty", "new_empty_strided")),
    ):
        for name in names:
            true = getattr(home, name)
            monkeypatch.setattr(home, name, lambda *a, true=true, **k: poison(true(*a, **k)))
