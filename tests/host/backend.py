"""Backend "cuda" on a module of tests/host/build.py, as if this machine had the GPU."""

from vitkernels import dispatch
from vitkernels.backends import cuda
from vitkernels.backends.cuda import extension
from vitkernels.gpu import Gpu


def forget() -> None:
    """What is cached of a GPU or made by a module."""
    for cached in (cuda._gpu, cuda._prepared, cuda._prepared_backward, cuda._problem, cuda.no_wgmma, dispatch._choose):
        cached.cache_clear()


def use(monkeypatch, module, gpu: Gpu) -> None:
    monkeypatch.setattr(extension, "load", lambda: module)
    monkeypatch.setattr(extension, "missing", lambda: "")
    monkeypatch.setattr(cuda, "gpu_of", lambda device: gpu)
    forget()
