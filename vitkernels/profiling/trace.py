"""What a call spends its time on: traces of PyTorch's profiler, under ranges named after operation and shape.

A trace is the Chrome JSON that Perfetto and chrome://tracing open. The tables are read from that file, so they can be
made again from it. Nsight's tools, which count what this one can't, are nsight.py's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import cost_model
from ..bench import gate, implementations, memory, op, peaks, timing
from ..bench.cases import Case
from ..functional import explain

ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace's events


def label(case: Case, mode: str, name: str) -> str:
    """ "patch_embed forward B256 224 P16 D768 bf16 [triton]" """
    return f"patch_embed {mode} {case.name.replace('-', ' ')} [{name}]"


@contextmanager
def named(text: str, device: torch.device) -> Iterator[None]:
    """A range that a trace of PyTorch's profiler shows; on a GPU, one that Nsight's tools show too (NVTX)."""
    gpu = device.type == "cuda"
    with torch.profiler.record_function(text):
        if gpu:
            torch.cuda.nvtx.range_push(text)
        try:
            yield
        finally:
            if gpu:
                torch.cuda.nvtx.range_pop()


def calls_of(case: Case, impl: str, mode: str, device: torch.device) -> tuple[str, Callable[[], Any]]:
    """The name of what runs (of "auto", the backend it takes) and one call of the mode, ready to be made."""
    call = case.call(device)
    name = explain(**call).chosen if impl == "auto" else impl
    [(step, leaves)] = implementations.steps(impl, [call], mode)
    p = implementations.problem(call)
    dY = None if mode == "forward" else torch.randn(p.out_shape, device=device).to(p.out_dtype)
    return name, timing.modal(mode, step, leaves, dY)


def trace(
    case: Case, impl: str, *, mode: str, device: torch.device, out: Path, calls: int = 10
) -> dict[str, Any]:  # fmt: skip
    """Profile `calls` warm calls of an implementation, after it was held to the accuracy rule.

    Returns:
        {"impl", "backend", "label", "file" (the trace), "kernels" (`table`), "us" (of one call: its kernels on a GPU,
        its operations on a CPU), "peak_mb" (temporary memory of one call), "roofline_share"}; or {"impl", "error"}.
    """
    with op.settings(case), torch.set_grad_enabled(mode != "forward"):
        if error := gate.gate(impl, case.call(device), mode):
            return {"impl": impl, "error": error}
        name, step = calls_of(case, impl, mode, device)
        for _ in range(3):
            step()
        peak = memory.peak_bytes(step, device)
        text = label(case, mode, name)
        file = out / f"{case.name}-{mode}-{impl}.json"
        out.mkdir(parents=True, exist_ok=True)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it writes its start and stop to stderr
        with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
            for _ in range(calls):
                with named(text, device):
                    step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        profile.export_chrome_trace(str(file))
        traced = json.loads(file.read_text(errors="replace"))
        if device.type == "cuda" and not any(e.get("cat") in ON_GPU for e in traced["traceEvents"]):
            return {"impl": impl, "error": "the profiler saw no kernel: CUPTI can't be used here"}
        rows = table(traced, calls)
        us = sum(row["us"] for row in rows)
        p = implementations.problem(case.call(device))
        rates = peaks.peaks(device, p.compute_dtype, case.dtype == "tf32")
    least = 1e3 * rates.ms(*cost_model.work(p, mode))
    return {
        "impl": impl, "backend": name, "label": text, "file": str(file), "kernels": rows, "us": us,
        "peak_mb": round(peak / 1e6, 3), "roofline_share": least / us if us else None,
    }  # fmt: skip


def table(trace: dict[str, Any], calls: int) -> list[dict[str, Any]]:
    """Per kernel and copy of a trace, or where no GPU took part, per operation without those it called.

    Returns:
        [{"name", "count" and "us" (both of one call), "share" of all rows' time}], longest first; of kernels also
        "registers" (of a thread), "shared_bytes" (of a block), "grid", "block", as they were last launched.
    """
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X" and "dur" in e]
    taken = [(e, e["dur"]) for e in events if e.get("cat") in ON_GPU] or list(_own_times(events))
    rows: dict[str, dict[str, Any]] = {}
    for event, us in taken:
        row = rows.setdefault(event["name"], {"name": event["name"], "count": 0, "us": 0.0})
        row["count"] += 1
        row["us"] += us
        arguments = event.get("args", {})
        names = {"registers": "registers per thread", "shared_bytes": "shared memory", "grid": "grid", "block": "block"}
        row.update({ours: arguments[theirs] for ours, theirs in names.items() if theirs in arguments})
    total = sum(row["us"] for row in rows.values())
    for row in rows.values():
        row["share"] = row["us"] / total if total else 0.0
        row["count"], row["us"] = row["count"] / calls, row["us"] / calls
    return sorted(rows.values(), key=lambda row: -row["us"])


def _own_times(events: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], float]]:
    """(operation, µs without the operations inside it), thread by thread."""
    operations = [e for e in events if e.get("cat") == "cpu_op"]
    operations.sort(key=lambda e: (str(e.get("tid")), e["ts"], -e["dur"]))
    inside: list[tuple[dict[str, Any], list[float]]] = []  # the operations that are open, with what is left of each
    for event in operations:
        while inside and (
            inside[-1][0].get("tid") != event.get("tid") or inside[-1][0]["ts"] + inside[-1][0]["dur"] <= event["ts"]
        ):
            done, left = inside.pop()
            yield done, max(0.0, left[0])
        if inside:
            inside[-1][1][0] -= event["dur"]
        inside.append((event, [event["dur"]]))
    yield from ((event, max(0.0, left[0])) for event, left in reversed(inside))


def launch(case: Case, impl: str, *, mode: str, device: torch.device, calls: int) -> None:
    """Make `calls` warm calls where Nsight's tools look: between the start and the stop of CUDA's profiler."""
    with op.settings(case), torch.set_grad_enabled(mode != "forward"):
        name, step = calls_of(case, impl, mode, device)
        for _ in range(3):
            step()
        gpu = device.type == "cuda"
        if gpu:
            torch.cuda.synchronize(device)
            torch.cuda.profiler.start()
        for _ in range(calls):
            with named(label(case, mode, name), device):
                step()
        if gpu:
            torch.cuda.synchronize(device)
            torch.cuda.profiler.stop()
