"""Tiles that were measured on a GPU, in files: one a GPU, in the user's cache and, shipped, in vitkernels/tuned/.

A file is one JSON object, key of the problems (`key`) -> entry. `vitkernels tune` writes them, `--ship` into the
package:

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
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, TypeVar

from ...gpu import Gpu
from ...problem import PatchProblem
from .configs import Choice, Config

Entry = dict[str, Any]
F = TypeVar("F", bound=Callable[..., Any])
SHIPPED = Path(__file__).parents[2] / "tuned"


def slug(gpu_name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-")


def folder() -> Path:
    """The user's: VITKERNELS_CACHE, else vitkernels/ in XDG_CACHE_HOME or ~/.cache."""
    root = os.environ.get("VITKERNELS_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "vitkernels"
    return Path(root).expanduser()


def file_of(gpu_name: str, *, ship: bool = False) -> Path:
    return (SHIPPED if ship else folder()) / f"{slug(gpu_name)}.json"


def read(file: Path) -> dict[str, Entry]:
    """The sound entries of a file; none where there is no file, and a warning where it is damaged."""
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"{file} can't be read and is not used: {error}", stacklevel=3)
        return {}
    if not isinstance(found, dict):
        warnings.warn(f"{file} is not used: it holds no JSON object", stacklevel=3)
        return {}
    return {key: entry for key, entry in found.items() if sound(entry)}


def sound(entry: Any) -> bool:
    """Whether this names a kernel and a tile that some GPU could run."""
    config = entry.get("config") if isinstance(entry, dict) and isinstance(entry.get("kernel"), str) else None
    if not isinstance(config, list) or len(config) not in (5, 6) or any(type(n) is not int for n in config[:5]):
        return False
    *tile, warps, stages = config[:5]
    powers = all(n >= 16 and n & (n - 1) == 0 for n in tile) and warps in (1, 2, 4, 8, 16)
    return powers and 1 <= stages <= 8 and all(isinstance(n, int | float) for n in config[5:])


def write_entry(file: Path, key: str, entry: Entry) -> Path:
    """Add one entry; the file is written whole or not at all, and others who write it meanwhile lose nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with (file.parent / f"{file.name}.lock").open("a") as lock, locked(lock):
        entries = read(file)
        if file.is_file() and not entries:
            file.replace(file.with_suffix(".damaged"))  # or empty: no loss either
        part = file.with_suffix(f".{os.getpid()}")
        with part.open("w") as out:
            json.dump(entries | {key: entry}, out, indent=1, sort_keys=True)
            out.flush()
            os.fsync(out.fileno())
        part.replace(file)
    return file


@contextmanager
def locked(file: IO[Any], *, wait: bool = True) -> Iterator[None]:
    """This process alone, until it leaves or dies. Without fcntl (Windows) nobody is kept out: what then remains is
    that files are replaced whole. BlockingIOError where another has it and `wait` is False."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def listed() -> list[Entry]:
    """Every entry of every GPU, shipped and the user's, with "key", "file", and "shipped" besides."""
    return [
        {"gpu": file.stem, **entry, "key": key, "file": str(file), "shipped": where == SHIPPED}
        for where in (SHIPPED, folder())
        for file in sorted(where.glob("*.json"))
        for key, entry in read(file).items()
    ]


def forget(gpu_name: str) -> list[Path]:
    """Remove what the user's cache has of a GPU, unfinished searches included; the files removed."""
    name = slug(gpu_name)
    files = [f for f in (*folder().glob(f"{name}.json*"), *folder().glob(f"{name}.*.journal")) if f.is_file()]
    for file in files:
        file.unlink()
    return files


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
    return read(file_of(gpu_name, ship=True)) | read(file_of(gpu_name))


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
    file = write_entry(file_of(gpu_name, ship=ship), problem_key, entry)
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
