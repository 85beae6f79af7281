"""Backend "cuda" on a module of tests/host/build.py, as if this machine had the GPU."""

from vitkernels import dispatch
from vitkernels.backends import cuda
from vitkernels.backends.cuda import extension
from vitkernels.gpu import Gpu


def forget() -> None:
    """What is cached of a GPU or made by a module."""
    cuda.forget()
    dispatch.forget()


def use(monkeypatch, module, gpu: Gpu) -> None:
    monkeypatch.setattr(extension, "load", lambda: module)
    monkeypatch.setattr(extension, "missing", lambda: "")
    monkeypatch.setattr(cuda, "gpu_of", lambda device: gpu)
    forget()
