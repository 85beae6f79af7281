"""What was measured on a GPU, in files: one a GPU, in the user's cache and, shipped, in vitkernels/tuned/.

A file is one JSON object, key -> entry. Two kinds of entry stand in it: tiles of Triton's kernels
(triton/config_cache.py) and which backend is fastest (measured.py). `vitkernels tune` writes both.
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
SHIPPED = Path(__file__).parents[1] / "tuned"


def slug(gpu_name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-")


def folder() -> Path:
    """The user's: VITKERNELS_CACHE, else vitkernels/ in XDG_CACHE_HOME or ~/.cache."""
    root = os.environ.get("VITKERNELS_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "vitkernels"
    return Path(root).expanduser()


def file_of(gpu_name: str, *, ship: bool = False) -> Path:
    return (SHIPPED if ship else folder()) / f"{slug(gpu_name)}.json"


def read(file: Path) -> dict[str, Entry]:
    """The entries of a file; none where there is no file, and a warning where it is damaged."""
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
    return {key: entry for key, entry in found.items() if isinstance(entry, dict)}


def kept(gpu_name: str) -> dict[str, Entry]:
    """Key -> entry of this GPU: shipped, and over them the user's."""
    return read(file_of(gpu_name, ship=True)) | read(file_of(gpu_name))


def write(file: Path, new: dict[str, Entry]) -> Path:
    """Add entries; the file is written whole or not at all, and others who write it meanwhile lose nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with (file.parent / f"{file.name}.lock").open("a") as lock, locked(lock):
        entries = read(file)
        if file.is_file() and not entries:
            file.replace(file.with_suffix(".damaged"))  # or empty: no loss either
        part = file.with_suffix(f".{os.getpid()}")
        with part.open("w") as out:
            json.dump(entries | new, out, indent=1, sort_keys=True)
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
