"""What a GPU's machine code holds: registers, stack, shared memory, and the instructions that matter for speed.

Read with `cuobjdump` and `nvdisasm`: those that Triton's wheel carries, or else those on PATH. No GPU is needed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

COUNTED = {
    "wgmma": r"[HQI]GMMA",
    "mma": r"(?:[HDIQ]MMA|UTC[A-Z]*MMA)",  # mma.sync and tcgen05
    "tma_loads": r"UTMALDG",
    "tma_stores": r"UTMASTG",
    "cp_async": r"LDGSTS",
    "loads": r"LDG",
    "spills": r"(?:LDL|STL)",
}
SHORT = (  # in turn, for names of kernels
    (r"\((?:anonymous namespace|[\w: ]+)\)(?:::|(?=[-\w]))", ""),  # of casts the value is left
    (r"\([^()]*\)$", ""),  # parameters
    (r"^void ", ""),
    (r"\b[A-Za-z_]\w*::", ""),
    (r"\b__(?:nv_)?(half|bfloat16)\b", r"\1"),
    (r"\bunsigned char\b", "uint8"),
    (r"> (?=>)", ">"),
)
BYTES = ((r"\.256\b", 32), (r"\.128\b", 16), (r"\.64\b", 8), (r"\.[US]16\b", 2), (r"\.[US]8\b", 1))


class Usage(NamedTuple):
    registers: int
    stack: int
    shared: int  # static; from sm_90 on with the 1,024 bytes that are the system's


def usages(file: Path) -> dict[str, Usage]:
    """Of every function in a cubin."""
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", _run("cuobjdump", "-res-usage", file))
    return {name: Usage(*map(int, numbers)) for name, *numbers in found}


def disassembly(file: Path, *options: str) -> str:
    """The code of a cubin."""
    return _run("nvdisasm", *options, "-c", file)


def functions(sass: str) -> dict[str, str]:
    """A disassembly cut into its functions."""
    _, *pieces = re.split(r"^\s*\.section\s+\.text\.([^\s,]+).*\n", sass, flags=re.MULTILINE)
    return dict(zip(pieces[::2], pieces[1::2], strict=True))


def counts(sass: str) -> dict[str, int]:
    """How often the instructions of COUNTED stand in it."""
    return {name: len(re.findall(rf"\b{pattern}\b", sass)) for name, pattern in COUNTED.items()}


def instructions(sass: str) -> int:
    return len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/", sass, flags=re.MULTILINE))


def widths(sass: str, pattern: str) -> set[int]:
    """Bytes that one thread moves with each of these instructions."""
    return {width(modifiers) for modifiers in re.findall(rf"\b{pattern}\b((?:\.\w+)*)", sass)}


def width(modifiers: str) -> int:
    """.E.128.CONSTANT -> 16; .LTC128B says what the cache fetches, not what the thread gets."""
    return next((n for mark, n in BYTES if re.search(mark, modifiers)), 4)


def cubins(file: Path, folder: Path) -> list[tuple[str, Path]]:
    """(architecture, cubin), in `folder`, for each that an object, library or executable holds. ValueError where two
    have one name, which without compression is that of their source: one would be lost."""
    names = re.findall(r"\S+\.cubin$", _run("cuobjdump", "-lelf", file.resolve()), re.MULTILINE)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{file} holds several of {', '.join(twice)}: their sources' files must be named differently")
    _run("cuobjdump", "-xelf", "all", file.resolve(), cwd=folder)
    found = [(re.search(r"\.(sm_\w+)\.cubin$", path.name), path) for path in sorted(folder.glob("*.cubin"))]
    return [(name[1], path) for name, path in found if name]


def ptx(file: Path) -> list[str]:
    """Architectures of which it holds PTX."""
    return sorted(set(re.findall(r"\.(sm_\w+)\.ptx$", _run("cuobjdump", "-lptx", file), re.MULTILINE)))


@lru_cache(maxsize=64)  # some kernels are the same for several dtypes
def read(cubin: bytes) -> tuple[Usage, str]:
    """Of a cubin with one kernel: what it uses, and its code with the source lines."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        (usage,) = usages(file).values()
        text = disassembly(file, "-g", "-ndf")  # without the search for where indirect jumps lead: a third of the time
        return usage, disassembly(file, "-g") if re.search(r"\b(BRX|JMX)\b", text) else text


def demangled(names: Iterable[str]) -> dict[str, str]:
    """C++ names as people read them: without return type, parameters and namespaces; as they are without c++filt."""
    names = list(names)
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return {name: name for name in names}
    said = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return {name: _short(full) for name, full in zip(names, said.splitlines(), strict=True)}


def _short(name: str) -> str:
    for pattern, text in SHORT:
        name = re.sub(pattern, text, name)
    return name


@lru_cache
def _tool(name: str) -> str:
    spec = find_spec("triton")
    carried = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name if spec and spec.origin else None
    found = str(carried) if carried and carried.exists() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} was found neither in Triton's wheel nor on PATH")
    return found


def _run(tool: str, *arguments: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run([_tool(tool), *map(str, arguments)], capture_output=True, text=True, cwd=cwd, check=False)
    if done.returncode:
        raise OSError(f"{tool} failed with exit status {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return done.stdout
