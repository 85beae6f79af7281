"""Temporary memory of one call, as PyTorch's allocators see it."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import torch


def peak_bytes(step: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Bytes at the peak of one call, beyond what lived before it and beyond the tensors that it returns.

    `step` is run once; run it before, so that what is made once (a compiled kernel, a library's workspace) does not
    count. What the call leaves alive elsewhere counts: gradients in `.grad`, what a backward will need.

    On a GPU the bytes are the caching allocator's, of this process and device; they come in multiples of 512, and
    memory that was freed during the call makes room that is not counted. On a CPU they are those of PyTorch's
    allocator, oneDNN's reordered operands among them, on this thread and the threads of its backward; the packing
    buffers that a BLAS keeps for itself are not seen.
    """
    device = torch.device(device)
    return _on_gpu(step, device) if device.type == "cuda" else _on_cpu(step)


def _on_cpu(step: Callable[[], Any]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read at its first use; it writes its start and stop to stderr
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        result = step()
    assert profile.kineto_results is not None
    changes = sorted(
        (event.start_time_ns, order, event.extra_fields.ptr, event.extra_fields.alloc_size)
        for order, event in enumerate(_events(profile.kineto_results.experimental_event_tree()))
        if type(event.extra_fields).__name__ == "_ExtraFields_Allocation" and event.extra_fields.device.type == "cpu"
    )
    live: dict[int, int] = {}  # address -> bytes, of what was allocated during the call
    now = peak = 0
    for _, _, address, size in changes:
        if size > 0:
            live[address] = size
            now += size
            peak = max(peak, now)
        else:
            now -= live.pop(address, 0)  # what lived before the call is no change of ours
    return max(0, peak - _size(result, live))


def _on_gpu(step: Callable[[], Any], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    blocks = [b for segment in torch.cuda.memory_snapshot() for b in segment["blocks"]]
    alive = {b["address"] for b in blocks if b["state"] == "active_allocated"}
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = step()
    peak = torch.cuda.max_memory_allocated(device) - before
    new = {t.untyped_storage().data_ptr() for t in _tensors(result)} - alive
    return max(0, peak - _size(result, new))


def _size(result: Any, new: Container[int]) -> int:
    """Bytes of the returned tensors that lie in new storages, each byte once."""
    sizes: dict[int, int] = {}
    for t in _tensors(result):
        address = t.untyped_storage().data_ptr()
        if address in new:
            sizes[address] = min(sizes.get(address, 0) + t.numel() * t.element_size(), t.untyped_storage().nbytes())
    return sum(sizes.values())


def _tensors(result: Any) -> Iterator[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, Mapping):  # a model's output in transformers is one
        yield from _tensors(list(result.values()))
    elif isinstance(result, list | tuple):
        for item in result:
            yield from _tensors(item)


def _events(events: list[Any]) -> Iterator[Any]:
    todo = list(reversed(events))
    while todo:
        event = todo.pop()
        yield event
        todo += reversed(event.children)
