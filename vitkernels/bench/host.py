"""What a call costs the host: Python, PyTorch's dispatcher, the allocation of the tokens, and a launch.

Nobody waits for a GPU here, so there a call's time is the host's. Without one the launch is a stub that returns at
once: what is timed is all that comes before it, for the tensors of a tiny problem in 16 bits. (The launch alone took
csrc 10.7 µs and Triton 37.5 on an H200's machine, when it bound the arguments: results/nvidia-h200/host-cost.txt.)
Beside it stand F.linear, what timm does eagerly, and an operator that does nothing but allocate the tokens; these in
float32 on a CPU, where they do multiply, and where a product in 16 bits costs the host oneDNN's preparations.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from .. import dispatch
from ..backends import cuda
from ..backends.cuda import extension
from ..backends.triton import config_cache, launch
from ..calls import call_of
from ..functional import patch_embed
from .baselines import conv
from .cases import Call, Case
from .implementations import LEARNT, problem
from .timing import rounded

CALLS, ROUNDS = 50, 60
TINY = Case(batch=1, image=16, patch=8, dim=16, dtype="bf16")
MODES = ("inference", "training", "backward")  # a call that records nothing, one that does, and its backward
KERNELS = ("cuda", "triton")


def host(device: torch.device | str = "cpu", case: Case = TINY, *, keep_samples: bool = False) -> list[dict[str, Any]]:
    """Microseconds of the host for a call, by mode; the least of 60 samples of 50 calls, all sampled in turns, as
    whatever else the machine does only adds.

    Returns:
        [{"mode": one of MODES or "piece" (of a call without gradients), "impl", "us", "stub" (whether the launch is
        one), "ratio" (to F.linear's in this mode; None of a piece), "samples" where they are asked for}]
    """
    device = torch.device(device)
    with stubs() if device.type == "cpu" else nullcontext():
        call = case.call(device)
        names = [name for name in KERNELS if not dispatch.why_not(problem(call), name)]
        rows: list[dict[str, Any]] = []
        for mode in (*MODES, "piece"):
            todo = _pieces(call, names) if mode == "piece" else _calls(call, names, mode)
            with torch.inference_mode(mode in ("inference", "piece")):
                for impl, samples in _sampled(todo, device).items():
                    stub = device.type == "cpu" and impl.split()[0] in KERNELS
                    row = {"mode": mode, "impl": impl, "us": rounded(min(samples)), "stub": stub}
                    rows.append(row | ({"samples": samples} if keep_samples else {}))
    linear = {row["mode"]: row["us"] for row in rows if row["impl"] == "F.linear"}
    return [
        row | {"ratio": rounded(row["us"] / linear[row["mode"]]) if row["mode"] in linear else None} for row in rows
    ]


def _calls(call: Call, names: list[str], mode: str) -> dict[str, Callable[[], Any]]:
    p = problem(call)
    theirs = {name: t.float() if p.on_cpu else t for name, t in call.items() if t is not None}
    call, theirs = (
        given | {name: given[name].detach().requires_grad_(mode != "inference") for name in LEARNT if name in given}
        for given in (call, theirs)
    )
    ours, theirs_learnt = (tuple(given[name] for name in LEARNT) for given in (call, theirs))
    kernel, bias, pos_embed, prefix = theirs_learnt
    x = torch.randn(p.B * p.N, p.K, device=p.device, dtype=kernel.dtype)
    weight = kernel.detach().flatten(1).clone().requires_grad_(mode != "inference")
    todo: dict[str, Callable[[], Any]] = {name: partial(patch_embed, **call, backend=name) for name in names}
    of = dict.fromkeys(todo, ours) | {"F.linear": (weight, bias), "timm eagerly": theirs_learnt}
    todo["F.linear"] = partial(F.linear, x, weight, bias)
    todo["timm eagerly"] = partial(conv, theirs["images"], kernel, bias, pos_embed, prefix, None, None, None)
    if mode == "backward":
        return {name: _backward(step(), of[name]) for name, step in todo.items()}
    return todo | {"empty operator": partial(torch.ops.aten.new_empty, x, p.out_shape)}


def _backward(out: torch.Tensor, leaves: tuple[torch.Tensor, ...]) -> Callable[[], Any]:
    return partial(torch.autograd.grad, out, leaves, torch.ones_like(out), retain_graph=True)


def _pieces(call: Call, names: list[str]) -> dict[str, Callable[[], Any]]:
    """The steps of a call, each alone."""
    images, weight, bias, pos_embed, prefix = (call[name] for name in ("images", *LEARNT))
    tensors = (images, weight, bias, pos_embed, prefix, None)
    find = partial(call_of, tensors, None, 0, None, None, None, None)
    p = find().problem
    assert p is not None
    todo: dict[str, Callable[[], Any]] = {
        "call_of": find,
        "choose": partial(dispatch.choose, p, "auto"),
    }
    for name in names:
        todo[f"{name} backend's forward"] = partial(dispatch.backend(name).forward, p, *tensors)
    return todo


def _sampled(todo: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, list[float]]:
    """Microseconds of a call, a sample for each round."""
    samples: dict[str, list[float]] = {name: [] for name in todo}
    for _ in range(ROUNDS):
        for name, step in todo.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            begin = time.perf_counter()
            for _ in range(CALLS):
                step()
            samples[name].append(1e6 * (time.perf_counter() - begin) / CALLS)
    return samples


class _Kernel:
    """A kernel, and what Triton compiles of it, whatever the grid: both return at once."""

    pre_run_hooks = ()

    def __init__(self, kernel: Any):
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid: Any) -> Callable[..., _Kernel]:
        return lambda *_, **__: self


class _Refused(Exception):
    """What the driver would refuse; a stub never does."""


@contextmanager
def stubs() -> Iterator[None]:
    """Kernels of both languages that return at once, for tensors on the CPU; both backends plan as for an H100."""
    nothing, kernel_of = lambda *_: None, launch.kernel_of
    module = SimpleNamespace(
        device_type="cpu", Refused=_Refused, ForwardPlan=dict, BackwardPlan=dict,
        Forward=lambda *_: nothing, Backward=lambda *_: nothing, Problem=lambda fields: SimpleNamespace(**fields),
    )  # fmt: skip
    places = {(extension, "load"): lambda: module, (extension, "missing"): lambda: "",
              (launch, "kernel_of"): lambda name: _Kernel(kernel_of(name))}  # fmt: skip
    before = {at: getattr(*at) for at in places}
    interpreted = os.environ.get("TRITON_INTERPRET")
    try:
        for at, stub in places.items():
            setattr(*at, stub)
        os.environ["TRITON_INTERPRET"] = "1"
        _forget()
        yield
    finally:
        for at, true in before.items():
            setattr(*at, true)
        if interpreted is None:
            os.environ.pop("TRITON_INTERPRET", None)
        else:
            os.environ["TRITON_INTERPRET"] = interpreted
        _forget()


def _forget() -> None:
    """What was planned and chosen with other kernels."""
    cuda.forget()
    config_cache.forget_plans()
    dispatch.forget()
