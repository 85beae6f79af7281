"""What this machine's processor is: its name, its maker, its instructions."""

from __future__ import annotations

import platform
import subprocess
from functools import lru_cache
from pathlib import Path

# Those that PyTorch's products are written for, newest first, as Linux calls them.
INSTRUCTIONS = ("amx_fp16", "amx_bf16", "avx512_fp16", "avx512_bf16", "avx512f", "avx2")


@lru_cache(maxsize=1)
def _described() -> dict[str, str]:
    """What Linux says of the first core; elsewhere nothing."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


@lru_cache(maxsize=1)
def name() -> str:
    if found := _described().get("model name"):
        return f"{found} (Zen 5)" if is_zen5() else found
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            pass
    return platform.processor() or platform.machine()


@lru_cache(maxsize=1)
def is_intel() -> bool:
    """Whether MKL takes its own fast way: on no other maker's processors."""
    return "Intel" in _described().get("vendor_id", platform.processor())


@lru_cache(maxsize=1)
def is_zen5() -> bool:
    """Whether it is AMD's with units of 512 bits, Zen 5 or later: Zen 4 takes AVX-512's instructions in halves."""
    described = _described()
    return described.get("vendor_id") == "AuthenticAMD" and int(described.get("cpu family", 0)) >= 26


@lru_cache(maxsize=1)
def instructions() -> tuple[str, ...]:
    """Of `INSTRUCTIONS`, where Linux tells."""
    flags = _described().get("flags", "").split()
    return tuple(flag for flag in INSTRUCTIONS if flag in flags)
