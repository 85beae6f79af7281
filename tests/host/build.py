"""The C++ of csrc/ as a Python module for a CPU: every kernel on tests/host/emulator.h.

    module = load()                      # all of csrc/
    module = load(sources_dir=mutated)   # of a copy of csrc/, changed

Objects and modules lie in build/host/, named by a hash of all that they are made of.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build" / "host"
KEPT_SECONDS = 3 * 24 * 3600  # that a file is kept in the cache without being used

FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-parameter"]
EMULATOR = HERE / "emulator.cpp"
HEADERS = (".h", ".cuh", ".inc")
STANDARD = ("algorithm", "cmath", "cstring", "mutex", "set", "stdexcept", "string", "type_traits")


class BuildError(RuntimeError):
    """The compiler's own words."""


def compiler() -> str:
    wanted = os.environ.get("CXX", "g++")
    found = shutil.which(shlex.split(wanted)[0]) if wanted else None
    if found is None:
        pytest.skip(f"no C++ compiler: {wanted!r} is not on the PATH (CXX names another)")
    return found


def include_flags(directories: list[Path]) -> list[str]:
    try:
        import pybind11
    except ImportError:
        pytest.skip("no pybind11")
    python = sysconfig.get_paths()
    if not Path(python["include"], "Python.h").exists():
        pytest.skip(f"no Python.h in {python['include']}")
    system = dict.fromkeys([pybind11.get_include(), python["include"], python["platinclude"]])
    return [f"-I{d}" for d in directories] + [f"-isystem{d}" for d in system]


@functools.cache
def version_of(program: str) -> str:
    return subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout


def key_of(*parts: object) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else str(part).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:20]


def checked(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}"[:20000])


def made(target: Path, command: list[str]) -> Path:
    """`target`, a file of the cache, by this command where no earlier call has made it; whole, or not there."""
    if target.exists():
        os.utime(target)
    else:
        part = target.with_suffix(".part")
        checked([*command, "-o", str(part)])
        part.rename(target)
    return target


def remove_old() -> None:
    for path in CACHE.iterdir():
        # A part may get its name meanwhile: nvcc's code (test_inspect.py) waits for no other compiler.
        with contextlib.suppress(FileNotFoundError):
            if path.name != "lock" and time.time() - path.stat().st_mtime > KEPT_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def alone():
    """Of pytest-xdist's workers one builds; the others find it done."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        remove_old()
        yield


def standard(flags: tuple[str, ...]) -> Path:
    """A header of what the kernels include of the standard library, precompiled: a third of a kernel's time."""
    program = compiler()
    header = CACHE / f"standard-{key_of(version_of(program), STANDARD, *FLAGS, *flags)}.h"
    header.write_text("".join(f"#include <{name}>\n" for name in STANDARD))
    made(header.with_name(f"{header.name}.gch"), [program, *FLAGS, *flags, "-x", "c++-header", str(header)])
    return header


def compiled(name: str, sources: list[Path], include: list[Path], flags: tuple[str, ...] = ()) -> list[Path]:
    """The sources' objects, compiled where no earlier call has done so."""
    program = compiler()
    common = [*FLAGS, *flags, f"-DVITKERNELS_MODULE={name}", *include_flags(include)]
    headers = sorted(h for d in [*include[:-1], HERE] for h in d.rglob("*") if h.suffix in HEADERS)
    # Directories don't count, or a copy of csrc/ with one kernel changed would compile all of them again.
    options = [version_of(program), *(f for f in common if f not in {f"-I{d}" for d in include})]
    shared = key_of(*options, *(part for h in headers for part in (h.name, h)))
    precompiled = ["-include", str(standard(flags))]

    def object_of(source: Path) -> Path:
        own = ["-O3"] if source == EMULATOR else []  # it does the arithmetic
        target = CACHE / f"{source.stem}-{key_of(shared, *own, source)}.o"
        return made(target, [program, *common, *(own or precompiled), "-x", "c++", "-c", str(source)])

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(object_of, sources))


def linked(name: str, objects: list[Path]) -> ModuleType:
    """The module `name` of these objects, imported."""
    folder = CACHE / f"{name}-{key_of(name, *(o.name for o in objects))}"
    target = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if target.exists():
        os.utime(folder)
    else:
        folder.mkdir(exist_ok=True)
        part = folder / "part"
        checked([compiler(), "-shared", *map(str, objects), "-o", str(part)])
        part.rename(target)
    # The folder is part of the name: pybind11 returns the module it has where it has one of the same name.
    full_name = f"{folder.name}.{name}"
    loader = importlib.machinery.ExtensionFileLoader(full_name, str(target))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(full_name, loader))
    loader.exec_module(module)
    return module


def build(name: str, sources: list[Path], include: list[Path], flags: tuple[str, ...] = ()) -> ModuleType:
    """The module `name` of these sources, compiled where no earlier call has done so, and imported."""
    with alone():
        return linked(name, compiled(name, sources, include, flags))


def kernels(csrc: Path) -> list[Path]:
    """What the extension is made of beside its Python module."""
    return [EMULATOR, *sorted(csrc.rglob("*.cu"))]


@functools.cache
def load(sources_dir: Path | str | None = None) -> ModuleType:
    """The extension of csrc/, or of the folder given, as the module `_host`."""
    csrc = Path(sources_dir or ROOT / "csrc").resolve()
    return build("_host", [csrc / "bindings.cpp", *kernels(csrc)], [csrc, HERE.parent])


@functools.cache
def arithmetic() -> ModuleType:
    """tests/host/arithmetic.cpp: what the extension computes without data. It is named as the extension is, whose
    objects then are its own."""
    csrc = ROOT / "csrc"
    return build("_host", [HERE / "arithmetic.cpp", *kernels(csrc)], [csrc, HERE.parent])


def mutated(source: str, *changes: tuple[str, str, str]) -> ModuleType:
    """The extension with `source` compiled from a copy of csrc/ with these changes, (file, old text, new text) each;
    everything else is as `load` has it."""
    csrc = ROOT / "csrc"
    others = [s for s in (csrc / "bindings.cpp", *kernels(csrc)) if s != csrc / source]
    with tempfile.TemporaryDirectory() as folder, alone():
        copy = Path(shutil.copytree(csrc, Path(folder, "csrc")))
        for file, old, new in changes:
            text = (copy / file).read_text()
            if text.count(old) != 1:
                raise ValueError(f"{file} has {text.count(old)} times, not once: {old}")
            (copy / file).write_text(text.replace(old, new))
        # First: of inline functions that several objects have, the linker takes the first.
        objects = compiled("_host", [copy / source], [copy, HERE.parent], ("-O0",))  # compiled longer than it runs
        return linked("_host", objects + compiled("_host", others, [csrc, HERE.parent]))


@functools.cache
def probe() -> ModuleType:
    """tests/host/probe.cpp: small kernels that prove the primitives."""
    return build("_probe", [EMULATOR, HERE / "probe.cpp"], [ROOT / "csrc", HERE.parent])
