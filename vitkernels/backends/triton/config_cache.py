"""Tiles that were measured on a GPU, in files: one a GPU, in the user's cache and, shipped, in vitkernels/tuned/.

A file is one JSON object, key of the problems (`tuning.key`) -> entry. `vitkernels tune` writes them, `--ship` into the
package:

    {"half/bfloat16-bfloat16-bfloat16/C3/P1x16x16/S1x16x16/D768/M16/d": {
        "road": "descriptor", "config": [128, 256, 64, 8, 3, 1.0],      a `Config`: BM BN BK warps stages rate
        "ms": 0.1, "default_ms": 0.12,                                   the tile's time, and that of the table's own
        "gpu": "NVIDIA H100 80GB HBM3", "driver": "580.95", "triton": "3.6.0", "kernels": "0123456789ab",
        "vitkernels": "0.1.0", "date": "2026-01-31"}}

An entry holds for the Triton and the kernels (a hash of their source) that it was measured with: others compile another
kernel, of another speed and with other hazards. `vitkernels tune --list` tells those that are stale. What is stale,
damaged or doesn't fit is not used.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

Entry = dict[str, Any]
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
    """Whether this names a road and a tile that some GPU could run."""
    config = entry.get("config") if isinstance(entry, dict) and isinstance(entry.get("road"), str) else None
    if not isinstance(config, list) or len(config) not in (5, 6) or any(type(n) is not int for n in config[:5]):
        return False
    *tile, warps, stages = config[:5]
    powers = all(n >= 16 and n & (n - 1) == 0 for n in tile) and warps in (1, 2, 4, 8, 16)
    return powers and 1 <= stages <= 8 and all(isinstance(n, int | float) for n in config[5:])


def remember(file: Path, key: str, entry: Entry) -> Path:
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
