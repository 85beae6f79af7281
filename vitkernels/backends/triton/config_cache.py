"""Tiles that were measured on a GPU, in the files of user_cache.py: key of the problems (`key`) -> entry. `vitkernels
tune` writes them, `--ship` into the package:

    {"half/bfloat16-bfloat16-bfloat16/C3/P1x16x16/S1x16x16/D768/M16/d": {
        "kernel": "descriptor", "config": [128, 256, 64, 8, 3, 1.0],      a `Config`: BM BN BK warps stages rate
        "ms": 0.1, "default_ms": 0.12,                                   the tile's time, and that of the table's own
        "gpu": "NVIDIA H100 80GB HBM3", "driver": "580.95", "triton": "3.6.0", "source": "0123456789ab",
        "vitkernels": "0.1.0", "date": "2026-01-31"}}

An entry holds for the Triton and the kernels (a hash of their source) that it was measured with: others compile another
kernel, of another speed and with other hazards. `vitkernels tune --list` tells those that are stale. What is stale,
damaged or doesn't fit is not used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from ...gpu import Gpu
from ...problem import PatchProblem
from .. import user_cache
from ..user_cache import Entry
from .configs import Choice, Config

F = TypeVar("F", bound=Callable[..., Any])


def sound(entry: Any) -> bool:
    """Whether this names a kernel and a tile that some GPU could run."""
    config = entry.get("config") if isinstance(entry, dict) and isinstance(entry.get("kernel"), str) else None
    if not isinstance(config, list) or len(config) not in (5, 6) or any(type(n) is not int for n in config[:5]):
        return False
    *tile, warps, stages = config[:5]
    powers = all(n >= 16 and n & (n - 1) == 0 for n in tile) and warps in (1, 2, 4, 8, 16)
    return powers and 1 <= stages <= 8 and all(isinstance(n, int | float) for n in config[5:])


def key(p: PatchProblem, product: str, descriptor: bool, direction: str = "forward") -> str:
    """Problems that share a measured entry: all that has a say in the tile; the batch counts by its power of two.
    `direction` is forward, weight or images."""
    patch, stride = ("x".join(map(str, v)) for v in (p.P, p.S))
    dtypes = "-".join(str(d).removeprefix("torch.") for d in (p.image_dtype, p.compute_dtype, p.out_dtype))
    batch = (p.B * p.rows).bit_length()
    last = p.C > 1 and p.image_strides[1] == 1
    said = (("d", descriptor), ("k", p.n_keep is not None), ("l", last), ("n", p.normalised), ("p", any(p.pad)))
    flags = "".join(letter for letter, on in said if on)
    kind = product if direction == "forward" else f"{direction}/{product}"
    return f"{kind}/{dtypes}/C{p.C}/P{patch}/S{stride}/D{p.D}/M{batch}{'/' + flags if flags else ''}"


@lru_cache(maxsize=8)
def measured(gpu_name: str) -> dict[str, Entry]:
    """Problem key -> entry measured on this GPU: shipped, and over them the user's."""
    return {key: entry for key, entry in user_cache.kept(gpu_name).items() if sound(entry)}


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
        (folder / name).read_bytes() for name in ("forward_kernels.py", "backward_kernels.py", "primitives.py")
    )
    return {"triton": triton, "source": hashlib.sha1(text).hexdigest()[:12]}


def is_stale(entry: Entry) -> bool:
    """Whether another Triton compiled it, or from another source."""
    return any(entry.get(name) != value for name, value in compiled_from().items())


def remembered(gpu: Gpu, problem_key: str, kernels: Sequence[str], fits: Callable[[Config], bool]) -> Choice | None:
    """The measured tile of a problem; None where there is none, or it is stale or doesn't fit what runs today."""
    entry = measured(gpu.name).get(problem_key)
    if entry is None or is_stale(entry):
        return None
    kernel, c = entry["kernel"], Config(*entry["config"])
    return (kernel, c) if kernel in kernels and fits(c) else None


def remember(gpu_name: str, problem_key: str, entry: Entry, *, ship: bool = False) -> Path:
    """Add one measured entry to the user's cache, or to the package's own."""
    file = user_cache.write(user_cache.file_of(gpu_name, ship=ship), {problem_key: entry})
    forget_plans()
    return file


_plans: list[Any] = []


def planned(function: F) -> F:
    """Caches plans, which hold measured tiles, until other tiles are remembered."""
    _plans.append(cached := lru_cache(maxsize=1024)(function))
    return cached  # type: ignore[return-value]


def forget_plans() -> None:
    measured.cache_clear()
    for cached in _plans:
        cached.cache_clear()
