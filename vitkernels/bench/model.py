"""Whole models before and after `fuse`, in turns on the same machine: inference, training, and from the decoder on.

One model is rewired and back between samples: two copies would differ in where their weights lie. What its front end
alone takes is timed in the same rounds, so that the verdict can say what there was to gain.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch

from ..fusing import fuse, unfuse
from .cases import DTYPES, Case
from .memory import peak_bytes
from .model_zoo import MODELS, first_block, inputs, load_model
from .op import settings
from .timing import Step, alive, graph, quantiles, rounded, rounds, sampler, short

__all__ = ["MODELS", "TASKS", "bench_model", "load_model"]
TASKS = ("inference", "training", "pipeline")
# Largest difference of outputs and gradients allowed, of their norm: the tokens' rounding after all blocks of a model.
TOLERANCE = {"fp32": 1e-4, "tf32": 0.02, "fp16": 0.02, "bf16": 0.1}


def bench_model(
    spec: str,
    *,
    batch: int = 8,
    device: torch.device | str = "cpu",
    dtype: str = "fp32",
    backend: str = "auto",
    seconds: float = 3.0,
    mode: str = "inference",
    keep_samples: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """A model before and after `fuse`.

    Args:
        spec: as `load_model` takes it.
        batch, device: images a step, and where.
        dtype: of parameters and images, as `cases.DTYPES` names it.
        backend: of the fused model.
        seconds: of samples, for each row.
        mode: "inference" (no gradients), "training" (forward, backward of a weighted sum, AdamW's step at rate 0,
            so that every step is the same step; parameters in `dtype`, no autocast) or "pipeline"
            (`input_pipeline.bench_pipeline`).
        keep_samples: rows hold their `samples` too, in milliseconds.
        progress: called with what is being done.

    Returns:
        "rows" as benchmarks/results/README.md describes them, impl "before" and "fused", on a GPU in inference with
        timing "graph" too; "report" of `fuse`; "difference", the greatest of the outputs', the tokens' and in training
        the gradients', as a share of their norm; "gain", before / fused in time with its spread; "front_end", what the
        front end alone takes in each: ms, its share of the model's time, temporary MB; "at_most", the gain of a front
        end that takes no time; "verdict" in words. Where they differ by more than `TOLERANCE`, rows have an error
        and no time, and "ok" is False.

    Raises:
        ValueError: no such model, dtype or mode.
    """
    if mode not in TASKS or dtype not in DTYPES:
        raise ValueError(f"mode is one of {', '.join(TASKS)}, dtype of {', '.join(DTYPES)}; got {mode!r} and {dtype!r}")
    device = torch.device(device)
    if mode == "pipeline":
        from .input_pipeline import bench_pipeline

        return bench_pipeline(
            spec, batch=batch, device=device, dtype=dtype, backend=backend, seconds=seconds, keep_samples=keep_samples,
            progress=progress,
        )  # fmt: skip
    progress(f"build {spec}")
    stream: Any = nullcontext()
    if device.type == "cuda":  # a graph is captured on a side stream
        torch.cuda.synchronize(device)
        stream = torch.cuda.stream(torch.cuda.Stream(device))
    try:
        with settings(Case(dtype=dtype)), stream, torch.set_grad_enabled(mode == "training"):
            return _Bench(spec, batch, device, dtype, backend, mode).run(seconds, keep_samples, progress)
    finally:
        gc.collect()
        if device.type == "cuda":
            with suppress(RuntimeError):  # timing.graph says when
                torch.cuda.empty_cache()


class _Reached(Exception):
    """Raised in front of the first block, with the tokens."""


class _Bench:
    def __init__(self, spec: str, batch: int, device: torch.device, dtype: str, backend: str, mode: str):
        torch.manual_seed(0)
        self.spec, self.batch, self.device, self.dtype, self.backend = spec, batch, device, dtype, backend
        self.training = mode == "training"
        model, shape = load_model(spec)
        self.model = model.to(device, DTYPES[dtype]).train(self.training)
        self.images, self.more = inputs(self.model, shape, batch, device, DTYPES[dtype])
        self.block = first_block(self.model)
        self.optimiser = None
        if self.training:
            self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=0.0)
            with torch.no_grad():
                self.weighting = torch.randn(self.call().shape).to(device)
        self.head: dict[str, Any] = {"case": MODELS.get(spec, spec), "mode": mode, "dtype": dtype, "batch": batch}

    # --- What is timed.

    def call(self) -> torch.Tensor:
        out = self.model(self.images, **self.more)
        return out if torch.is_tensor(out) else out[0]

    def loss(self, out: torch.Tensor) -> torch.Tensor:
        """A weighted sum: of squares there would be no gradient, where a LayerNorm comes last."""
        return (out.float() * self.weighting).sum() / self.batch

    def whole(self) -> torch.Tensor | None:
        """One step of inference or training; gradients are gone at its end, so that the next needs their memory too."""
        out = self.call()
        if self.optimiser is None:
            return out
        self.loss(out).backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return None

    def tokens(self) -> torch.Tensor:
        """The model as far as its first block; tokens [B,T+N,D]."""
        try:
            self.model(self.images, **self.more)
        except _Reached as reached:
            return reached.args[0]
        raise ValueError(f"{self.spec} ran through without a call of its first block")

    def front(self) -> torch.Tensor | None:
        tokens = self.tokens()
        if not self.training:
            return tokens
        torch.autograd.grad(tokens, self.leaves, tokens.detach())
        return None

    @contextmanager
    def stopped(self) -> Iterator[None]:
        def reached(module, args, kwargs):
            raise _Reached(args[0] if args else next(iter(kwargs.values())))

        assert self.block is not None
        handle = self.block.register_forward_pre_hook(reached, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def wired(self, fused: bool) -> Iterator[None]:
        if fused:
            fuse(self.model, backend=self.backend)
        try:
            yield
        finally:
            unfuse(self.model)

    def timer(self, step: Step, fused: bool, stop: bool) -> Callable[[], float]:
        """Samples of 20 ms on a CPU, 100 on a GPU, or of ten steps, each behind a step to warm what rewiring cooled."""
        with self.wired(fused), self.stopped() if stop else nullcontext():
            step()
            alive(self.device)
            begin = time.perf_counter()
            step()
            alive(self.device)
            took = time.perf_counter() - begin
        repeat = max(1, min(10, round((0.1 if self.device.type == "cuda" else 0.02) / took)))
        timed = sampler(self.device, [step] * repeat, repeat)

        def sample() -> float:
            with self.wired(fused), self.stopped() if stop else nullcontext():
                if took < 0.2:
                    step()
                return timed()

        return sample

    # --- What is compared.

    def results(self) -> list[list[torch.Tensor]]:
        """[outputs], [tokens] and in training [gradients]; the same random numbers at every call."""
        torch.manual_seed(1)
        out = self.call()
        found = [[out.detach()]]
        if self.block is not None:  # outputs of an untrained model may hardly feel its tokens, where a LayerScale is
            torch.manual_seed(1)
            with self.stopped():
                found.append([self.tokens().detach()])
        if self.optimiser is not None:
            self.loss(out).backward()
            found.append([p.grad for p in self.model.parameters() if p.grad is not None])
            self.optimiser.zero_grad()
        return found

    def difference(self) -> float:
        plain = self.results()
        with self.wired(True):
            fused = self.results()
        return max(_difference(a, b) for a, b in zip(fused, plain, strict=True))

    # --- All of it.

    def run(self, seconds: float, keep_samples: bool, progress: Callable[[str], None]) -> dict[str, Any]:
        progress(f"{self.spec}: check")
        report = fuse(self.model, backend=self.backend)
        unfuse(self.model)
        difference = self.difference()
        result: dict[str, Any] = {"report": str(report), "difference": difference}
        rows: list[dict[str, Any]] = [
            self.head | {"impl": impl, "timing": "eager", "ms": None, "bytes": None, "flops": None,
                         "roofline_share": None}
            for impl in ("before", "fused")
        ]  # fmt: skip
        if not difference <= TOLERANCE[self.dtype]:
            error = f"results differ by {difference:.2g} of their norm, above {TOLERANCE[self.dtype]:.2g}"
            verdict = f"Not timed: {error}."
            return result | {"rows": [row | {"error": error} for row in rows], "verdict": verdict, "ok": False}

        timers = []
        fronts: dict[str, dict[str, Any]] = {}
        for row in rows:
            fused = row["impl"] == "fused"
            progress(f"{self.spec} {row['impl']}: warm")
            timers.append(self.timer(self.whole, fused, False))
            with self.wired(fused):
                row["peak_mb"] = rounded(peak_bytes(self.whole, self.device) / 1e6)
        if self.block is not None:
            self.leaves = self._leaves()
            for impl in ("before", "fused"):
                timers.append(self.timer(self.front, impl == "fused", True))
                with self.wired(impl == "fused"), self.stopped():
                    fronts[impl] = {"peak_mb": rounded(peak_bytes(self.front, self.device) / 1e6)}
        if self.device.type == "cuda" and not self.training:
            rows += self._graphs(rows, timers)

        progress(f"{self.spec}: time")
        samples = iter(rounds(timers, seconds, least=5))
        times = {(row["impl"], "eager"): next(samples) for row in rows[:2]}
        for front in fronts.values():
            front["ms"] = quantiles(next(samples))
        times |= {(row["impl"], "graph"): next(samples) for row in rows[2:] if "error" not in row}
        for row in rows:
            found = times.get((row["impl"], row["timing"]))
            if found is None:
                continue
            row["ms"] = quantiles(found)
            row["images_per_s"] = rounded(self.batch / statistics.median(found) * 1e3)
            if first := times.get(("before", row["timing"])):
                row["ratio"] = quantiles([t / b for t, b in zip(found, first, strict=True)])
            if keep_samples:
                row["samples"] = found
        for row in rows[:2]:
            if row["impl"] in fronts:
                front = fronts[row["impl"]]
                front["share"] = rounded(min(1.0, front["ms"]["median"] / row["ms"]["median"]))
        before, after = times["before", "eager"], times["fused", "eager"]
        result |= {"rows": rows, "gain": quantiles([b / a for b, a in zip(before, after, strict=True)])}
        if fronts:
            result |= {"front_end": fronts, "at_most": rounded(1 / max(1e-3, 1 - fronts["before"]["share"]))}
        return result | {"verdict": _verdict(result, bool(report.fused))}

    def _leaves(self) -> list[torch.Tensor]:
        """The parameters that the front end learns."""
        if not self.training:
            return []
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        with self.stopped():
            tokens = self.tokens()
        gradients = torch.autograd.grad(tokens, parameters, tokens.detach(), allow_unused=True)
        return [p for p, g in zip(parameters, gradients, strict=True) if g is not None]

    def _graphs(self, rows: list[dict[str, Any]], timers: list[Callable[[], float]]) -> list[dict[str, Any]]:
        """Rows of the same steps replayed from CUDA graphs; what can't be captured says why."""
        found = []
        for row in rows:
            captured = row | {"timing": "graph"}
            found.append(captured)
            try:
                with self.wired(row["impl"] == "fused"):
                    replay = graph([self.whole], hold=False)
                replay()
                timers.append(sampler(self.device, [replay] * 10, 10))
            except Exception as error:
                captured["error"] = f"capture: {short(error)}"
                alive(self.device)
        return found


def _difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """The norm of a - b, as a share of the norm of b."""
    apart = sum((x.double() - y.double()).square().sum().item() for x, y in zip(a, b, strict=True))
    return (apart / max(sum(y.double().square().sum().item() for y in b), 1e-300)) ** 0.5


def _verdict(result: dict[str, Any], fused: bool) -> str:
    gain, fronts = result["gain"], result.get("front_end")
    spread = f"{gain['median']:.3f} x, {gain['p20']:.3f} to {gain['p80']:.3f}"
    if not fused:
        return "Nothing to gain: fuse found no front end that it knows."
    if gain["p20"] <= 1 <= gain["p80"]:
        text = f"No gain to be measured ({spread})."
    elif gain["median"] < 1:
        text = f"Fusing makes this model slower here ({spread})."
    else:
        text = f"{gain['median']:.3f} x the images a second ({gain['p20']:.3f} to {gain['p80']:.3f})."
    if fronts:
        shares = [fronts[impl]["share"] for impl in ("before", "fused")]
        text += (
            f" The front end took {shares[0]:.1%} of the time before and takes {shares[1]:.1%} now: one that takes no"
            f" time would make the model {result['at_most']:.3f} x as fast."
        )
    return text
