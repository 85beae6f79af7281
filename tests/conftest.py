"""The device of this machine, its CUDA kernels or their emulation, and memory that shows what nobody wrote."""

import gc
import os

import interpreter
import pytest
import torch

gc.set_threshold(50_000)  # what is imported stays, and is not looked through again and again: a tenth of the time
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported
    interpreter.quicken()


def pytest_collection_finish():
    gc.freeze()


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    """What `vk.fuse` tolerates in users' models is raised here, so that it hides no mistake of ours."""
    from vitkernels.fusing import swapping

    monkeypatch.setattr(swapping, "STRICT", True)


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def host_extension():
    """The extension's very source, compiled for the CPU: tests/host/."""
    from host import build

    return build.load()


@pytest.fixture
def on_cuda_kernels(request, device, monkeypatch):
    """Makes backend "cuda" run here, on a GPU or emulated; call it with the architecture to emulate, and with how many
    multiprocessors: on few of them a block takes many tiles, and a split many steps."""
    from host import backend

    from vitkernels.gpu import NOMINAL

    def use(arch: int = 90, multiprocessors: int | None = None) -> None:
        if device == "cuda":
            return
        gpu = NOMINAL[arch]
        gpu = gpu._replace(multiprocessors=multiprocessors or gpu.multiprocessors)
        backend.use(monkeypatch, request.getfixturevalue("host_extension"), gpu)

    yield use
    backend.forget()


MAKERS = {"Intel": ("amx_bf16", "avx512_bf16", "avx512f"), "Zen 5": ("avx512_bf16", "avx512f"), "another": ()}


@pytest.fixture
def anew():
    """How the reference evaluates is decided again, in the test and after it."""
    from vitkernels.backends.reference import unfold

    unfold._way_of.cache_clear()
    yield
    unfold._way_of.cache_clear()


@pytest.fixture(params=MAKERS)
def maker(request, anew, monkeypatch):
    """The processor's, which decides with its instructions how the reference evaluates: each is played on any."""
    from vitkernels import cpu
    from vitkernels.backends.reference import products

    monkeypatch.setattr(cpu, "is_intel", lambda: request.param == "Intel")
    monkeypatch.setattr(cpu, "is_zen5", lambda: request.param == "Zen 5")
    monkeypatch.setattr(cpu, "instructions", lambda: MAKERS[request.param])
    monkeypatch.setattr(products, "_has_bf16", lambda: "avx512_bf16" in MAKERS[request.param])
    return request.param


def poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)


@pytest.fixture
def poisoned(monkeypatch):
    """Uninitialised memory comes as NaN, integers as their maximum: an output that is not written can't look right."""
    from torch.utils._device import _device_constructors

    from vitkernels.backends import common

    _device_constructors()  # remembers them by identity, for torch.device("meta") in all tests to come
    for home, names in (
        (torch, ("empty", "empty_like", "empty_strided")),
        (torch.Tensor, ("new_empty", "new_empty_strided")),
        (common, ("_ON_CPU", "_ON_GPU")),
    ):
        for name in names:
            true = getattr(home, name)
            monkeypatch.setattr(home, name, lambda *a, true=true, **k: poison(true(*a, **k)))
