"""`tune --backends` times every backend on this machine's GPU and keeps, for each direction and kind of product, which
of them `auto` tries (backends/measured.py)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from math import exp, log
from typing import Any

import torch

from .. import dispatch
from ..backends import measured, user_cache
from ..bench import environment, op, timing
from ..bench.cases import Case
from ..functional import explain
from ..gpu import Gpu, gpu_of, not_nvidia
from .search import INF, TIE, Journal, Progress, journal

# What people run: patches of 14, 16 and 32 pixels, small and large batches, a keep list, 8-bit pixels, and autocast.
CASES = (
    Case(batch=8), Case(), Case(pixels="uint8"), Case(patch=14, dim=1024), Case(patch=32), Case(keep=0.25),
    Case(autocast=True),
    *(Case(batch=batch, patch=patch, dim=dim, dtype=dtype)
      for dtype in ("fp32", "tf32") for batch, patch, dim in ((8, 16, 768), (64, 16, 768), (64, 14, 1024))),
)  # fmt: skip
MODES = {"forward": "forward", "weight": "backward", "images": "images"}  # direction -> bench's mode


class GpuLost(RuntimeError):
    """An error left the GPU unusable to this process."""


Timing = tuple[str, str, str]  # case, direction, backend
Timer = Callable[[Case, str, str], float]  # case, mode, backend -> milliseconds; an exception: no such time


def tune_backends(
    device: torch.device | str,
    *,
    seconds: float = 0.1,
    progress: Callable[[Progress], object] = lambda event: None,
    gpu: Gpu | None = None,
    timer: Timer | None = None,
) -> dict[str, Any]:
    """Time every backend for each direction and kind of product, and keep the order of the fastest.

    A backend is timed where it takes the problem. One whose result breaks the rule of accuracy, that fails, or that
    ended the process in an earlier run has no time, and is out for that kind of product. Killed at any moment it goes
    on, when called again, where it was.

    Args:
        device: the GPU.
        seconds: of samples, for each case, direction and backend.
        progress: called before each of them.
        gpu, timer: the figures of a GPU and a clock, in place of the device's: a run without it.

    Returns:
        {"gpu", "file", "rows": [{"direction", "kind", "backends", "why", "ms": case -> backend -> milliseconds or
        None}], "failed": [what has no time, and why]}.

    Raises:
        NotImplementedError: the device is no NVIDIA GPU.
        BlockingIOError: another process is at it, on this GPU.
        GpuLost: a backend left the device unusable; run again in a new process, it goes on behind it.
    """
    device = torch.device(device)
    if timer is None:
        if device.type != "cuda":
            raise NotImplementedError(f"backends are timed on a GPU; the device is {device}")
        if other := not_nvidia():
            raise NotImplementedError(other)
        timer = _timer(device, seconds)
    gpu = gpu or gpu_of(device)
    header = environment.header(device, "")
    versions = {name: header[name] for name in ("driver", "torch")} | measured.built_from()
    file = user_cache.file_of(gpu.name)
    failed: list[str] = []
    todo = list(_todo(device))
    with journal(file.with_name(f"{file.stem}.backends.journal"), {"gpu": gpu.name, **versions}) as notes:
        for done, (case, direction, _, name) in enumerate(todo):
            at = (case.name, direction, name)
            progress(Progress(done, len(todo), f"{case.name} {dispatch.DIRECTIONS[direction]} {name}", INF, 0.0))
            if at not in notes.times:
                _time(notes, at, partial(timer, case, MODES[direction], name), failed)
                _alive(device, at)
        found = _rows(todo, notes.times)
        entry = {"gpu": gpu.name, **versions, "date": time.strftime("%Y-%m-%d")}
        measured.remember(gpu.name, {(r["direction"], r["kind"]): _kept(r) | entry for r in found})
    dispatch.forget()
    return {"gpu": gpu.name, "file": str(file), "rows": found, "failed": failed}


def _todo(device: torch.device) -> Iterator[tuple[Case, str, str, str]]:
    """(case, direction, kind of product, backend) for all that is to be timed."""
    for case in CASES:
        with op.settings(case):
            small = replace(explain(**replace(case, batch=1).call("cpu")).problem, device=device)
            for direction in MODES:
                if direction == "images" and not small.image_dtype.is_floating_point:
                    continue
                kind = dispatch.kind_of(small, direction)
                for name in dispatch.MODULES:
                    if not dispatch.why_not(small, name):
                        yield case, direction, kind, name


def _time(notes: Journal, at: Timing, timed: Callable[[], float], failed: list[str]) -> None:
    notes.begun(at)
    try:
        ms = timed()
    except Exception as error:  # of one backend: the others go on
        notes.done(at, error=timing.short(error))
        failed.append(f"{' '.join(at)}: {timing.short(error)}")
        notes.times[at] = INF
    except BaseException:  # someone stops it: that is not the backend's doing
        notes.withdrawn(at)
        raise
    else:
        notes.done(at, ms=ms)
        notes.times[at] = ms


def _alive(device: torch.device, at: Timing) -> None:
    try:
        timing.alive(device)
    except RuntimeError as error:
        lost = f"after {' '.join(at)} the GPU is lost to this process: run again, it goes on behind that"
        raise GpuLost(f"{lost} ({timing.short(error)})") from error


def _timer(device: torch.device, seconds: float) -> Timer:
    """bench's clock, by CUDA-graph replays where the backend can be captured; its gate holds results to the rule."""

    def timed(case: Case, mode: str, name: str) -> float:
        rows = op.bench(case, device=device, mode=mode, impls=[name], seconds=seconds)
        if wrong := rows[0].get("error"):
            raise ArithmeticError(wrong)
        return next(row["ms"]["median"] for row in reversed(rows) if row["ms"])

    return timed


def _rows(todo: list[tuple[Case, str, str, str]], times: dict[Timing, float]) -> list[dict[str, Any]]:
    """For each direction and kind: which backends are faster than the reference, the fastest first, by the geometric
    mean over the cases."""
    rows = []
    for direction, kind in dict.fromkeys((direction, kind) for _, direction, kind, _ in todo):
        ms: dict[str, dict[str, float]] = {}
        for case, *at, name in todo:
            if at == [direction, kind]:
                ms.setdefault(case.name, {})[name] = times[case.name, direction, name]
        ms = {case: found for case, found in ms.items() if found["reference"] < INF}  # too large for this GPU, say
        if not ms:
            continue
        ratios: dict[str, list[float]] = {}
        for found in ms.values():
            for name, t in found.items():
                ratios.setdefault(name, []).append(t / found["reference"])
        of_others = {name: _mean(r) for name, r in ratios.items() if name != "reference"}
        order = sorted((name for name in of_others if of_others[name] < TIE), key=lambda name: of_others[name])
        words = [f"{name} {_said(ratios[name])}" for name in sorted(of_others, key=lambda name: of_others[name])]
        why = f"{', '.join(words) or 'no other takes it'}, over {len(ms)} shapes"
        table = {case: {n: None if t == INF else t for n, t in found.items()} for case, found in ms.items()}
        rows.append({"direction": direction, "kind": kind, "backends": [*order, "reference"], "why": why, "ms": table})
    return rows


def _mean(ratios: list[float]) -> float:
    return INF if INF in ratios else exp(statistics.fmean(map(log, ratios)))


def _said(ratios: list[float]) -> str:
    if INF in ratios:
        return "failed"
    return f"{_mean(ratios):.2f} × the reference's time ({min(ratios):.2f} to {max(ratios):.2f})"


def _kept(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("backends", "why", "ms")}
