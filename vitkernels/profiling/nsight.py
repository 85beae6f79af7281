"""Nsight Compute (`ncu`) and Nsight Systems (`nsys`): the commands, what their output says, in words what it means.

What is read is the raw page of ncu's CSV: a row a kernel, a column a metric, units in a row of their own. Names:
NVIDIA's documents of Nsight Compute, "Nsight Compute CLI" and "Profiling Guide". Metrics differ by architecture and by
version; what is not there is None, never an error.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SECTIONS = (
    "SpeedOfLight", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis", "Occupancy", "LaunchStats", "WarpStateStats",
    "SchedulerStats",
)  # fmt: skip
PERCENT = ".avg.pct_of_peak_sustained_elapsed"
# What the table needs, name -> metrics, the first that is there; asked for beside the sections, whose sets change.
NEEDED: dict[str, tuple[str, ...]] = {
    "seconds": ("gpu__time_duration.sum",),
    "read": ("dram__bytes_read.sum",),
    "written": ("dram__bytes_write.sum",),
    "dram_bytes_per_s": ("dram__bytes.sum.per_second",),
    "dram_percent": ("gpu__dram_throughput" + PERCENT, "dram__throughput" + PERCENT),
    "l2_bytes_per_s": ("lts__t_bytes.sum.per_second",),
    "l2_percent": ("lts__throughput" + PERCENT,),
    "l2_hit_percent": ("lts__t_sector_hit_rate.pct",),
    "sm_percent": ("sm__throughput" + PERCENT,),
    # Hopper counts wgmma here too, and under pipe_tensor_op_hmma; where the name is another, see `_tensor`.
    "tensor_percent": ("sm__pipe_tensor_cycles_active" + PERCENT,),
    "registers": ("launch__registers_per_thread",),
    "shared_dynamic": ("launch__shared_mem_per_block_dynamic",),
    "shared_static": ("launch__shared_mem_per_block_static",),
    "waves": ("launch__waves_per_multiprocessor",),
    "occupancy_percent": ("sm__warps_active.avg.pct_of_peak_sustained_active",),
    "occupancy_possible_percent": ("sm__maximum_warps_per_active_cycle_pct",),
}
TENSOR = re.compile(r"sm__(?:inst_executed_)?pipe_tensor\w*\.avg\.pct_of_peak_sustained_(?:active|elapsed)")
STALL = re.compile(r"smsp__average_warps?(?:_latency)?_issue_stalled_(\w+?)(?:_per_issue_active)?\.ratio")
WHY = {
    "barrier": "other warps at a barrier", "branch_resolving": "a branch", "dispatch_stall": "the dispatcher",
    "drain": "stores to leave", "gmma": "the tensor cores' products (wgmma)", "imc_miss": "constants",
    "lg_throttle": "room in the queue of global memory", "long_scoreboard": "data from global memory or L2",
    "math_pipe_throttle": "a free arithmetic pipe", "membar": "a memory fence", "mio_throttle":
    "room in the queue of shared memory", "misc": "something else", "no_instruction": "instructions to be fetched",
    "not_selected": "its turn, as others were ready", "short_scoreboard": "data from shared memory",
    "sleeping": "nothing: it slept", "tex_throttle": "room in the queue of textures", "wait": "a fixed latency",
    "warpgroup_arrive": "the other warps of its group (wgmma)",
}  # fmt: skip

PLACES = {
    "ncu": ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute/*"),
    "nsys": ("/usr/local/cuda/bin", "/opt/nvidia/nsight-systems/*/bin", "/opt/nvidia/nsight-systems-cli/*/bin"),
}


def tool(name: str) -> str | None:
    """Where ncu or nsys is: on PATH, or the newest of where NVIDIA installs it."""
    if found := shutil.which(name):
        return found
    places = [p for where in PLACES[name] for p in sorted(Path("/").glob(f"{where[1:]}/{name}"), reverse=True)]
    return next((str(p) for p in places if os.access(p, os.X_OK)), None)


def ncu_commands(ncu: str, report: Path, target: Sequence[str], *, metrics: bool = True) -> list[list[str]]:
    """Count what the kernels do between the start and the stop of CUDA's profiler; print the report as CSV.

    Caches are flushed before every pass (ncu's default), as `vitkernels bench` times from a cold one; clocks are left
    alone. `metrics` False: the sections only, for an ncu that doesn't know one of the names.
    """
    wanted = [name for names in NEEDED.values() for name in names]
    return [
        [
            ncu, "--profile-from-start", "off", "--nvtx", "--target-processes", "all", "--clock-control", "none",
            "--launch-count", "16", *(word for section in SECTIONS for word in ("--section", section)),
            *(("--metrics", ",".join(wanted)) if metrics else ()),
            "--force-overwrite", "--export", str(report), *target,
        ],
        [ncu, "--import", str(report), "--page", "raw", "--csv", "--print-units", "base"],
    ]  # fmt: skip


def nsys_command(nsys: str, report: Path, target: Sequence[str]) -> list[str]:
    return [
        nsys, "profile", "--trace", "cuda,nvtx", "--sample", "none", "--cpuctxsw", "none",
        "--capture-range", "cudaProfilerApi", "--capture-range-end", "stop",
        "--force-overwrite", "true", "--output", str(report), *target,
    ]  # fmt: skip


def run(command: Sequence[str], seconds: float = 300.0, **environment: str) -> tuple[str, str | None]:
    """(what it printed, what went wrong in words). Past `seconds` it is ended, with what it started."""
    source = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        command, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL, start_new_session=True, env={**os.environ, "PYTHONPATH": source, **environment},
    )  # fmt: skip
    try:
        text, _ = process.communicate(timeout=seconds)
    except BaseException as error:
        (os.killpg if hasattr(os, "killpg") else os.kill)(process.pid, getattr(signal, "SIGKILL", signal.SIGTERM))
        text, _ = process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return text, f"it was ended after {seconds:.0f} s"
    return text, problem_in(text, process.returncode)


def problem_in(text: str, status: int = 0) -> str | None:
    """What ncu's or nsys's messages mean, with what to do about it."""
    if "ERR_NVGPUCTRPERM" in text:
        return (
            "the driver lets only root read the GPU's counters (ERR_NVGPUCTRPERM): run the command with sudo; or load "
            "the driver's module with NVreg_RestrictProfilingToAdminUsers=0, in /etc/modprobe.d, and reboot; in a "
            "container, on such a host or with --cap-add=SYS_ADMIN. https://developer.nvidia.com/ERR_NVGPUCTRPERM"
        )
    errors = [line.partition("==ERROR== ")[2].strip() for line in text.splitlines() if line.startswith("==ERROR==")]
    if errors:
        return "; ".join(errors)[:500]
    if "No kernels were profiled" in text:
        return "it saw no kernel: the call failed before it launched one, or launched none"
    if status:
        lines = text.strip().splitlines() or ["no output"]
        return f"exit status {status}: {lines[-1][:300]}"
    return None


def profiled(ncu: str, report: Path, target: Sequence[str], seconds: float = 300.0) -> dict[str, Any]:
    """Run ncu, `seconds` in all, and read what it counted: {"kernels" (`parse`d, tabled), "files"}, or {"problem"}."""
    stop = time.monotonic() + seconds
    for metrics in (True, False):
        collect, read = ncu_commands(ncu, report, target, metrics=metrics)
        text, problem = run(collect, max(1.0, stop - time.monotonic()))
        if not (problem and "metric" in problem.lower()):
            break
    if problem is None:
        text, problem = run(read, max(1.0, stop - time.monotonic()), LC_ALL="C")  # numbers with a point
    if problem is not None:
        return {"problem": problem}
    file = report.with_suffix(".csv")
    file.write_text(text)
    kernels = [row(kernel) for kernel in parse(text)]
    return {"kernels": kernels, "files": [str(report), str(file)], **({} if kernels else {"problem": "empty report"})}


# --- The CSV.

UNITS = {
    "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9, "second": 1.0, "msecond": 1e-3, "usecond": 1e-6, "nsecond": 1e-9,
    "byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "Tbyte": 1e12,
}  # fmt: skip


def parse(text: str) -> list[dict[str, Any]]:
    """Kernels in ncu's CSV, whatever stands around it: {"kernel", "grid", "block", "metrics"}; metrics in seconds,
    bytes, bytes a second, percent. What is no number ("n/a", a policy's name) is left out."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID","')), len(lines))
    head, *cells = list(csv.reader(line for line in lines[start:] if line.startswith('"'))) or [[]]
    units: dict[str, str] = {}
    found = []
    for cell in cells:
        line = dict(zip(head, cell, strict=False))
        if not line.get("ID"):
            units = line
            continue
        numbers = ((name, _number(text, units.get(name, ""))) for name, text in line.items() if "__" in name)
        found.append({**_kernel(line), "metrics": {name: n for name, n in numbers if n is not None}})
    return found


def _kernel(line: Mapping[str, str]) -> dict[str, Any]:
    sizes = ([int(n) for n in re.findall(r"\d+", line.get(name, ""))] for name in ("Grid Size", "Block Size"))
    return {"kernel": line.get("Kernel Name", "?"), **dict(zip(("grid", "block"), sizes, strict=True))}


def _number(text: str, unit: str) -> float | None:
    try:
        return float(text.replace(",", "")) * UNITS.get(unit.partition("/")[0], 1.0)
    except ValueError:
        return None


# --- What it means.


def row(kernel: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the table: {"kernel", "us", "dram_gb_per_s", "dram_percent", "l2_gb_per_s", "l2_percent",
    "l2_hit_percent", "tensor_percent", "sm_percent", "registers", "shared_bytes", "occupancy_percent",
    "occupancy_possible_percent", "waves", "stalls" (reason -> cycles an instruction, the longest three), "cycles" (of a
    warp, an instruction), "reading"}; None for what was not counted. Percent are of the GPU's own peaks."""
    metrics: Mapping[str, float] = kernel["metrics"]
    got = {name: next((metrics[m] for m in names if m in metrics), None) for name, names in NEEDED.items()}
    rate, seconds = got["dram_bytes_per_s"], got["seconds"]
    if rate is None and seconds and got["read"] is not None and got["written"] is not None:
        rate = (got["read"] + got["written"]) / seconds
    shared = [v for v in (got["shared_dynamic"], got["shared_static"]) if v is not None]
    stalls = {m[1]: value for name, value in metrics.items() if (m := STALL.fullmatch(name)) and value > 0}
    waits = {name: value for name, value in stalls.items() if name != "selected" and not name.endswith("not_issued")}
    found: dict[str, Any] = {
        "kernel": kernel["kernel"], "grid": kernel["grid"], "block": kernel["block"],
        "us": seconds and seconds * 1e6,
        "dram_gb_per_s": rate and rate / 1e9,
        "l2_gb_per_s": got["l2_bytes_per_s"] and got["l2_bytes_per_s"] / 1e9,
        **{k: got[k] for k in ("dram_percent", "l2_percent", "l2_hit_percent", "sm_percent")},
        "tensor_percent": _tensor(metrics) if got["tensor_percent"] is None else got["tensor_percent"],
        "registers": got["registers"] and int(got["registers"]),
        "shared_bytes": int(sum(shared)) if shared else None,
        **{k: got[k] for k in ("occupancy_percent", "occupancy_possible_percent", "waves")},
        "stalls": dict(sorted(waits.items(), key=lambda item: -item[1])[:3]),
        "cycles": sum(v for k, v in stalls.items() if not k.endswith("not_issued")) or None,
    }  # fmt: skip
    return found | {"reading": reading(found)}


def _tensor(metrics: Mapping[str, float]) -> float | None:
    """The busiest of the tensor pipe's own counters: its cycles where they are counted, else its instructions."""
    for part in ("sm__pipe_tensor", "sm__inst_executed_pipe_tensor"):
        values = [v for name, v in metrics.items() if name.startswith(part) and TENSOR.fullmatch(name)]
        if values:
            return max(values)
    return None


def reading(found: Mapping[str, Any]) -> str:
    """A line of the table in words."""
    names = {
        "dram_percent": "memory", "l2_percent": "L2", "tensor_percent": "tensor pipe", "sm_percent": "multiprocessors",
    }  # fmt: skip
    shares = {name: found[key] for key, name in names.items() if found[key] is not None}
    if not shares:
        return "nothing was counted that says what bounds it"
    top = max(shares, key=lambda name: shares[name])
    rest = ", ".join(f"{name} at {share:.0f} %" for name, share in shares.items() if name != top)
    if shares[top] >= 60:
        text = f"{top}-bound at {shares[top]:.0f} %" + f", {rest}" * bool(rest)
    else:
        text = f"bound by latency: {top} at {shares[top]:.0f} % is the most" + f", {rest}" * bool(rest)
    if found["stalls"]:
        stall, cycles = next(iter(found["stalls"].items()))
        text += f"; main stall {stall}, {cycles:.1f} of {found['cycles']:.1f} cycles"
        text += f": a warp waits for {WHY[stall]}" if stall in WHY else ""
    return text
