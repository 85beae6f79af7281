"""The clock: samples of calls on any device, taken in turns, and what they come to."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

Step = Callable[[], Any]


def modal(mode: str, step: Step, leaves: list[torch.Tensor], grad: torch.Tensor | None) -> Step:
    """What a mode times: `step`, the gradients of its `leaves` where the tokens' gradient is `grad`, or both."""
    if mode == "forward":
        return step
    if mode == "both":
        return lambda: torch.autograd.grad(step(), leaves, grad)
    out = step()
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def sampler_of(device: torch.device, todo: list[Step]) -> Callable[[], float]:
    """`sampler` of a fitting number of calls: an idle GPU's first launch then counts little."""
    if device.type != "cuda":
        return _cpu_sampler(todo)
    todo = repeated(todo)
    return sampler(device, todo, len(todo))


def repeated(todo: list[Step]) -> list[Step]:
    return [todo[i % len(todo)] for i in range(max(len(todo), 10))]


def sampler(device: torch.device, todo: list[Step], calls: int) -> Callable[[], float]:
    """A function that runs everything in `todo` once, in order, and returns ms per call."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def sample() -> float:
            start.record()
            for step in todo:
                step()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / calls
    else:

        def sample() -> float:
            begin = time.perf_counter()
            for step in todo:
                step()
            return (time.perf_counter() - begin) * 1e3 / calls

    return sample


def graph(todo: list[Step], hold: bool) -> Step:
    """Capture all of `todo` in one CUDA graph. `hold`: outputs keep their own memory, so that writes are cold too."""
    captured, held = torch.cuda.CUDAGraph(), []
    pool = torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(captured, pool=pool, stream=torch.cuda.current_stream()):
            for step in todo:
                out = step()
                if hold:
                    held.append(out)
    except BaseException:
        # Before torch 2.12 the allocator goes on believing in a capture that CUDA refused, and empty_cache raises.
        with suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        raise
    return captured.replay


def alive(device: torch.device) -> None:
    """Raise where an error has left the device unusable, so that it isn't reported as everybody's error."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def short(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0][:300]}"


def _cpu_sampler(todo: list[Step]) -> Callable[[], float]:
    """A few calls a sample, the sets in turn; a sample of less than 2 ms would time the timer's neighbours. So would a
    first call, which wakes OpenMP's threads, and is not timed: behind another version's rest (revisions.py) a call of
    0.3 ms took 1 to 4 times as long."""
    begin = time.perf_counter()
    todo[0]()
    repeat = max(1, min(len(todo), int(2e-3 / (time.perf_counter() - begin))))
    position = 0

    def sample() -> float:
        nonlocal position
        todo[position - 1]()
        chosen = [todo[(position + i) % len(todo)] for i in range(repeat)]
        position = (position + repeat) % len(todo)
        return sampler(torch.device("cpu"), chosen, repeat)()

    return sample


def rounds(samplers: list[Callable[[], float]], seconds: float, least: int = 7, most: int = 200) -> list[list[float]]:
    """Sample all in turns, until `seconds` a sampler have gone; each round in another order, as what ran before leaves
    caches and the allocator's pools behind."""
    times: list[list[float]] = [[] for _ in samplers]
    order, shuffle = list(range(len(samplers))), random.Random(0).shuffle
    begin = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - begin > seconds * len(samplers):
            break
        shuffle(order)
        for i in order:
            times[i].append(samplers[i]())
    return times


def quantiles(times: Sequence[float]) -> dict[str, float]:
    """median, p20 and p80."""
    cuts = statistics.quantiles(times, n=5, method="inclusive")
    return {"median": rounded(statistics.median(times)), "p20": rounded(cuts[0]), "p80": rounded(cuts[3])}


def rounded(value: float) -> float:
    """To five digits."""
    return float(f"{value:.5g}")
