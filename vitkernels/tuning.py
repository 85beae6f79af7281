"""Which tile a kernel uses: a table per GPU generation with a sane default, measured entries before it.

A first call never searches. `tune` (`vitkernels tune`) does, and keeps what it found in the user's cache; what we
measured ships in vitkernels/tuned/<gpu>.json. Looked up in that order: user's cache, shipped, the default below.
"""

from __future__ import annotations

import json
import os
import re
import time
import warnings
from collections.abc import Callable
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from .problem import PatchProblem


class Config(NamedTuple):
    """A tile of BM patches × BN channels, BK of K at a step; the warps and pipeline stages of one program."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    rate: float = 1.0  # guess, not measured: the share of the arithmetic units' rate that a tile of this shape reaches


class Gpu(NamedTuple):
    name: str
    arch: int  # 90 for sm_90
    multiprocessors: int
    shared_bytes: int  # of one program, at most


GENERATION = {86: 80, 87: 80, 89: 80, 120: 80, 121: 80}  # as small in shared memory, and without wgmma
# One GPU of each architecture, for compiling without one.
NOMINAL = {
    80: Gpu("A100", 80, 108, 166912), 89: Gpu("L4", 89, 58, 101376), 90: Gpu("H100", 90, 132, 232448),
    100: Gpu("B200", 100, 148, 232448), 120: Gpu("RTX 5090", 120, 170, 101376),
}  # fmt: skip

# (generation, road, product) -> tiles, large to small. `vitkernels inspect` compiles every one of them; the tests
# assert that none spills, that each fits the shared memory and that the tensor cores do the product.
TABLE: dict[tuple[int, str, str], tuple[Config, ...]] = {
    (80, "gather", "half"): (Config(128, 128, 32, 8, 3), Config(64, 64, 64, 4, 3, 0.6), Config(32, 64, 64, 4, 3, 0.4)),
    (80, "gather", "tf32"): (Config(128, 64, 32, 8, 3), Config(64, 64, 32, 4, 3, 0.8)),
    (80, "gather", "fp32"): (Config(64, 64, 16, 8, 3), Config(32, 32, 16, 4, 3, 0.6)),
    (80, "gather", "fp64"): (Config(64, 64, 16, 4, 3), Config(32, 32, 16, 4, 3, 0.8)),
    (90, "gather", "half"): (
        Config(128, 128, 32, 8, 4, 0.85), Config(64, 256, 32, 8, 4, 0.8), Config(64, 64, 64, 4, 3, 0.5),
    ),
    (90, "gather", "tf32"): (Config(128, 128, 32, 8, 3), Config(64, 64, 32, 4, 3, 0.6)),
    (90, "descriptor", "half"): (
        Config(128, 256, 64, 8, 3), Config(128, 128, 64, 8, 4, 0.85), Config(64, 128, 64, 4, 4, 0.7),
        Config(64, 64, 64, 4, 4, 0.5),
    ),
    (90, "descriptor", "tf32"): (Config(128, 128, 32, 8, 3), Config(64, 64, 32, 4, 4, 0.6)),
    # Of the backward: BM channels × BN elements of a patch, BK patches at a step ("weight"), and BM cells × BN pixels,
    # BK channels at a step ("images").
    (80, "weight", "half"): (Config(128, 128, 32, 8, 3), Config(64, 64, 64, 8, 3, 0.6)),
    # Beside a keep list, or a wider dY that is rounded on its way (autocast, where tokens stay fp32).
    (80, "weight", "crowded"): (Config(128, 64, 16, 8, 3), Config(64, 64, 32, 4, 3, 0.8)),
    (80, "weight", "tf32"): (Config(128, 64, 16, 8, 3), Config(64, 64, 16, 8, 3, 0.8)),
    (80, "weight", "fp32"): (Config(64, 64, 16, 8, 3), Config(32, 32, 16, 4, 3, 0.6)),
    (80, "weight", "fp64"): (Config(64, 64, 16, 4, 3), Config(32, 32, 16, 4, 3, 0.8)),
    (80, "images", "half"): (Config(128, 128, 32, 8, 3), Config(64, 64, 32, 4, 3, 0.6)),
    (80, "images", "tf32"): (Config(128, 64, 32, 8, 3), Config(64, 64, 32, 8, 3, 0.8)),
    (80, "images", "fp32"): (Config(64, 64, 16, 8, 3), Config(32, 32, 16, 4, 3, 0.6)),
    (80, "images", "fp64"): (Config(64, 64, 16, 4, 3), Config(32, 32, 16, 4, 3, 0.8)),
    (90, "weight", "half"): (
        Config(128, 256, 64, 8, 3), Config(128, 128, 64, 8, 4, 0.85), Config(64, 64, 64, 4, 4, 0.5),
    ),
    # Halves whose pixels are read by less than 16 bytes at a time: more addresses to hold. 256×128×32 spills 8 bytes.
    (90, "weight", "narrow"): (Config(128, 128, 64, 8, 4), Config(64, 64, 64, 4, 4, 0.6)),
    (90, "weight", "crowded"): (Config(128, 128, 32, 8, 4), Config(64, 64, 64, 4, 4, 0.6)),
    (90, "weight", "tf32"): (Config(128, 128, 32, 8, 3), Config(64, 64, 32, 4, 3, 0.6)),
    (90, "images", "half"): (Config(128, 128, 32, 8, 4), Config(64, 64, 64, 4, 3, 0.5)),
    (90, "images", "tf32"): (Config(128, 128, 32, 8, 3), Config(64, 64, 32, 8, 3, 0.6)),
    (100, "weight", "crowded"): (Config(64, 64, 64, 8, 4),),
    (100, "weight", "half"): (Config(128, 128, 64, 8, 4), Config(64, 64, 64, 4, 4, 0.5)),
}  # fmt: skip


def rows(arch: int, road: str, product: str) -> tuple[Config, ...]:
    """The table's row for a GPU; a generation without one of its own uses an older one's."""
    generation = GENERATION.get(arch, arch)
    older = [g for g, *key in TABLE if key == [road, product] and g <= generation]
    return TABLE[max(older), road, product] if older else ()


def default(p: PatchProblem, road: str, product: str, gpu: Gpu) -> Config:
    """The row's tile with the fewest waves × work of a program, with no more stages than fit."""

    def cost(c: Config) -> float:
        programs = -(-p.B * p.rows // c.BM) * -(-p.D // c.BN)
        return -(-programs // gpu.multiprocessors) * c.BM * c.BN / c.rate

    return fitted(p, min(rows(gpu.arch, road, product), key=cost), gpu)


def fitted(p: PatchProblem, c: Config, gpu: Gpu) -> Config:
    return staged(c, gpu, p.image_dtype.itemsize, p.compute_dtype.itemsize, c.BM * c.BN * p.out_dtype.itemsize)


def staged(c: Config, gpu: Gpu, left: int, right: int, beside: int = 0) -> Config:
    """With no more stages than fit: left, right are the bytes of an operand's element, `beside` is taken by others."""
    stage = c.BK * (c.BM * left + c.BN * right)
    return c._replace(stages=max(1, min(c.stages, (gpu.shared_bytes - beside - 4096) // stage)))


def key(p: PatchProblem, product: str, descriptor: bool) -> str:
    """Problems that share a measured entry: all that has a say in the tile; the batch counts by its power of two."""
    patch, stride = ("x".join(map(str, v)) for v in (p.P, p.S))
    dtypes = "-".join(str(d).removeprefix("torch.") for d in (p.image_dtype, p.compute_dtype, p.out_dtype))
    batch = (p.B * p.rows).bit_length()
    said = (("d", descriptor), ("k", p.n_keep is not None), ("n", p.normalised), ("p", any(p.pad)))
    flags = "".join(letter for letter, on in said if on)
    return f"{product}/{dtypes}/C{p.C}/P{patch}/S{stride}/D{p.D}/M{batch}{'/' + flags if flags else ''}"


def cache_file(gpu_name: str) -> Path:
    root = os.environ.get("VITKERNELS_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "vitkernels"
    return Path(root).expanduser() / f"{_slug(gpu_name)}.json"


@lru_cache(maxsize=8)
def measured(gpu_name: str) -> dict[str, dict[str, Any]]:
    """Problem key -> {"road", "config", "ms"} measured on this GPU: shipped, and over them the user's."""
    entries: dict[str, dict[str, Any]] = {}
    shipped = resources.files(__package__) / "tuned" / f"{_slug(gpu_name)}.json"
    for file in (shipped, cache_file(gpu_name)):
        if file.is_file():
            try:
                entries.update(json.loads(file.read_text()))
            except ValueError as error:
                warnings.warn(f"{file} is damaged and not used: {error}", stacklevel=2)
    return entries


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def remember(gpu_name: str, problem_key: str, entry: dict[str, Any]) -> Path:
    """Add one measured entry to the user's cache; written whole or not at all, so a killed search loses nothing."""
    file = cache_file(gpu_name)
    file.parent.mkdir(parents=True, exist_ok=True)
    entries = json.loads(file.read_text()) if file.is_file() else {}
    entries[problem_key] = entry
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(entries, indent=1, sort_keys=True))
    part.replace(file)
    measured.cache_clear()
    return file


def tune(
    call: dict[str, Any], *, seconds: float = 60.0, progress: Callable[[int, int, str], None] | None = None
) -> dict[str, Any]:
    """Time every candidate tile of the Triton forward on one problem and keep the fastest in the user's cache.

    Args:
        call: the keyword arguments of `patch_embed`, images and weight among them, on a CUDA device.
        seconds: time after which no further candidate is started.
        progress: called with (candidates done, candidates, what was just timed).

    Returns:
        {"key", "road", "config", "ms", "default_ms", "tried", "candidates", "file"}; times in milliseconds.

    Raises:
        NotImplementedError: Triton can't take the problem on this machine; the message has the reasons.
    """
    from . import dispatch, triton
    from .device import gpu_of
    from .functional import explain

    p = explain(**call).problem
    dispatch.choose(p, "triton")
    if p.device.type != "cuda":
        raise NotImplementedError(f"tuning times kernels on a GPU; images are on {p.device}")
    from triton.testing import do_bench

    gpu = gpu_of(p.device)
    names = ("images", "weight", "bias", "pos_embed", "prefix", "keep")
    tensors = dispatch.canonical(*(call.get(name) for name in names))
    aligned = call["images"].data_ptr() % 16 == 0

    def run() -> None:
        triton.forward(p, *tensors, choice=choice)

    candidates = triton.candidates(p, gpu, aligned)
    best: dict[str, Any] = {}
    default_ms = None
    stop = time.monotonic() + seconds
    tried = 0
    for tried, choice in enumerate(candidates, 1):
        road, c = choice
        try:
            ms = do_bench(run, warmup=10, rep=40, return_mode="median")
        except Exception as error:  # a candidate that doesn't compile or fit is no candidate; the next one may be
            ms, what = float("inf"), f"{road} {tuple(c)}: {type(error).__name__}"
        else:
            what = f"{road} {tuple(c)}: {ms * 1e3:.1f} µs"
        default_ms = ms if default_ms is None else default_ms
        if ms < best.get("ms", float("inf")):
            best = {"road": road, "config": list(c), "ms": ms}
        if progress:
            progress(tried, len(candidates), what)
        if time.monotonic() > stop:
            break
    if not best:
        raise RuntimeError(f"none of {tried} candidates ran for {p}")
    problem_key = triton.tuning_key(p, gpu, aligned)
    file = remember(gpu.name, problem_key, best)
    triton.forget_plans()
    counts = {"tried": tried, "candidates": len(candidates)}
    return {"key": problem_key, **best, "default_ms": default_ms, **counts, "file": str(file)}
