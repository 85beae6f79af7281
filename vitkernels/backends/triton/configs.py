"""Which tile a kernel uses: a table per GPU generation with a sane default, measured entries before it.

A first call never searches. `tune` (`vitkernels tune`) does, and keeps what it found in the user's cache; what we
measured ships in vitkernels/tuned/<gpu>.json (tile_cache.py says how). Looked up in that order: user's cache, shipped,
the default below.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...gpu import GENERATION, Gpu
from ...problem import PatchProblem
from . import config_cache

if TYPE_CHECKING:
    from ...tuning.search import Progress, Timer


class Config(NamedTuple):
    """A tile of BM patches × BN channels, BK of K at a step; the warps and pipeline stages of one program."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    # Of the arithmetic units' that such a tile reaches, beside the row's best; a guess where the table names no figures
    rate: float = 1.0


Choice = tuple[str, Config]  # a road and a tile


# (generation, road, product) -> tiles, large to small. `vitkernels inspect` compiles every one of them; the tests
# assert that none spills, that each fits the shared memory and that the tensor cores do the product.
TABLE: dict[tuple[int, str, str], tuple[Config, ...]] = {
    (80, "gather", "half"): (Config(128, 128, 32, 8, 3), Config(64, 64, 64, 4, 3, 0.6), Config(32, 64, 64, 4, 3, 0.4)),
    (80, "gather", "tf32"): (Config(128, 64, 32, 8, 3), Config(64, 64, 32, 4, 3, 0.8)),
    (80, "gather", "fp32"): (Config(64, 64, 16, 8, 3), Config(32, 32, 16, 4, 3, 0.6)),
    (80, "gather", "fp64"): (Config(64, 64, 16, 4, 3), Config(32, 32, 16, 4, 3, 0.8)),
    # Measured on an H200 at B = 256 (benchmarks/results/nvidia-h200/tune.txt): 157, 188 and 268 µs with P = 16, 285,
    # 302 and 655 with P = 14.
    (90, "gather", "half"): (
        Config(128, 256, 32, 8, 4), Config(128, 128, 32, 4, 3, 0.85), Config(64, 64, 64, 4, 3, 0.55),
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
    # Beside a keep list, pixels that are converted, or a wider dY that is rounded on its way (autocast, where tokens
    # stay fp32).
    (80, "weight", "crowded"): (Config(128, 64, 16, 8, 3), Config(64, 64, 32, 4, 3, 0.8)),
    (80, "weight", "tf32"): (Config(128, 64, 16, 8, 3), Config(64, 64, 16, 8, 3, 0.8)),
    (80, "weight", "fp32"): (Config(64, 64, 16, 8, 3), Config(32, 32, 16, 4, 3, 0.6)),
    (80, "weight", "fp64"): (Config(64, 64, 16, 4, 3), Config(32, 32, 16, 4, 3, 0.8)),
    (80, "images", "half"): (Config(128, 128, 32, 8, 3), Config(64, 64, 32, 4, 3, 0.6)),
    (80, "images", "tf32"): (Config(128, 64, 32, 8, 3), Config(64, 64, 32, 8, 3, 0.8)),
    (80, "images", "fp32"): (Config(64, 64, 16, 8, 3), Config(32, 32, 16, 4, 3, 0.6)),
    (80, "images", "fp64"): (Config(64, 64, 16, 4, 3), Config(32, 32, 16, 4, 3, 0.8)),
    # Measured there, too: 439 and 635 µs; those of 8 warps take 679 and more.
    (90, "weight", "half"): (Config(128, 128, 64, 4, 3), Config(64, 64, 64, 4, 4, 0.7)),
    # Halves whose pixels are read by less than 16 bytes at a time: more addresses to hold. 1,271 µs with P = 14, where
    # 128×128×64 takes 1,646.
    (90, "weight", "narrow"): (Config(64, 64, 64, 4, 4),),
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

    best = min(rows(gpu.arch, road, product), key=lambda c: waves(p.B * p.rows, p.D, c, gpu))
    return fitted(p, best, gpu)


def waves(M: int, columns: int, c: Config, gpu: Gpu) -> float:
    """Waves of programs × work of one, for each of the product's depth: multiply-adds of one multiprocessor."""
    programs = -(-M // c.BM) * -(-columns // c.BN)
    return -(-programs // gpu.multiprocessors) * c.BM * c.BN / c.rate


def fitted(p: PatchProblem, c: Config, gpu: Gpu) -> Config:
    return staged(c, gpu, p.image_dtype.itemsize, p.compute_dtype.itemsize, c.BM * c.BN * p.out_dtype.itemsize)


def staged(c: Config, gpu: Gpu, left: int, right: int, beside: int = 0) -> Config:
    """With no more stages than fit: left, right are the bytes of an operand's element, `beside` is taken by others."""
    stage = c.BK * (c.BM * left + c.BN * right)
    return c._replace(stages=max(1, min(c.stages, (gpu.shared_bytes - beside - 4096) // stage)))


# Guess, not measured: multiply-adds that one multiprocessor takes while the L2 brings a byte (H100: some 5.5 TB/s).
PER_BYTE = {"half": 0.7, "tf32": 0.35, "fp32": 0.05, "fp64": 0.05}


def estimate(M: int, columns: int, depth: int, c: Config, gpu: Gpu, product: str, left: int, right: int) -> float:
    """What a product [M, depth] × [depth, columns] costs in these tiles, in multiply-adds of one multiprocessor: its
    waves, and the operands (`left`, `right` bytes an element) that all programs together read."""
    programs = -(-M // c.BM) * -(-columns // c.BN)
    traffic = programs * depth * (c.BM * left + c.BN * right)
    return waves(M, columns, c, gpu) * depth + PER_BYTE[product] * traffic


def variants(c: Config) -> Iterator[Config]:
    """This tile, then its neighbours in height, stages and warps whose sums fit the registers."""
    yield c
    for BM in sorted({c.BM, c.BM // 2, c.BM * 2} & {32, 64, 128}, key=lambda BM: BM != c.BM):
        for stages in (3, 4, 2, 5):
            for warps in dict.fromkeys((c.warps, 4, 8)):
                if BM * c.BN // warps <= 128 * 256 // 8:
                    yield c._replace(BM=BM, stages=stages, warps=warps)


def ranked(default: Choice, found: Sequence[Choice], cost: Callable[[Choice], float]) -> list[Choice]:
    """The default, then the cheapest by the model: of every tile one, then its other stages and warps. What should cost
    three times the cheapest is left out."""
    costs = {choice: cost(choice) for choice in dict.fromkeys((default, *found))}
    first: dict[tuple[Any, ...], Choice] = {}
    for road, c in costs:
        first.setdefault((road, *c[:3]), (road, c))
    limit = 3 * min(costs.values())
    others = [choice for choice in costs if choice != default and costs[choice] <= limit]
    others.sort(key=lambda choice: (choice not in first.values(), costs[choice]))
    return [default, *others]


def key(p: PatchProblem, product: str, descriptor: bool, road: str = "forward") -> str:
    """Problems that share a measured entry: all that has a say in the tile; the batch counts by its power of two.
    `road` is "weight" or "images" for those of the backward."""
    patch, stride = ("x".join(map(str, v)) for v in (p.P, p.S))
    dtypes = "-".join(str(d).removeprefix("torch.") for d in (p.image_dtype, p.compute_dtype, p.out_dtype))
    batch = (p.B * p.rows).bit_length()
    last = p.C > 1 and p.image_strides[1] == 1
    said = (("d", descriptor), ("k", p.n_keep is not None), ("l", last), ("n", p.normalised), ("p", any(p.pad)))
    flags = "".join(letter for letter, on in said if on)
    kind = product if road == "forward" else f"{road}/{product}"
    return f"{kind}/{dtypes}/C{p.C}/P{patch}/S{stride}/D{p.D}/M{batch}{'/' + flags if flags else ''}"


cache_file = config_cache.file_of


@lru_cache(maxsize=8)
def measured(gpu_name: str) -> dict[str, config_cache.Entry]:
    """Problem key -> entry measured on this GPU: shipped, and over them the user's."""
    return config_cache.read(cache_file(gpu_name, ship=True)) | config_cache.read(cache_file(gpu_name))


@lru_cache(maxsize=1)
def compiled_from() -> dict[str, str | None]:
    """What makes a tile's machine code: Triton, and the source of the kernels. A time, and that there was no hazard,
    hold for these alone."""
    try:
        triton: str | None = version("triton")
    except PackageNotFoundError:
        triton = None
    folder = Path(__file__).parent
    text = b"".join(
        (folder / name).read_bytes() for name in ("forward_kernels.py", "backward_kernels.py", "kernel_utils.py")
    )
    return {"triton": triton, "kernels": hashlib.sha1(text).hexdigest()[:12]}


def is_stale(entry: config_cache.Entry) -> bool:
    """Whether another Triton compiled it, or from another source."""
    return any(entry.get(name) != value for name, value in compiled_from().items())


def remembered(gpu: Gpu, problem_key: str, roads: Sequence[str], fits: Callable[[Config], bool]) -> Choice | None:
    """The measured tile of a problem; None where there is none, or it is stale or doesn't fit what runs today."""
    entry = measured(gpu.name).get(problem_key)
    if entry is None or is_stale(entry):
        return None
    road, c = entry["road"], Config(*entry["config"])
    return (road, c) if road in roads and fits(c) else None


def remember(gpu_name: str, problem_key: str, entry: config_cache.Entry, *, ship: bool = False) -> Path:
    """Add one measured entry to the user's cache, or to the package's own."""
    file = config_cache.remember(cache_file(gpu_name, ship=ship), problem_key, entry)
    measured.cache_clear()
    return file


def tune(
    call: dict[str, Any],
    *,
    road: str = "forward",
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
        road: "forward"; "weight", the gradients of all parameters; "images", the gradient of the pixels.
        seconds: time after which no further candidate is started.
        progress: called before and after each candidate.
        ship: keep it in the package, for everybody, instead of the user's cache.
        gpu, timer: the figures of a GPU and a clock, in place of those of the images' device: a search without it.

    Returns:
        {"key", "road", "config", "ms", "default_ms", "tried", "dropped", "resumed", "candidates", "file", and what an
        entry names besides (tile_cache.py)}; times in milliseconds, default_ms None where the default didn't run.

    Raises:
        NotImplementedError: Triton can't take the problem on this machine; the message has the reasons.
        ValueError: no such road, or pixels that have no gradient.
        BlockingIOError: another process is searching for the same problem on this GPU.
        RuntimeError: no candidate ran, or one left the device unusable (call again in a new process).
    """
    from ... import dispatch
    from ...bench import environment, timing
    from ...functional import explain
    from ...gpu import gpu_of
    from ...tuning import search
    from .. import triton

    if road not in ("forward", "weight", "images"):
        raise ValueError(f"road must be forward, weight or images; got {road!r}")
    p = explain(**call).problem
    if road == "images" and not p.image_dtype.is_floating_point:
        raise ValueError(f"pixels of {p.image_dtype} have no gradient to tune")
    if timer is None:
        dispatch.choose(p, "triton")
        if p.device.type != "cuda":
            raise NotImplementedError(f"tuning times kernels on a GPU; images are on {p.device}")
        timer = _timer(p, call, road)
    gpu = gpu or gpu_of(p.device)
    aligned = call["images"].data_ptr() % 16 == 0
    candidates, problem_key = triton.candidates(p, gpu, aligned, road), triton.tuning_key(p, gpu, aligned, road)
    header = environment.header(p.device, "")
    versions = {name: header[name] for name in ("driver", "vitkernels")} | compiled_from()
    digest = hashlib.sha1(problem_key.encode()).hexdigest()[:12]
    file = cache_file(gpu.name)
    with search.journal(
        file.with_name(f"{file.stem}.{digest}.journal"), {"key": problem_key, "gpu": gpu.name, **versions}
    ) as notes:
        found = search.search(
            candidates, timer, notes, seconds=seconds, progress=progress, alive=partial(timing.alive, p.device)
        )
        entry = {
            "road": found.choice[0], "config": list(found.choice[1]), "ms": found.ms, "default_ms": found.default_ms,
            "gpu": gpu.name, **versions, "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
        file = remember(gpu.name, problem_key, entry, ship=ship)
    triton.forget_plans()
    counts = {name: getattr(found, name) for name in ("tried", "dropped", "resumed")}
    return {"key": problem_key, **entry, **counts, "candidates": len(candidates), "file": str(file)}


def _timer(p: PatchProblem, call: dict[str, Any], road: str) -> Timer:
    """The GPU's clock, from a cold L2: the median of as many runs as fit the milliseconds."""
    import torch
    from triton.testing import do_bench

    run = runner(p, call, road)

    def timed(choice: Choice, ms: float) -> float:
        with torch.cuda.device(p.device):
            return do_bench(lambda: run(choice), warmup=ms / 4, rep=ms, return_mode="median")

    return timed


def hazard_of(p: PatchProblem, choice: Choice) -> str:
    """What breaks the rules of hazards.py in a candidate's machine code; "" where nothing does, and on other GPUs."""
    from ...gpu import gpu_of, tf32
    from ...profiling import compile_triton

    gpu = gpu_of(p.device)
    if p.device.type != "cuda" or gpu.arch != 90:
        return ""
    return compile_triton.measure(p, gpu, tf32(), choice)["first_hazard"]


def runner(p: PatchProblem, call: dict[str, Any], road: str) -> Callable[[Choice], object]:
    """Runs a candidate. The first time its machine code must have no hazard, or it is not launched, and its result is
    held to the definition's; ArithmeticError says what is wrong: it gets no time."""
    import torch

    from ... import dispatch
    from .. import reference, triton
    from ..reference import gradients

    names = ("images", "weight", "bias", "pos_embed", "prefix", "keep")
    tensors: Any = dispatch.canonical(*(call.get(name) for name in names))
    if road == "forward":
        run: Callable[..., Any] = lambda choice: [triton.forward(p, *tensors, choice=choice)]  # noqa: E731
        expected = [reference.forward(p, *tensors)]
    else:
        wanted = [t is not None and (i == 0) == (road == "images") for i, t in enumerate(tensors[:5])]
        grads = [torch.empty_like(t) if want else None for t, want in zip(tensors[:5], wanted, strict=True)]
        given: list[Any] = [p, torch.randn(p.out_shape, device=p.device).to(p.out_dtype), *tensors, tuple(grads)]
        gradients.backward(*given)
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
