"""What every figure must carry: the machine, the versions, the commit and the command."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import torch

from .. import __version__, cpu
from ..backends.triton.config_cache import compiled_from

# What changes how fast PyTorch is, where it is set.
ENVIRONMENT = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS", "CUDA_LAUNCH_BLOCKING")


def header(device: torch.device | str, command: str) -> dict[str, Any]:
    """What every figure must carry: device, driver, versions, commit, command."""
    device = torch.device(device)
    root = Path(__file__).resolve().parents[2]
    commit = output("git", "-C", str(root), "rev-parse", "--short", "HEAD") if (root / ".git").exists() else None
    if commit and output("git", "-C", str(root), "status", "--porcelain"):
        commit += "+changes"
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    capability = torch.backends.cpu.get_cpu_capability()  # PyTorch's own, as it was built or told
    processor = (cpu.name(), f"{torch.get_num_threads()} threads", capability, *cpu.instructions()[:3])
    return {
        "gpu": gpu,
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "cpu": ", ".join(processor),
        "torch": torch.__version__,
        "triton": compiled_from()["triton"],
        "vitkernels": __version__,
        "commit": commit,
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "command": command,
    }


def output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
