"""What Triton needs of a machine: a C compiler and Python's headers, for the module by which it launches, and a folder
for what it compiled. Images made to run things (PyTorch's and NVIDIA's `runtime`) have no compiler, and homes may be
read-only (sgl-project/sglang 1067, triton-lang/triton 518)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .. import fallbacks

REMEDY = "install gcc and Python's headers, set CC, or set TRITON_CACHE_DIR to a folder that can be written"


@lru_cache(maxsize=1)
def missing() -> str:
    """What is lacking, and what to do; "" where nothing is, or Triton has built its module before."""
    lacking = [reason for reason in (_compiler(), _headers(), _cache()) if reason]
    return "; ".join(lacking) if lacking and not _has_launched() else ""


def _compiler() -> str:
    from triton import knobs

    if knobs.build.impl is not None:
        return ""
    if cc := os.environ.get("CC"):
        return "" if shutil.which(cc) else f"Triton needs a C compiler, and CC = {cc!r} is none: set it to one"
    found = shutil.which("gcc") or shutil.which("clang")
    return "" if found else "Triton needs a C compiler, and neither gcc nor clang is on PATH: install gcc, or set CC"


def _headers() -> str:
    scheme = sysconfig.get_default_scheme()
    folder = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]  # as Triton takes it
    if Path(folder, "Python.h").is_file():
        return ""
    return f"Triton needs Python's headers, and {folder} has no Python.h: install python3-dev"


def _cache() -> str:
    """Of a folder that is there, what was compiled can be read even if nothing can be written: that shows later."""
    from triton import knobs

    folder = Path(knobs.cache.dir).absolute()
    above = next(f for f in (folder, *folder.parents) if f.exists())
    if above.is_dir() and (above == folder or os.access(above, os.W_OK | os.X_OK)):
        return ""
    return f"Triton keeps what it compiles in {folder}, which can't be made in {above}: set TRITON_CACHE_DIR"


def _has_launched() -> bool:
    """Whether the module by which Triton launches is there, compiled in an earlier process perhaps."""
    if not torch.cuda.is_available():
        return False
    from triton.runtime import driver

    try:
        return driver.active.utils is not None
    except Exception:
        return False


def launch(kernel: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Run the kernel; `fallbacks.Unusable` where this machine turns out to be unable to compile it.

    Returns:
        what Triton compiled; None in its interpreter
    """
    try:
        return kernel(*arguments, **options)
    except Exception as error:
        if not _is_the_machine(error):
            raise
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        remedy = "take a newer Triton" if unknown_gpu(error) else REMEDY
        raise fallbacks.given_up("triton", f"Triton can't compile here ({text}): {remedy}") from error


def _is_the_machine(error: Exception) -> bool:
    """A compiler that is absent, fails or doesn't know the GPU, a folder that can't be written or loses files, a module
    that can't be loaded; all of it before anything is launched. Any other error is one."""
    if isinstance(error, OSError | ImportError | subprocess.SubprocessError):
        return True
    texts = "Failed to find C compiler", "Could not create or locate cache dir"  # triton.runtime.build, .cache
    return (isinstance(error, RuntimeError) and str(error).startswith(texts)) or unknown_gpu(error)


def unknown_gpu(error: Exception) -> bool:
    """Whether Triton's assembler is older than the GPU: Triton 3.6 and sm_110."""
    return "is not defined for option 'gpu-name'" in str(error)
