"""The least time a problem can take on a device, from rates measured on that device in the same process."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import lru_cache, partial

import torch

from .problem import PatchProblem

Peaks = tuple[float, float]  # bytes a second of a device copy (read + write), FLOP a second of a large product


def work(p: PatchProblem, mode: str) -> tuple[int, int]:
    """FLOP and compulsory bytes of a mode. The weight gradient multiplies as much as the forward, and reads the pixels
    and the tokens' gradient once, as the forward reads the pixels and writes the tokens."""
    times = 2 if mode == "both" else 1
    return times * p.flops, times * p.bytes


def share(p: PatchProblem, mode: str, peaks: Peaks | None, ms: float) -> float | None:
    """Roofline time / measured time: 1 is as fast as the device could be. None where the peaks are not known."""
    if peaks is None:
        return None
    flops, bytes_ = work(p, mode)
    return max(bytes_ / peaks[0], flops / peaks[1]) * 1e3 / ms


@lru_cache(maxsize=16)
def peaks(device: torch.device, dtype: torch.dtype, tf32: bool = False) -> Peaks | None:
    """Measured rates of a GPU; None on a CPU, whose rates other processes share. `tf32` says what the flags say."""
    if device.type != "cuda":
        return None
    source = torch.randint(256, (1 << 30,), dtype=torch.uint8, device=device)
    copy = 2 * source.numel() / _seconds(partial(torch.empty_like(source).copy_, source))
    del source
    n = 4096 if dtype == torch.float32 and not tf32 else 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return copy, 2 * n**3 / _seconds(partial(torch.mm, a, b))


def _seconds(call: Callable[[], object]) -> float:
    """Median of 20 calls, after 3 to warm up."""
    times = []
    for _ in range(23):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])
