"""What the kernels' plans ask of the device: its figures, and whether float32 may be rounded to TF32."""

from __future__ import annotations

from functools import lru_cache

import torch

from .tuning import NOMINAL, Gpu


def tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


@lru_cache(maxsize=64)
def gpu_of(device: torch.device) -> Gpu:
    """The figures of a GPU; for the CPU, where tests run the kernels, those of an H100."""
    if device.type == "cpu":
        return NOMINAL[90]._replace(name="emulated")
    properties = torch.cuda.get_device_properties(device)
    arch = properties.major * 10 + properties.minor
    return Gpu(properties.name, arch, properties.multi_processor_count, properties.shared_memory_per_block_optin)
