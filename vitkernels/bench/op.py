"""Time the operation beside what it replaces and beside the device's ceilings, in one process, in turns.

An implementation is first held to the accuracy rule; one that breaks it gets an `error` and no time. Every sample
uses input sets whose total does not fit the cache. All implementations of a case are sampled in rounds, one after
the other, so that a drift of the clock meets them all and `ratio` compares within a round.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from .. import cost_model
from ..functional import explain
from ..problem import PatchProblem
from .baselines import PEERS
from .cases import Call, Case, autocast
from .gate import gate, judged, probe
from .implementations import CEILINGS, OURS, ceiling_steps, default_impls, gradients_of, problem, steps
from .memory import peak_bytes
from .peaks import Peaks
from .peaks import peaks as peaks_of
from .revisions import Other
from .timing import alive, graph, modal, quantiles, repeated, rounded, rounds, sampler, sampler_of, short


def _cache_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 32 << 20


@contextmanager
def settings(case: Case):
    """TF32 and autocast as the case says, cuDNN free to search, as a careful user has it; what was set before comes
    back."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = case.dtype == "tf32"
        cudnn.benchmark = True
        with autocast(case):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


def bench(
    case: Case,
    *,
    device: torch.device | str = "cpu",
    mode: str = "forward",
    impls: Sequence[str] | None = None,
    seconds: float = 0.5,
    compiled: bool | None = None,
    keep_samples: bool = False,
    against: Mapping[str, Path] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Rows of one case and mode, one per implementation and timing ("eager", on a GPU also "graph").

    Args:
        case: the shape.
        device: where.
        mode: "forward", "backward" (the gradients of weight, bias, position and prefix alone), "both", or "images"
            (the pixels' gradient alone).
        impls: backends, names of PEERS and of CEILINGS; by default `default_impls`. The first is what every `ratio`
            refers to: this time / its time, the median over rounds, with its spread.
        seconds: time for samples, per implementation.
        compiled: whether torch.compile is among the default peers; by default on a GPU.
        against: name -> folder of another version of the package, whose `auto` is sampled in the same rounds (eagerly)
            as the implementation "auto@name": revisions.py.
        keep_samples: rows hold their `samples` too, in milliseconds.
        progress: called with what is being done.

    Returns:
        Rows as benchmarks/results/README.md describes them. One that breaks the accuracy rule, or fails, has an
        `error` and no time.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    stream: Any = nullcontext()
    if device.type == "cuda":  # one side stream for all, as a captured backward runs on its forward's stream
        torch.cuda.synchronize(device)
        stream = torch.cuda.stream(torch.cuda.Stream(device))
    with settings(case), stream, torch.set_grad_enabled(mode != "forward"), ExitStack() as others:
        try:
            return _bench(case, device, mode, impls, seconds, compiled, keep_samples, against, others, progress)
        finally:
            if any(name.startswith("compile") for name in impls or PEERS):
                torch._dynamo.reset()  # it stops at eight versions of a function, and every case makes more
            gc.collect()
            if device.type == "cuda":
                with suppress(RuntimeError):  # timing.graph says when
                    torch.cuda.empty_cache()


def _bench(
    case, device, mode, impls, seconds, compiled, keep_samples, against, others, progress
) -> list[dict[str, Any]]:
    calls = [case.call(device)]
    p, names = problem(calls[0]), gradients_of(calls[0], mode)
    if "images" in names and not p.image_dtype.is_floating_point:
        raise ValueError(f"pixels of {p.image_dtype} have no gradient to time")
    impls = default_impls(calls[0], compiled=compiled) if impls is None else impls
    if unknown := [name for name in impls if name not in (*OURS, *PEERS, *CEILINGS)]:
        raise ValueError(f"no implementation {unknown}; there are {', '.join((*OURS, *PEERS, *CEILINGS))}")
    sets = min(128 if p.device.type == "cuda" else 32, max(2, -(-3 * _cache_bytes(device) // p.bytes)))
    peaks = peaks_of(device, p.compute_dtype, case.dtype == "tf32")
    calls += [case.call(device, seed) for seed in range(1, sets)]
    flops, bytes_ = cost_model.work(p, mode)
    grad = None if mode == "forward" else torch.randn(p.out_shape, device=device).to(p.out_dtype)
    common = {"case": case.name, "mode": mode, "dtype": case.dtype, "impl": None, "ms": None, "timing": "eager",
              "bytes": bytes_, "flops": flops, "roofline_share": None}  # fmt: skip

    prepared: list[tuple[dict[str, Any], Callable[[], float] | None]] = []
    for i, impl in enumerate(impls):
        progress(f"{case.name} {mode} {impl}: check")
        first = i * sets // len(impls)  # in a round, nobody warms the inputs of the next
        prepared += _prepared(common | {"impl": impl}, calls[first:] + calls[:first], p, mode, grad)
    for name, folder in (against or {}).items():
        progress(f"{case.name} {mode} auto@{name}: check")
        row, sample = common | {"impl": f"auto@{name}"}, None
        try:
            other = others.enter_context(
                closing(
                    Other(folder, case, mode=mode, gradients=names, device=device, sets=sets, grad=grad, probe=probe(p))
                )
            )
            if wrong := judged(calls[0], other.tokens, dict(zip(names, other.grads, strict=True))):
                row["error"] = wrong
            else:
                sample = other.sample
        except (RuntimeError, OSError) as error:
            row["error"] = short(error)
        prepared.append((row, sample))

    progress(f"{case.name} {mode}: time")
    timed = [(row, sample) for row, sample in prepared if sample]
    bases: dict[str, list[float]] = {}
    for (row, _), times in zip(timed, rounds([sample for _, sample in timed], seconds), strict=True):
        row |= _figures(row, times, peaks, case.batch)
        if keep_samples:
            row["samples"] = times
        base = bases.setdefault(row["timing"], times) if row["impl"] == impls[0] else bases.get(row["timing"])
        if base:
            row["ratio"] = quantiles([t / b for t, b in zip(times, base, strict=True)])
    return [row for row, _ in prepared]


def _prepared(
    row: dict[str, Any], calls: Sequence[Call], p: PatchProblem, mode: str, grad: torch.Tensor | None
) -> Iterator[tuple[dict[str, Any], Callable[[], float] | None]]:
    """An implementation's row, with what takes a sample of it or with an `error`; on a GPU also that of its graph."""
    impl, device = row["impl"], p.device
    try:
        if impl in CEILINGS:
            todo = ceiling_steps(impl, calls, mode)
        else:
            if impl == "auto":
                row["backend"] = explain(**calls[0]).takes(mode)
            if wrong := gate(impl, calls[0], mode):
                yield row | {"error": wrong}, None
                return
            todo = [modal(mode, *made, grad) for made in steps(impl, calls, mode)]
        for step in todo[:2]:  # warm: compilers, cuDNN's search, pools
            step()
        alive(device)
        if impl not in CEILINGS:
            row["peak_mb"] = rounded(peak_bytes(todo[0], device) / 1e6)
        eager = sampler_of(device, todo)
    except Exception as error:
        alive(device)
        yield row | {"error": short(error)}, None
        return
    yield row, eager
    if device.type != "cuda":
        return
    captured = {k: v for k, v in row.items() if k != "peak_mb"} | {"timing": "graph"}
    try:
        todo = repeated(todo)
        replay = graph(todo, hold=p.bytes < 3 * _cache_bytes(device))
        replay()
        yield captured, sampler(device, [replay], len(todo))
    except Exception as error:  # what can't be captured still has its eager time
        alive(device)
        yield captured | {"error": f"capture: {short(error)}"}, None


def _figures(row: dict[str, Any], times: Sequence[float], peaks: Peaks, batch: int) -> dict[str, Any]:
    """What a row's milliseconds come to; a ceiling does one thing."""
    found: dict[str, Any] = {"ms": quantiles(times)}
    ms, impl = found["ms"]["median"], row["impl"]
    if impl not in CEILINGS:
        found["images_per_s"] = rounded(batch / ms * 1e3)
        found["roofline_share"] = rounded(peaks.ms(row["flops"], row["bytes"]) / ms)
    if impl not in ("gemm", "empty"):
        found["gb_per_s"] = rounded(row["bytes"] / ms / 1e6)
    if impl not in ("copy", "empty"):
        found["tflops"] = rounded(row["flops"] / ms / 1e9)
    return found | {"peak_gb_per_s": rounded(peaks.bytes / 1e9), "peak_tflops": rounded(peaks.flops / 1e12)}
