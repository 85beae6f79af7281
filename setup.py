"""Builds `vitkernels._cuda`, the CUDA C++ kernels of csrc/, where that can be done; all else is in pyproject.toml.

Environment (docs/wheels.md says more):

    VITKERNELS_CUDA       auto (default): build where nvcc is found, and a GPU is visible or TORCH_CUDA_ARCH_LIST set;
                          a build that fails leaves an installation without the extension. 1: build or fail. 0: never.
    TORCH_CUDA_ARCH_LIST  as torch reads it, e.g. "8.0 8.6 9.0+PTX"; default: the visible GPUs, and without one ARCHS
    CUDACXX, CUDA_HOME    where nvcc is, before PATH
    MAX_JOBS              compilers at a time (default: one a core)

What was built, or why nothing was, is written beside the modules: vitkernels/_cuda_build.json.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, PlatformError

OLDEST_NVCC = 12.8  # the first that knows sm_100
OLDEST_ARCH = 8.0  # cp.async, and products of bf16
ARCHS = "8.0+PTX 9.0a 10.0"  # 8.x runs the code of 8.0, 10.x that of 10.0; 11.0 and 12.x compile the PTX as they load
NAMED = {  # torch's names, the longer ones first; before Ampere there is nothing to build
    **dict.fromkeys(("native", "Maxwell+Tegra", "Maxwell", "Pascal", "Volta+Tegra", "Volta", "Turing"), ""),
    "Ampere+Tegra": "8.7", "Ampere": "8.0 8.6+PTX", "Ada": "8.9+PTX", "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0", "Blackwell": "10.0 10.3 12.0 12.1+PTX",
}  # fmt: skip
FLAGS = ["-x", "cu", "-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden",
         "--expt-relaxed-constexpr", "--compress-mode=size", "-DVITKERNELS_MODULE=_cuda", "-I", "csrc"]  # fmt: skip
# No relocatable device code, hence no device link; nvcc links the CUDA runtime statically, and it is kept private.
LINK = ["-shared", "--no-device-link", "-Xlinker", "--strip-all,--exclude-libs,ALL"]
READ_BY_NVCC = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN")


class Tools(NamedTuple):
    nvcc: str
    version: str
    archs: list[str]


def find_tools(mode: str) -> Tools:
    """What to build with, and for which GPUs; PlatformError says why the extension is not built."""
    if mode == "0":
        raise PlatformError("VITKERNELS_CUDA was 0")
    if sys.platform != "linux":
        raise PlatformError(f"it is built on Linux only, and this is {sys.platform}")
    if not Path("csrc/bindings.cpp").exists():
        raise PlatformError("csrc/bindings.cpp is not there")
    home = os.environ.get("CUDA_HOME")
    places = (os.environ.get("CUDACXX"), home and os.path.join(home, "bin", "nvcc"), "nvcc")
    nvcc = next((found for place in places if place and (found := shutil.which(place))), None)
    if nvcc is None:
        raise PlatformError("nvcc was not found (CUDACXX, CUDA_HOME, PATH)")
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise PlatformError(f"{nvcc} does not run: {error}") from None
    release = re.search(r"\bV((\d+\.\d+)\.\d+)", said.stdout)
    if release is None:
        raise PlatformError(f"{nvcc} --version names no version: {(said.stdout + said.stderr).strip()[-200:]}")
    if float(release[2]) < OLDEST_NVCC:
        raise PlatformError(f"nvcc {release[1]} is too old, {OLDEST_NVCC} or later is needed")
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace("native", "").strip()
    gpus = " ".join(visible_gpus())
    archs = arch_list(listed or gpus or (ARCHS if mode == "1" else ""))
    if not archs:
        raise PlatformError(
            f"no GPU of compute capability {OLDEST_ARCH} or later was asked for or visible: "
            f"TORCH_CUDA_ARCH_LIST is {listed!r}, visible {gpus or 'none'}"
        )
    if find_spec("pybind11") is None:
        raise PlatformError("pybind11 was not installed")
    return Tools(nvcc, release[1], archs)


def visible_gpus() -> list[str]:
    """Compute capabilities, each once, e.g. ["8.0", "9.0"]."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout.split()
    except (OSError, subprocess.SubprocessError):  # a driver that hangs or is gone: as good as no GPU
        return []
    return sorted({line for line in said if re.fullmatch(r"\d+\.\d", line)}, key=float)


def arch_list(text: str) -> list[str]:
    """TORCH_CUDA_ARCH_LIST -> e.g. ["8.0", "8.6+PTX", "9.0a"], each once, without those before OLDEST_ARCH.

    9.0 becomes 9.0a, as only this arch-specific target has wgmma. PTX of 9.0a would run on 9.0 alone, so that 9.0+PTX
    stays as it is: machine code of 9.0a and PTX of 9.0.
    """
    for name, archs in NAMED.items():
        text = text.replace(name, archs)
    found = re.findall(r"[^;,\s]+", text)
    if wrong := [arch for arch in found if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch)]:
        raise PlatformError(f"TORCH_CUDA_ARCH_LIST: {', '.join(wrong)} is not of the kind of 8.0, 9.0a or 10.0+PTX")
    recent = [arch for arch in found if float(arch.rstrip("+PTXaf")) >= OLDEST_ARCH]
    return list(dict.fromkeys("9.0a" if arch == "9.0" else arch for arch in recent))


def gencode(archs: list[str]) -> list[str]:
    """nvcc's arguments for them."""
    targets = []
    for arch in archs:
        name, _, ptx = arch.replace(".", "").partition("+")
        code = "90a" if name == "90" else name
        targets += [f"arch=compute_{code},code=sm_{code}"] + [f"arch=compute_{name},code=compute_{name}"] * bool(ptx)
    return [f"-gencode={target}" for target in targets]


def build(tools: Tools, sources: list[Path], target: Path) -> dict:
    """Compile each source in a process of its own and link them all to `target`; the record of it."""
    import pybind11

    start, flags = time.perf_counter(), [*FLAGS, *gencode(tools.archs)]
    made_with = (tools.version, flags, [os.environ.get(name) for name in READ_BY_NVCC])
    folder = Path("build", f"csrc-{hashlib.sha256(repr(made_with).encode()).hexdigest()[:12]}")
    folder.mkdir(parents=True, exist_ok=True)
    headers = max((f.stat().st_mtime for f in Path("csrc").rglob("*") if f.is_file() and f not in sources), default=0)
    # Of Python only the bindings know.
    python = f"-pybind11-{pybind11.__version__}{sysconfig.get_config_var('EXT_SUFFIX')}"
    names = {source: "-".join(source.relative_to("csrc").parts) for source in sources}
    objects = {source: folder / f"{names[source]}{python * (source.suffix == '.cpp')}.o" for source in sources}
    stale = [s for s, o in objects.items() if not o.exists() or o.stat().st_mtime <= max(headers, s.stat().st_mtime)]
    jobs = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
    threads = ["--threads", str(-(-jobs // max(1, len(stale))))]  # architectures of one file beside each other
    includes = ["-I", pybind11.get_include(), "-I", sysconfig.get_path("include")]

    def make(source: Path) -> None:
        began, part = time.perf_counter(), objects[source].with_suffix(".part.o")
        call([tools.nvcc, *flags, *includes, *threads, "-c", str(source), "-o", str(part)], str(source))
        part.replace(objects[source])  # whole, or not there
        print(f"{source}: {time.perf_counter() - began:.0f} s", flush=True)

    print(f"nvcc {tools.version} for {', '.join(tools.archs)}: {len(stale)} of {len(sources)} files", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(make, source) for source in sorted(stale, key=lambda s: s.suffix, reverse=True)]
        try:
            for done in waiting:
                done.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after an error the others need not begin
    target.parent.mkdir(parents=True, exist_ok=True)
    call([tools.nvcc, *LINK, *map(str, objects.values()), "-o", str(target)], target.name)
    return {"built": True, "nvcc": tools.version, "archs": tools.archs, "flags": flags, "file": target.name,
            "seconds": round(time.perf_counter() - start, 1)}  # fmt: skip


def call(command: list[str], what: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout, end="", file=sys.stderr, flush=True)
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()] or ["it said nothing"]
        first = next((line for line in lines if re.search(r"\b(error|fatal)\b", line)), lines[-1])
        raise CompileError(f"nvcc failed on {what} with exit status {done.returncode}: {first}")


def settle(folder: Path, record: dict) -> None:
    """Write the record into the package in `folder`; where nothing was built, an older extension goes."""
    for old in [] if record["built"] else folder.glob("_cuda.*.so"):
        old.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_cuda_build.json").write_text(json.dumps(record, indent=1) + "\n")


class BuildPython(build_py):
    def run(self):
        super().run()
        if not self.distribution.ext_modules:
            folder = "." if self.editable_mode else self.build_lib
            settle(Path(folder, "vitkernels"), {"built": False, "reason": REASON})


class BuildExtension(build_ext):  # setuptools knows no nvcc
    def run(self):
        self.record = {"built": False, "reason": REASON}
        super().run()
        settle(Path("." if self.inplace else self.build_lib, "vitkernels"), self.record)

    def build_extension(self, ext):
        if TOOLS is None:
            raise PlatformError(f"VITKERNELS_CUDA is 1, but the CUDA C++ extension can't be built: {REASON}")
        target = Path(self.get_ext_fullpath(ext.name))
        target.unlink(missing_ok=True)
        try:
            self.record = build(TOOLS, list(map(Path, ext.sources)), target)
        except CompileError as error:  # of which setuptools makes a warning, where the extension is optional
            self.record = {"built": False, "reason": str(error)}
            raise


if __name__ == "__main__":
    MODE = os.environ.get("VITKERNELS_CUDA") or "auto"
    if MODE not in ("auto", "0", "1"):
        raise SystemExit(f"VITKERNELS_CUDA must be auto, 0 or 1, got {MODE!r}")
    try:
        TOOLS, REASON = find_tools(MODE), ""
    except PlatformError as error:
        TOOLS, REASON = None, str(error)
    extension = Extension(
        "vitkernels._cuda",
        sorted(str(file) for file in Path("csrc").rglob("*.c*") if file.suffix in (".cpp", ".cu")),
        optional=MODE == "auto",
    )
    setup(
        ext_modules=[extension] if TOOLS or MODE == "1" else [],
        cmdclass={"build_py": BuildPython, "build_ext": BuildExtension},
    )
