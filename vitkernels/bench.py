"""Time the operation beside what it replaces and beside the device's ceilings, in one process, in turns.

An implementation is first held to the accuracy rule; one that breaks it gets an `error` and no time. Every sample
uses input sets whose total does not fit the cache. All implementations of a case are sampled in rounds, one after
the other, so that a drift of the clock meets them all and `ratio` compares within a round.
"""

from __future__ import annotations

import gc
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import __version__, dispatch, roofline, verify
from .functional import explain, patch_embed
from .peers import PEERS, conv
from .problem import PatchProblem

Call = dict[str, Any]  # the keyword arguments of patch_embed
Step = Callable[[], Any]
MODES = ("forward", "backward", "both")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
PIXELS = {"uint8": torch.uint8, **DTYPES}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A shape to time: `batch` images of `chans` channels, square in `image` and `patch` (or (height, width))."""

    batch: int = 256
    image: int | tuple[int, int] = 224
    patch: int | tuple[int, int] = 16
    dim: int = 768
    dtype: str = "bf16"  # of the weights and tokens; "tf32" is fp32 with products allowed in TF32
    pixels: str | None = None  # default: as dtype. uint8 pixels are normalised with ImageNet's mean and std
    prefix: int = 1
    keep: float | None = None  # share of the patches that are embedded
    frames: int | None = None  # video, in tubelets of `tubelet` frames
    tubelet: int = 2
    chans: int = 3
    channels_last: bool = False

    @property
    def name(self) -> str:
        image, patch = ("x".join(map(str, _pair(v))) if v != _pair(v)[0] else str(v) for v in (self.image, self.patch))
        parts = [f"B{self.batch}", image, f"P{patch}", f"D{self.dim}", self.dtype]
        if self.frames is not None:
            parts[1] = f"{self.frames}f{image}"
            parts[2] = f"P{self.tubelet}x{patch}"
        if self.pixels not in (None, self.dtype):
            parts.append(str(self.pixels))
        if self.chans != 3:
            parts.append(f"C{self.chans}")
        if self.prefix != 1:
            parts.append(f"T{self.prefix}")
        if self.keep is not None:
            parts.append(f"keep{self.keep:g}")
        return "-".join(parts + ["hwc"] * self.channels_last)

    def call(self, device: torch.device | str, seed: int = 0) -> Call:
        """Fresh random arguments of patch_embed, of the magnitudes of a trained model."""
        g = torch.Generator(device).manual_seed(seed)
        video = self.frames is not None
        time_ = () if self.frames is None else ((self.frames, self.tubelet),)
        size, patch = zip(*time_, *zip(_pair(self.image), _pair(self.patch), strict=True), strict=True)
        N, K = 1, self.chans
        for s, P in zip(size, patch, strict=True):
            N, K = N * (s // P), K * P
        dtype = DTYPES[self.dtype]
        random = partial(torch.randn, generator=g, device=device)

        shape = (self.batch, self.chans, *size)
        if self.pixels == "uint8":
            images = torch.randint(256, shape, dtype=torch.uint8, generator=g, device=device)
        else:
            images = random(shape).to(PIXELS[self.pixels or self.dtype])
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last_3d if video else torch.channels_last)
        call: Call = {
            "images": images,
            "weight": (random(self.dim, self.chans, *patch) / K**0.5).to(dtype),
            "bias": (random(self.dim) / 10).to(dtype),
            "pos_embed": (random(self.prefix + N, self.dim) / 10).to(dtype),
            "prefix": (random(self.prefix, self.dim) / 10).to(dtype) if self.prefix else None,
        }
        if self.pixels == "uint8":
            call |= IMAGENET if self.chans == 3 else {"mean": 0.5, "std": 0.25}
        if self.keep is not None:
            order = torch.rand(self.batch, N, generator=g, device=device).argsort(1)
            call["keep"] = order[:, : max(1, round(N * self.keep))]
        return call


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def problem(call: Call) -> PatchProblem:
    return explain(**call).problem


OURS = ("auto", *dispatch.MODULES)
CEILINGS = ("copy", "gemm", "empty")


def default_impls(call: Call, *, compiled: bool | None = None) -> list[str]:
    """auto, the other backends that would run, the peers, the ceilings. `compiled`: by default on a GPU only, as it
    takes up to a minute a case."""
    why = explain(**call)
    gpu = call["images"].is_cuda
    others = [name for name, reasons in why.items() if not reasons and name not in (why.chosen, "reference")]
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
    names = ("weight", "bias", "pos_embed", "prefix")
    if impl not in PEERS:
        embed = impl if callable(impl) else partial(patch_embed, backend=impl)
        ours = [call | {name: _leaf(call.get(name), grad) for name in names} for call in calls]
        return [(partial(embed, **c), [c[n] for n in names if c[n] is not None]) for c in ours]
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
        tensors: dict[str, Any] = {name: call.get(name) for name in names}
        if impl == "conv_channels_last":  # the weight as model.to(memory_format=...) leaves it
            memory_format = torch.channels_last_3d if p.video else torch.channels_last
            tensors["weight"] = tensors["weight"].contiguous(memory_format=memory_format)
            function = partial(conv, memory_format=memory_format)
        tensors = {name: _leaf(t, grad) for name, t in tensors.items()}
        step = partial(function, call["images"], *tensors.values(), call.get("keep"), a, b)
        result.append((step, [t for t in tensors.values() if t is not None]))
    return result


def ceiling_steps(impl: str, calls: Sequence[Call], mode: str) -> list[Step]:
    """copy: the bytes of `roofline.work`, half read and half written; gemm: the bare product; empty: a tiny launch."""
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
    """Run once on the whole problem; why the result (or a gradient) can't be accepted by verify's rule, or None.

    What is compared are three images of the batch: their tokens, and the gradients of a loss of these tokens alone.
    """
    p = problem(call)
    index = sorted({0, p.B // 2, p.B - 1})
    part = call | {name: call[name][index] for name in ("images", "keep") if call.get(name) is not None}
    exact = {k: v.double() if k not in ("images", "keep") and torch.is_tensor(v) else v for k, v in part.items()}
    grad = mode != "forward"
    with torch.set_grad_enabled(grad):
        torch.full(p.out_shape, torch.nan, dtype=p.out_dtype, device=p.device)  # poison: the next output lies here
        [(step, leaves)] = steps(impl, [call], grad)
        out = step()
        [(eager_step, eager_leaves)], [(true_step, true_leaves)] = (
            steps(verify.eager, [part], grad),
            steps(verify.oracle, [exact], grad),
        )
        eager, true = eager_step(), true_step()
    if out.shape != p.out_shape or out.dtype != p.out_dtype:
        return f"result is {list(out.shape)} {out.dtype}, wanted {list(p.out_shape)} {p.out_dtype}"
    if not out.isfinite().all():
        return "result is not finite"
    results = {"tokens": (out[index], eager, true)}
    if grad:
        weighting = torch.randn(eager.shape, generator=torch.Generator().manual_seed(1)).to(out)
        whole = torch.zeros_like(out).index_copy(0, torch.tensor(index, device=p.device), weighting)
        names = [n for n in ("weight", "bias", "pos_embed", "prefix") if call.get(n) is not None]
        grads = (
            torch.autograd.grad(out, leaves, whole),
            torch.autograd.grad(eager, eager_leaves, weighting),
            torch.autograd.grad(true, true_leaves, weighting.double()),
        )
        results |= {f"gradient of {name}": values for name, values in zip(names, zip(*grads, strict=True), strict=True)}
    for name, (ours, theirs, truth) in results.items():
        error, eager_error = ((t.detach().double() - truth).abs().max().item() for t in (ours, theirs))
        rounding = torch.finfo(ours.dtype).eps / 2 + torch.finfo(torch.float32).eps  # of the result, of the sum
        bound = 2 * eager_error + rounding * truth.abs().max().item()
        if not error <= bound:
            return f"{name}: error {error:.3g} above {bound:.3g}"
    return None


# --- The clock.


def _modal(mode: str, step: Step, leaves: list[torch.Tensor], grad: torch.Tensor | None) -> Step:
    if mode == "forward":
        return step
    if mode == "both":
        return lambda: torch.autograd.grad(step(), leaves, grad)
    out = step()
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def _cache_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 32 << 20


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


def _graph(todo: list[Step], hold: bool) -> Step:
    """Capture all of `todo` in one CUDA graph. `hold`: outputs keep their own memory, so that writes are cold too."""
    graph = torch.cuda.CUDAGraph()
    held = []
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for step in todo:
            out = step()
            if hold:
                held.append(out)
    return graph.replay


def alive(device: torch.device) -> None:
    """Raise where an error has left the device unusable, so that it isn't reported as everybody's error."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def short(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0][:300]}"


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
    progress: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Rows of one case and mode, one per implementation and timing ("eager", on a GPU also "graph").

    `seconds` is the time for samples, per implementation. `impls`: backends, names of PEERS and of CEILINGS; by
    default `default_impls`. The first one is what every `ratio` refers to: (this time / its time), per round.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    stream: Any = nullcontext()
    if device.type == "cuda":  # one side stream for all, as a captured backward runs on its forward's stream
        torch.cuda.synchronize(device)
        stream = torch.cuda.stream(torch.cuda.Stream(device))
    with settings(case), stream, torch.set_grad_enabled(mode != "forward"):
        try:
            return _bench(case, device, mode, impls, seconds, compiled, progress)
        finally:
            if any(name.startswith("compile") for name in impls or PEERS):
                torch._dynamo.reset()  # it stops at eight versions of a function, and every case makes more
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _bench(case, device, mode, impls, seconds, compiled, progress) -> list[dict[str, Any]]:
    calls = [case.call(device)]
    p = problem(calls[0])
    impls = default_impls(calls[0], compiled=compiled) if impls is None else impls
    if unknown := [name for name in impls if name not in (*OURS, *PEERS, *CEILINGS)]:
        raise ValueError(f"no implementation {unknown}; there are {', '.join((*OURS, *PEERS, *CEILINGS))}")
    sets = min(128 if p.device.type == "cuda" else 32, max(2, -(-3 * _cache_bytes(device) // p.bytes)))
    calls += [case.call(device, seed) for seed in range(1, sets)]
    flops, bytes_ = roofline.work(p, mode)
    peaks = roofline.peaks(device, p.compute_dtype, case.dtype == "tf32")
    grad = None if mode == "forward" else torch.randn(p.out_shape, device=device).to(p.out_dtype)

    rows: list[dict[str, Any]] = []
    lanes: list[tuple[dict[str, Any], Callable[[], float]]] = []
    for impl in impls:
        progress(f"{case.name} {mode} {impl}: check")
        head = {"case": case.name, "mode": mode, "dtype": case.dtype, "impl": impl}
        tail = {"bytes": bytes_, "flops": flops, "roofline_share": None}
        row = head | {"ms": None, "timing": "eager"} | tail
        rows.append(row)
        try:
            if impl in CEILINGS:
                todo = ceiling_steps(impl, calls, mode)
            else:
                if impl == "auto":
                    row["backend"] = explain(**calls[0]).chosen
                if error := gate(impl, calls[0], mode):
                    row["error"] = error
                    continue
                todo = [_modal(mode, *made, grad) for made in steps(impl, calls, mode != "forward")]
            for step in todo[:2]:  # warm: compilers, cuDNN's search, pools
                step()
            alive(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
                todo[0]()
                row["peak_mb"] = round((torch.cuda.max_memory_allocated(device) - before) / 1e6, 1)
                todo = [todo[i % sets] for i in range(max(sets, 10))]  # an idle device's first launch counts little
            lanes.append((row, sampler(device, todo, len(todo)) if device.type == "cuda" else _cpu_sampler(todo)))
            if device.type == "cuda":
                extra = {k: v for k, v in row.items() if k != "peak_mb"} | {"timing": "graph"}
                rows.append(extra)
                try:
                    replay = _graph(todo, hold=p.bytes < 3 * _cache_bytes(device))
                    replay()
                    lanes.append((extra, sampler(device, [replay], len(todo))))
                except Exception as error:  # what can't be captured still has its eager time
                    extra["error"] = f"capture: {short(error)}"
                    alive(device)
        except Exception as error:
            row["error"] = short(error)
            alive(device)

    progress(f"{case.name} {mode}: time")
    samples = rounds([sample for _, sample in lanes], seconds)
    first: dict[str, list[float]] = {}
    for (row, _), times in zip(lanes, samples, strict=True):
        row["ms"] = quantiles(times)
        if row["impl"] not in CEILINGS:
            row["images_per_s"] = round(case.batch / row["ms"]["median"] * 1e3, 1)
            row["roofline_share"] = roofline.share(p, mode, peaks, row["ms"]["median"])
        reference = first.setdefault(row["timing"], times) if row["impl"] == impls[0] else first.get(row["timing"])
        if reference:
            row["ratio"] = statistics.median(t / r for t, r in zip(times, reference, strict=True))
    return rows


def _cpu_sampler(todo: list[Step]) -> Callable[[], float]:
    """A few calls a sample, the sets in turn; a sample of less than 2 ms would time the timer's neighbours."""
    begin = time.perf_counter()
    todo[0]()
    repeat = max(1, min(len(todo), int(2e-3 / (time.perf_counter() - begin))))
    position = 0

    def sample() -> float:
        nonlocal position
        chosen = [todo[(position + i) % len(todo)] for i in range(repeat)]
        position += repeat
        return sampler(torch.device("cpu"), chosen, repeat)()

    return sample


def rounds(samplers: list[Callable[[], float]], seconds: float, least: int = 7, most: int = 200) -> list[list[float]]:
    """Sample all in turns, until `seconds` a sampler have gone."""
    times: list[list[float]] = [[] for _ in samplers]
    begin = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - begin > seconds * len(samplers):
            break
        for sample, list_ in zip(samplers, times, strict=True):
            list_.append(sample())
    return times


def quantiles(times: Sequence[float]) -> dict[str, float]:
    """median, p20 and p80, rounded to five digits."""
    cuts = statistics.quantiles(times, n=5, method="inclusive")
    values = {"median": statistics.median(times), "p20": cuts[0], "p80": cuts[3]}
    return {name: float(f"{value:.5g}") for name, value in values.items()}


def header(device: torch.device | str, command: str) -> dict[str, Any]:
    """What every figure must carry: device, driver, versions, commit, command."""
    device = torch.device(device)
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    root = Path(__file__).resolve().parents[1]
    commit = _output("git", "-C", str(root), "rev-parse", "--short", "HEAD") if (root / ".git").exists() else None
    if commit and _output("git", "-C", str(root), "status", "--porcelain"):
        commit += "+changes"
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "gpu": gpu,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "cpu": f"{_cpu_name()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "triton": triton_version,
        "vitkernels": __version__,
        "commit": commit,
        "command": command,
    }


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
