"""`tune` searches the fastest tile of a Triton kernel and keeps it in the user's cache, or in the package's own.

A first call of the operation never searches: it looks in the user's cache, in what ships, in the table (configs.py).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .. import dispatch
from ..backends import reference, triton, user_cache
from ..backends.common import canonical
from ..backends.triton import config_cache
from ..backends.triton.configs import Choice
from ..bench import environment, timing
from ..functional import explain
from ..gpu import Gpu, gpu_of, tf32
from ..problem import PatchProblem
from ..profiling import compile_triton
from . import search
from .candidates import candidates_of, tuning_key
from .search import Progress, Timer


def tune(
    call: dict[str, Any],
    *,
    direction: str = "forward",
    seconds: float = 60.0,
    progress: Callable[[Progress], object] = lambda event: None,
    ship: bool = False,
    gpu: Gpu | None = None,
    timer: Timer | None = None,
) -> dict[str, Any]:
    """Search the fastest tile of a Triton kernel for one problem, and keep it.

    Killed at any moment it goes on, when called again, where it was: search.py.

    Args:
        call: the keyword arguments of `patch_embed`, images and weight among them, on a CUDA device.
        direction: "forward"; "weight", the gradients of all parameters; "images", the gradient of the pixels.
        seconds: time after which no further candidate is started.
        progress: called before and after each candidate.
        ship: keep it in the package, for everybody, instead of the user's cache.
        gpu, timer: the figures of a GPU and a clock, in place of those of the images' device: a search without it.

    Returns:
        {"key", "kernel", "config", "ms", "default_ms", "tried", "dropped", "resumed", "candidates", "file", and what an
        entry names besides (config_cache.py)}; times in milliseconds, default_ms None where the default didn't run.

    Raises:
        NotImplementedError: Triton can't take the problem on this machine; the message has the reasons.
        ValueError: no such direction, or pixels that have no gradient.
        BlockingIOError: another process is searching for the same problem on this GPU.
        RuntimeError: no candidate ran, or one left the device unusable (call again in a new process).
    """

    if direction not in ("forward", "weight", "images"):
        raise ValueError(f"direction must be forward, weight or images; got {direction!r}")
    p = explain(**call).problem
    if direction == "images" and not p.image_dtype.is_floating_point:
        raise ValueError(f"pixels of {p.image_dtype} have no gradient to tune")
    if timer is None:
        dispatch.choose(p, "triton")
        if p.device.type != "cuda":
            raise NotImplementedError(f"tuning times kernels on a GPU; images are on {p.device}")
        timer = _timer(p, call, direction)
    gpu = gpu or gpu_of(p.device)
    aligned = call["images"].data_ptr() % 16 == 0
    candidates, problem_key = candidates_of(p, gpu, aligned, direction), tuning_key(p, gpu, aligned, direction)
    header = environment.header(p.device, "")
    versions = {name: header[name] for name in ("driver", "vitkernels")} | config_cache.compiled_from()
    digest = hashlib.sha1(problem_key.encode()).hexdigest()[:12]
    file = user_cache.file_of(gpu.name)
    with search.journal(
        file.with_name(f"{file.stem}.{digest}.journal"), {"key": problem_key, "gpu": gpu.name, **versions}
    ) as notes:
        found = search.search(
            candidates, timer, notes, seconds=seconds, progress=progress, alive=partial(timing.alive, p.device)
        )
        entry = {
            "kernel": found.choice[0], "config": list(found.choice[1]), "ms": found.ms, "default_ms": found.default_ms,
            "gpu": gpu.name, **versions, "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
        file = config_cache.remember(gpu.name, problem_key, entry, ship=ship)
    counts = {name: getattr(found, name) for name in ("tried", "dropped", "resumed")}
    return {"key": problem_key, **entry, **counts, "candidates": len(candidates), "file": str(file)}


def _timer(p: PatchProblem, call: dict[str, Any], direction: str) -> Timer:
    """The GPU's clock, from a cold L2: the median of as many runs as fit the milliseconds."""
    from triton.testing import do_bench

    run = runner(p, call, direction)

    def timed(choice: Choice, ms: float) -> float:
        with torch.cuda.device(p.device):
            return do_bench(lambda: run(choice), warmup=ms / 4, rep=ms, return_mode="median")

    return timed


def hazard_of(p: PatchProblem, choice: Choice) -> str:
    """What breaks the rules of hazards.py in a candidate's machine code; "" where nothing does, and on other GPUs."""

    gpu = gpu_of(p.device)
    if p.device.type != "cuda" or gpu.arch != 90:
        return ""
    return compile_triton.measure(p, gpu, tf32(), choice)["first_hazard"]


def runner(p: PatchProblem, call: dict[str, Any], direction: str) -> Callable[[Choice], object]:
    """Runs a candidate. The first time its machine code must have no hazard, or it is not launched, and its result is
    held to the definition's; ArithmeticError says what is wrong: it gets no time."""

    names = ("images", "weight", "bias", "pos_embed", "prefix", "keep")
    tensors: Any = canonical(*(call.get(name) for name in names))
    if direction == "forward":
        run: Callable[..., Any] = lambda choice: [triton.forward(p, *tensors, choice=choice)]  # noqa: E731
        expected = [reference.forward(p, *tensors)]
    else:
        wanted = [t is not None and (i == 0) == (direction == "images") for i, t in enumerate(tensors[:5])]
        grads = [torch.empty_like(t) if want else None for t, want in zip(tensors[:5], wanted, strict=True)]
        given: list[Any] = [p, torch.randn(p.out_shape, device=p.device).to(p.out_dtype), *tensors, tuple(grads)]
        reference.backward(*given)
        expected = [g.clone() for g in grads if g is not None]

        def run(choice):
            triton.backward(*given, choice=choice)
            return [g for g in grads if g is not None]

    checked: set[Choice] = set()

    def once(choice: Choice) -> object:
        if choice not in checked and (hazard := hazard_of(p, choice)):
            raise ArithmeticError(f"its machine code has a hazard: {hazard}")
        results = run(choice)
        if choice not in checked:
            for ours, theirs in zip(results, expected, strict=True):
                error, size = (t.abs().max().item() for t in (ours.float() - theirs.float(), theirs))
                if not error <= 0.02 * size:  # several times the rounding of halves; what is wrong is wrong by more
                    raise ArithmeticError(f"differs from the definition by {error:.3g} of {size:.3g}")
            checked.add(choice)
        return results

    return once
