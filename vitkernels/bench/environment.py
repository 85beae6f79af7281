"""What every figure must carry: the machine, the versions, the commit and the command."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from .. import __version__

# What changes how fast PyTorch is, where it is set.
ENVIRONMENT = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS", "CUDA_LAUNCH_BLOCKING")


def header(device: torch.device | str, command: str) -> dict[str, Any]:
    """What every figure must carry: device, driver, versions, commit, command."""
    device = torch.device(device)
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    root = Path(__file__).resolve().parents[2]
    commit = _output("git", "-C", str(root), "rev-parse", "--short", "HEAD") if (root / ".git").exists() else None
    if commit and _output("git", "-C", str(root), "status", "--porcelain"):
        commit += "+changes"
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "gpu": gpu,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "cpu": f"{_cpu_name()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "triton": triton_version,
        "vitkernels": __version__,
        "commit": commit,
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "command": command,
    }


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
