"""What plans ask of the device: its figures, and whether float32 may be rounded to TF32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch


class Gpu(NamedTuple):
    name: str
    arch: int  # 90 for sm_90
    multiprocessors: int
    shared_bytes: int  # of one program, at most


# One GPU of each architecture, for compiling without one. Shared memory: CUDA programming guide, compute capabilities.
NOMINAL = {
    75: Gpu("T4", 75, 40, 65536), 80: Gpu("A100", 80, 108, 166912), 86: Gpu("A10", 86, 72, 101376),
    89: Gpu("L4", 89, 58, 101376), 90: Gpu("H100", 90, 132, 232448), 100: Gpu("B200", 100, 148, 232448),
    103: Gpu("B300", 103, 148, 232448), 110: Gpu("Jetson Thor", 110, 20, 232448),
    120: Gpu("RTX 5090", 120, 170, 101376), 121: Gpu("GB10", 121, 48, 101376),
}  # fmt: skip
OLDEST = 80  # sm_80, which the kernels of both languages need


def not_nvidia() -> str:
    """Why no kernel of ours runs on what this PyTorch calls "cuda"; "" on NVIDIA's. An AMD GPU calls itself so too, and
    its capability, 9.4, reads like a Hopper's."""
    hip = torch.version.hip
    return f"this PyTorch is for AMD GPUs (ROCm {hip}); the kernels are for NVIDIA's" if hip else ""


def tf32() -> bool:
    # What torch.backends.cuda.matmul.fp32_precision returns, without the 1.5 µs of a Python property
    return torch._C._get_fp32_precision_getter("cuda", "matmul") == "tf32"


def rounds(dtype: torch.dtype) -> bool:
    """Whether a product of this dtype may be one of TF32."""
    return dtype is torch.float32 and tf32()


def indexed(device: torch.device) -> torch.device:
    """`cuda` without a number is the current GPU, which changes: what is remembered of it needs the number."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def bind_context(device: torch.device) -> None:
    """Gives this thread the context of the current GPU, where it has none yet.

    The driver's own functions want one, and PyTorch's switch to a GPU calls nothing where that is the current one
    already, as cuda:0 is from a thread's start. This is the cheapest call that needs a context, and allowed while a
    graph is captured.
    """
    if device.type == "cuda":
        torch.cuda.Stream.priority_range()


_THERE_ALREADY = nullcontext()


def on_device_of(t: torch.Tensor) -> AbstractContextManager[object]:
    """With this tensor's GPU as the current one. Where it is that already, nothing is switched, which takes the host
    0.5 µs a launch."""
    if not t.is_cuda or t.get_device() == torch._C._cuda_getDevice():
        return _THERE_ALREADY
    return torch.cuda.device_of(t)


def capturing(device: torch.device) -> bool:
    """Whether a graph is captured from the current stream of this device, which may not be the current device."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def gpu_of(device: torch.device) -> Gpu:
    """The figures of a GPU; for the CPU, where tests run the kernels, those of an H100.

    A number that is an architecture's, as in cuda:90, and none of this machine's GPUs, is that architecture's nominal
    GPU: what would be chosen there can be asked without one.
    """
    return _gpu_of(indexed(device))


def nominal(name: str) -> torch.device:
    """The device that stands for a GPU by its architecture ("sm_90") or name ("H100")."""
    for arch, gpu in NOMINAL.items():
        if name in (gpu.name, f"sm_{arch}"):
            return torch.device("cuda", arch)
    known = ", ".join(f"sm_{arch} ({gpu.name})" for arch, gpu in NOMINAL.items())
    raise ValueError(f"gpu must be one of {known}; got {name!r}")


@lru_cache(maxsize=64)
def _gpu_of(device: torch.device) -> Gpu:
    if device.type == "cpu":
        return NOMINAL[90]._replace(name="emulated")
    if device.index in NOMINAL and device.index >= torch.cuda.device_count():
        return NOMINAL[device.index]
    properties = torch.cuda.get_device_properties(device)
    arch = properties.major * 10 + properties.minor
    shared_bytes = getattr(properties, "shared_memory_per_block_optin", 0)  # NVIDIA's
    return Gpu(properties.name, arch, properties.multi_processor_count, shared_bytes)
