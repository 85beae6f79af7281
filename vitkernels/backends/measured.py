"""Which backend is fastest on this machine's GPU, as `vitkernels tune --backends` measured it; user_cache.py's files:

    {"auto/weight/half": {
        "backends": ["cuda", "reference"],                       first to last; the reference takes everything
        "why": "cuda 0.68 × reference's time, triton 1.71; over 6 shapes",
        "ms": {"B256-224-P16-D768-bf16": {"triton": 0.439, "cuda": 0.176, "reference": 0.257}, …},   null: it failed
        "gpu": "NVIDIA H200", "driver": "580.95", "triton": "3.6.0", "source": "0123456789ab",
        "extension": "0123456789ab", "torch": "2.11.0", "vitkernels": "0.1.0", "date": "2026-01-31"}}

It holds for the package, the Triton, the kernels and the build of the extension that were timed. What is stale, damaged
or names what there isn't is not used.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from .. import __version__
from . import user_cache
from .cuda import extension
from .user_cache import Entry

BACKENDS = ("triton", "cuda", "reference")
PREFIX = "auto"


def key(direction: str, kind: str) -> str:
    return f"{PREFIX}/{direction}/{kind}"


def sound(key: str, entry: Entry) -> bool:
    """Whether this says which backends to try, the one that takes everything last."""
    names = entry.get("backends")
    known = isinstance(names, list) and all(name in BACKENDS for name in names) and names[-1:] == ["reference"]
    texts = (entry.get("why"), entry.get("date"))
    return known and key.count("/") == 2 and key.startswith(f"{PREFIX}/") and all(isinstance(t, str) for t in texts)


def built_from() -> dict[str, str | None]:
    """What makes the machine code that was timed."""
    from .triton import config_cache  # a call on a CPU does without

    return {"vitkernels": __version__, "extension": _extension(), **config_cache.compiled_from()}


def _extension() -> str | None:
    file = None if extension.missing() else extension.load().__file__
    return hashlib.sha1(Path(file).read_bytes()).hexdigest()[:12] if file else None


def is_stale(entry: Entry) -> bool:
    """Whether another version, another Triton or another build was timed."""
    return any(entry.get(name) != value for name, value in built_from().items())


@lru_cache(maxsize=8)
def rows(gpu_name: str) -> dict[tuple[str, str], Entry]:
    """(direction, kind of product) -> entry that holds on this GPU today."""
    found = {}
    for key, entry in user_cache.kept(gpu_name).items():
        if sound(key, entry) and not is_stale(entry):
            _, direction, kind = key.split("/")
            found[direction, kind] = entry
    return found


def remember(gpu_name: str, entries: dict[tuple[str, str], dict[str, Any]]) -> Path:
    file = user_cache.write(user_cache.file_of(gpu_name), {key(*at): entry for at, entry in entries.items()})
    rows.cache_clear()
    return file
