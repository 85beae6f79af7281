"""Time the operation beside what it replaces and beside the device's ceilings, in one process, in turns.

An implementation is first held to the accuracy rule; one that breaks it gets an `error` and no time. Every sample
uses input sets whose total does not fit the cache. All implementations of a case are sampled in rounds, one after
the other, so that a drift of the clock meets them all and `ratio` compares within a round.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import cost_model, dispatch
from ..functional import explain, patch_embed
from ..problem import PatchProblem
from ..testing import verify
from .baselines import PEERS, conv
from .cases import Call, Case
from .memory import peak_bytes
from .peaks import peaks as peaks_of
from .revisions import Other
from .timing import Step, alive, graph, modal, quantiles, repeated, rounded, rounds, sampler, sampler_of, short

MODES = ("forward", "backward", "both")
LEARNT = ("weight", "bias", "pos_embed", "prefix")


def problem(call: Call) -> PatchProblem:
    return explain(**call).problem


OURS = ("auto", *dispatch.MODULES)
CEILINGS = ("copy", "gemm", "empty")


def default_impls(call: Call, *, compiled: bool | None = None) -> list[str]:
    """auto, the other backends that would run, the peers, the ceilings. `compiled`: by default on a GPU only, as it
    takes up to a minute a case."""
    why = explain(**call)
    gpu = call["images"].is_cuda
    always = {name for name, _ in why.auto.values()}  # by `auto`, if it is one
    others = [name for name, reasons in why.items() if not reasons and {name} != always and name != "reference"]
    peers = [
        name
        for name in PEERS
        if not name.startswith("compile") or ((gpu if compiled is None else compiled) and (gpu or name[-3:] != "max"))
    ]
    if not gpu and call["weight"].ndim == 5 and call["weight"].dtype.itemsize == 2:
        peers = [name for name in peers if "conv" not in name]  # conv3d of halves writes past its buffers on a CPU
    return ["auto", *(others if gpu else ()), *peers, *CEILINGS]


def _leaf(t: torch.Tensor | None, grad: bool) -> torch.Tensor | None:
    return t if t is None or not grad else t.detach().requires_grad_()


def steps(impl: str | Callable, calls: Sequence[Call], grad: bool = False) -> list[tuple[Step, list[torch.Tensor]]]:
    """Per call: images in, tokens out, ready to be timed; and the parameters that want gradients.

    `impl` is a backend, one of PEERS, or a function with patch_embed's arguments.
    """
    if impl not in PEERS:
        embed = impl if callable(impl) else partial(patch_embed, backend=impl)
        ours = [call | {name: _leaf(call.get(name), grad) for name in LEARNT} for call in calls]
        return [(partial(embed, **c), [c[n] for n in LEARNT if c[n] is not None]) for c in ours]
    function = PEERS[impl]()
    result: list[tuple[Step, list[torch.Tensor]]] = []
    for call in calls:
        p = problem(call)
        a = b = None
        if p.normalised or p.scale != 1:  # folded: y = a·x + b
            a, b = (
                torch.tensor(v, dtype=p.compute_dtype, device=p.device).view(-1, *(1,) * (call["images"].ndim - 2))
                for v in p.affine
            )
        tensors: dict[str, Any] = {name: call.get(name) for name in LEARNT}
        if impl == "conv_channels_last":  # the weight as model.to(memory_format=...) leaves it
            memory_format = torch.channels_last_3d if p.video else torch.channels_last
            tensors["weight"] = tensors["weight"].contiguous(memory_format=memory_format)
            function = partial(conv, memory_format=memory_format)
        tensors = {name: _leaf(t, grad) for name, t in tensors.items()}
        step = partial(function, call["images"], *tensors.values(), call.get("keep"), a, b)
        result.append((step, [t for t in tensors.values() if t is not None]))
    return result


def ceiling_steps(impl: str, calls: Sequence[Call], mode: str) -> list[Step]:
    """copy: the bytes of `cost_model.work`, half read, half written; gemm: the bare product; empty: a tiny launch."""
    p = problem(calls[0])
    times = 2 if mode == "both" else 1
    new = partial(torch.empty, device=p.device)
    result: list[Step] = []
    for _ in calls:
        if impl == "copy":
            half = new(times * p.bytes // 2, dtype=torch.uint8).fill_(7)
            result.append(partial(torch.empty_like(half).copy_, half))
        elif impl == "gemm":
            x, w, y = (
                new(shape, dtype=p.compute_dtype).normal_()
                for shape in ((p.B * p.rows, p.K), (p.D, p.K), (p.B * p.rows, p.D))
            )
            forward: Step = partial(torch.mm, x, w.t(), out=y)
            backward: Step = partial(torch.mm, y.t(), x)
            result.append({"forward": forward, "backward": backward}.get(mode) or partial(_each, forward, backward))
        else:
            result.append(new(1).zero_)
    return result


def _each(*steps: Step) -> None:
    for step in steps:
        step()


# --- The gate.


def gate(impl: str | Callable, call: Call, mode: str = "forward") -> str | None:
    """Run once on the whole problem; why the result (or a gradient) can't be accepted by verify's rule, or None."""
    p, grad = problem(call), mode != "forward"
    with torch.set_grad_enabled(grad):
        torch.full(p.out_shape, torch.nan, dtype=p.out_dtype, device=p.device)  # poison: the next output lies here
        [(step, leaves)] = steps(impl, [call], grad)
        out = step()
        grads = torch.autograd.grad(out, leaves, probe(p)) if grad else ()
    return judged(call, out, grads)


def _looked_at(p: PatchProblem) -> list[int]:
    return sorted({0, p.B // 2, p.B - 1})


def probe(p: PatchProblem) -> torch.Tensor:
    """The tokens' gradient of a loss of the images that are looked at alone, [B, T+N, D]."""
    index = torch.tensor(_looked_at(p), device=p.device)
    part = torch.randn((len(index), *p.out_shape[1:]), generator=torch.Generator().manual_seed(1))
    whole = torch.zeros(p.out_shape, dtype=p.out_dtype, device=p.device)
    return whole.index_copy_(0, index, part.to(whole))


def judged(call: Call, out: torch.Tensor, grads: Sequence[torch.Tensor]) -> str | None:
    """Why tokens, and gradients of `probe`, break the rule; what is compared are three images of the batch."""
    p = problem(call)
    if out.shape != p.out_shape or out.dtype != p.out_dtype:
        return f"result is {list(out.shape)} {out.dtype}, wanted {list(p.out_shape)} {p.out_dtype}"
    if not out.isfinite().all():
        return "result is not finite"
    index = _looked_at(p)
    part = call | {name: call[name][index] for name in ("images", "keep") if call.get(name) is not None}
    exact = {k: v.double() if k not in ("images", "keep") and torch.is_tensor(v) else v for k, v in part.items()}
    with torch.set_grad_enabled(bool(grads)):
        [(eager_step, eager_leaves)] = steps(verify.eager, [part], bool(grads))
        [(true_step, true_leaves)] = steps(verify.oracle, [exact], bool(grads))
        eager, true = eager_step(), true_step()
        results = {"tokens": (out[index], eager, true)}
        if grads:
            weighting = probe(p)[index]
            theirs = torch.autograd.grad(eager, eager_leaves, weighting)
            truths = torch.autograd.grad(true, true_leaves, weighting.double())
            names = [n for n in LEARNT if call.get(n) is not None]
            for name, *values in zip(names, grads, theirs, truths, strict=True):
                results[f"gradient of {name}"] = (values[0], values[1], values[2])
    for name, (ours, others, truth) in results.items():
        error, eager_error = ((t.detach().double() - truth).abs().max().item() for t in (ours, others))
        rounding = torch.finfo(ours.dtype).eps / 2 + torch.finfo(torch.float32).eps  # of the result, of the sum
        bound = 2 * eager_error + rounding * truth.abs().max().item()
        if not error <= bound:
            return f"{name}: error {error:.3g} above {bound:.3g}"
    return None


# --- The clock.


def _cache_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 32 << 20


@contextmanager
def settings(case: Case):
    """TF32 as the case says, cuDNN free to search, as a careful user has it; what was set before comes back."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = case.dtype == "tf32"
        cudnn.benchmark = True
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
        mode: "forward", "backward" (the gradients of weight, bias, position and prefix alone) or "both".
        impls: backends, names of PEERS and of CEILINGS; by default `default_impls`. The first is what every `ratio`
            refers to: this time / its time, the median over rounds, with its spread.
        seconds: time for samples, per implementation.
        compiled: whether torch.compile is among the default peers; by default on a GPU.
        against: name -> folder of another version of the package, whose `auto` is sampled in the same rounds (eagerly)
            as the implementation "auto@name": bench_against.py.
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
                with suppress(RuntimeError):  # clock.graph says when
                    torch.cuda.empty_cache()


def _bench(
    case, device, mode, impls, seconds, compiled, keep_samples, against, others, progress
) -> list[dict[str, Any]]:
    calls = [case.call(device)]
    p = problem(calls[0])
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
    rows: list[dict[str, Any]] = []
    lanes: list[tuple[dict[str, Any], Callable[[], float]]] = []
    for impl in impls:
        progress(f"{case.name} {mode} {impl}: check")
        row = common | {"impl": impl}
        rows.append(row)
        try:
            if impl in CEILINGS:
                todo = ceiling_steps(impl, calls, mode)
            else:
                if impl == "auto":
                    row["backend"] = explain(**calls[0]).takes(mode)
                if wrong := gate(impl, calls[0], mode):
                    row["error"] = wrong
                    continue
                todo = [modal(mode, *made, grad) for made in steps(impl, calls, mode != "forward")]
            for step in todo[:2]:  # warm: compilers, cuDNN's search, pools
                step()
            alive(device)
            if impl not in CEILINGS:
                row["peak_mb"] = rounded(peak_bytes(todo[0], device) / 1e6)
            first = len(lanes) * sets // len(impls) % sets  # in a round, nobody warms the inputs of the next
            lanes.append((row, sampler_of(device, todo[first:] + todo[:first])))
            if device.type != "cuda":
                continue
            captured = {k: v for k, v in row.items() if k != "peak_mb"} | {"timing": "graph"}
            rows.append(captured)
            try:
                todo = repeated(todo)
                replay = graph(todo, hold=p.bytes < 3 * _cache_bytes(device))
                replay()
                lanes.append((captured, sampler(device, [replay], len(todo))))
            except Exception as error:  # what can't be captured still has its eager time
                captured["error"] = f"capture: {short(error)}"
                alive(device)
        except Exception as error:
            row["error"] = short(error)
            alive(device)

    for name, folder in (against or {}).items():
        progress(f"{case.name} {mode} auto@{name}: check")
        row = common | {"impl": f"auto@{name}"}
        rows.append(row)
        try:
            other = others.enter_context(
                closing(Other(folder, case, mode=mode, device=device, sets=sets, grad=grad, probe=probe(p)))
            )
            if wrong := judged(calls[0], other.tokens, other.grads):
                row["error"] = wrong
            else:
                lanes.append((row, other.sample))
        except (RuntimeError, OSError) as error:
            row["error"] = short(error)

    progress(f"{case.name} {mode}: time")
    samples = rounds([sample for _, sample in lanes], seconds)
    bases: dict[str, list[float]] = {}
    for (row, _), times in zip(lanes, samples, strict=True):
        row["ms"] = quantiles(times)
        if keep_samples:
            row["samples"] = times
        ms = row["ms"]["median"]
        if row["impl"] not in CEILINGS:
            row["images_per_s"] = rounded(case.batch / ms * 1e3)
            row["roofline_share"] = rounded(peaks.ms(flops, bytes_) / ms)
        if row["impl"] not in ("gemm", "empty"):
            row["gb_per_s"] = rounded(bytes_ / ms / 1e6)
        if row["impl"] not in ("copy", "empty"):
            row["tflops"] = rounded(flops / ms / 1e9)
        row["peak_gb_per_s"], row["peak_tflops"] = rounded(peaks.bytes / 1e9), rounded(peaks.flops / 1e12)
        base = bases.setdefault(row["timing"], times) if row["impl"] == impls[0] else bases.get(row["timing"])
        if base:
            row["ratio"] = quantiles([t / b for t, b in zip(times, base, strict=True)])
    return rows
