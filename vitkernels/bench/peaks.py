"""The rates that a device reaches at best, measured in this process: what a roofline is drawn from."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch

from ..backends.reference.products import linear_of
from ..gpu import indexed


class Peaks(NamedTuple):
    bytes: float  # a second, of a large copy: read and written
    flops: float  # a second, of a large product

    def ms(self, flops: int, bytes_: int) -> float:
        """The roofline: the least time of so much work."""
        return 1e3 * max(bytes_ / self.bytes, flops / self.flops)


def peaks(device: torch.device, dtype: torch.dtype, tf32: bool = False) -> Peaks:
    """The fastest of some large copies and products; `tf32` says what PyTorch's switches say, for the cache's sake.

    On a CPU that multiplies float32 faster than halves the product is that of float32: so would a good kernel.
    """
    return _peaks(indexed(device), dtype, tf32)


@lru_cache(maxsize=16)
def _peaks(device: torch.device, dtype: torch.dtype, tf32: bool) -> Peaks:
    with torch.cuda.device_of(torch.empty(0, device=device)), torch.autocast(device.type, enabled=False):
        return _measured(device, dtype, tf32)


def _measured(device: torch.device, dtype: torch.dtype, tf32: bool) -> Peaks:
    gpu = device.type == "cuda"
    source = torch.randint(256, ((1 << 30) if gpu else (1 << 27),), dtype=torch.uint8, device=device)
    copy = _seconds(partial(torch.empty_like(source).copy_, source), gpu)
    n = 1536 if not gpu else 4096 if dtype == torch.float64 or (dtype == torch.float32 and not tf32) else 8192
    dtypes = {dtype} if gpu or dtype == torch.float64 else {dtype, torch.float32}
    product = min(_seconds(partial(linear_of(not gpu, d), *_operands(n, d, device), None), gpu) for d in dtypes)
    return Peaks(2 * source.numel() / copy, 2 * n**3 / product)


def _operands(n: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    return [torch.randn(n, n, device=device).to(dtype) for _ in range(2)]


def _seconds(call: Callable[[], object], gpu: bool) -> float:
    times = []
    with torch.no_grad():
        for _ in range(23 if gpu else 9):
            if gpu:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) / 1e3)
            else:
                begin = time.perf_counter()
                call()
                times.append(time.perf_counter() - begin)
    return min(times[3:])
