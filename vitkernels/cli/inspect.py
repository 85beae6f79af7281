"""Compile every shipped kernel configuration, no GPU needed, and list what its machine code holds.

A default configuration must not spill, must fit the GPU's shared memory and must use its tensor cores (for fp32,
where TF32 is asked for); and no configuration at all may have a hazard: a register that an asynchronous product (wgmma)
still reads, touched before it is waited for. Exit status 1 when one does not hold.

With --extension: the same of the CUDA C++ kernels as they were built. None may spill or have a hazard, and those for
Hopper must use its tensor cores (wgmma) and its copy engine (TMA).
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from . import console_for

HELP = "compile the kernels for GPUs and list registers, spills, tensor-core and copy-engine use, and hazards"
HOPPER = ("sm_90", "sm_90a")  # tools older than the compiler leave out the a


def arguments(parser) -> None:
    parser.add_argument("--arch", default="sm_80,sm_90,sm_100", help="comma-separated (default: %(default)s)")
    parser.add_argument("--patch", default="14,16,32", help="patch sizes, comma-separated (default: %(default)s)")
    parser.add_argument("--dtype", default="bf16,fp16,uint8->bf16,fp32,tf32", help="(default: %(default)s)")
    parser.add_argument("--defaults", action="store_true", help="only configurations that a table picks by itself")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time (default: %(default)s)")
    help = "read the built CUDA C++ kernels instead, or those in FILE: a library, object or cubin"
    parser.add_argument("--extension", metavar="FILE", nargs="?", const="", help=help)


def run(args) -> dict[str, Any]:
    if args.extension is not None:
        return _extension(args)
    os.environ["TRITON_INTERPRET"] = "0"  # for the workers: the interpreter's kernels can't be compiled
    from .. import gpu
    from ..backends.triton.config_cache import compiled_from
    from ..profiling import compile_triton

    # A cache for each version: the lines of a function's callees, which are read here, are not in Triton's key.
    cache = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"
    os.environ["TRITON_CACHE_DIR"] = str(Path(cache, f"vitkernels-{compiled_from()['source']}"))

    known = {f"sm_{n}": n for n in gpu.NOMINAL if n >= gpu.OLDEST}
    archs, patches, dtypes = (getattr(args, n).split(",") for n in ("arch", "patch", "dtype"))
    if old := [arch for arch in archs if arch in {f"sm_{n}" for n in gpu.NOMINAL} and arch not in known]:
        raise ValueError(f"{', '.join(old)}: the kernels need sm_{gpu.OLDEST} or later")
    for values, choices in (
        (archs, known),
        (patches, [str(n) for n in range(1, 225)]),
        (dtypes, compile_triton.DTYPES),
    ):
        if wrong := [v for v in values if v not in choices]:
            raise ValueError(f"{', '.join(wrong)}: must be of {', '.join(choices) if len(choices) < 99 else '1 … 224'}")
    jobs = [
        (known[arch], int(patch), dtype, choice, default)
        for arch in archs
        for patch in patches
        for dtype in dtypes
        for choice, default in _choices(known[arch], int(patch), dtype)
        if default or not args.defaults
    ]
    rows: dict[int, dict[str, Any]] = {}
    with ProcessPoolExecutor(min(args.jobs, len(jobs)), get_context("spawn")) as pool:
        waiting = {pool.submit(_row, *job): i for i, job in enumerate(jobs)}
        for done in _progress(as_completed(waiting), len(jobs), hidden=args.json):
            rows[waiting[done]] = done.result()
    kernels = [rows[i] for i in sorted(rows)]
    return {"ok": not any(_faults(r) for r in kernels), "kernels": kernels}


def _choices(arch: int, patch: int, dtype: str):
    from ..profiling import compile_triton

    return [((p, kernel, c), default) for p, kernel, c, default in compile_triton.shipped(arch, patch, dtype)]


def _row(arch: int, patch: int, dtype: str, choice, default: bool) -> dict[str, Any]:
    from .. import gpu
    from ..profiling import compile_triton

    p, kernel, c = choice
    counted = compile_triton.measure(p, gpu.NOMINAL[arch], compile_triton.DTYPES[dtype][2], (kernel, c))
    config = {name: getattr(c, name) for name in ("BM", "BN", "BK", "warps", "stages")}
    kernel = counted.pop("kernel")
    return {"kernel": kernel, "arch": f"sm_{arch}", "patch": patch, "dtype": dtype, "config": config,
            "default": default, **counted}  # fmt: skip


def _faults(row: dict[str, Any]) -> list[str]:
    """What no configuration, and what a default one, must not have."""
    from .. import gpu

    hazard = [f"{row['hazards']} hazards, the first: {row['first_hazard']}"] * (row["hazards"] > 0)
    if not row["default"]:
        return hazard
    arch = int(row["arch"].removeprefix("sm_"))
    limit = gpu.NOMINAL[arch].shared_bytes
    product = row["dtype"] != "fp32" and row["kernel"] not in ("sums", "kept", "finish")
    needed = None if not product else "wgmma" if arch == 90 else "mma"
    checks = (
        (row["spill_bytes"] > 0, f"{row['spill_bytes']} bytes spilt"),
        (row["shared_bytes"] > limit, f"{row['shared_bytes']} bytes of shared memory, {limit} fit"),
        (needed is not None and row[needed] == 0, f"no {needed}"),
    )
    return hazard + [text for wrong, text in checks if wrong]


def _extension(args) -> dict[str, Any]:
    """Every kernel × architecture in the machine code of a built extension."""
    from ..backends.cuda import extension
    from ..profiling import sass

    if not args.extension and (reason := extension.missing()):
        raise ImportError(reason)
    file = Path(args.extension or str(extension.load().__file__))
    if not file.is_file():
        raise FileNotFoundError(f"{file} is no file")
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        cubins = sass.cubins(file, Path(folder))
        waiting = [pool.submit(_built, arch, cubin) for arch, cubin in cubins]
        for done in _progress(as_completed(waiting), len(cubins), hidden=args.json, what="reading"):
            rows += done.result()
        embedded = sass.ptx(file)
    names = sass.demangled(row["kernel"] for row in rows)
    kernels = [{**row, "kernel": names[row["kernel"]]} for row in rows]
    kernels = [row for row in kernels if "wgmma_" not in row["kernel"] or row["arch"] in HOPPER]  # elsewhere empty
    kernels.sort(key=lambda row: (row["kernel"], int("".join(filter(str.isdigit, row["arch"])))))
    sound = bool(kernels) and not any(_extension_faults(row) for row in kernels)
    return {"ok": sound, "file": str(file), "ptx": embedded, "extension": kernels}


def _built(arch: str, cubin: Path) -> list[dict[str, Any]]:
    from ..profiling import sass
    from ..profiling.hazards import hazards

    usages, code = sass.usages(cubin), sass.functions(sass.disassembly(cubin))
    found = {name: hazards(code[name]) for name in usages}
    return [
        {
            "kernel": name, "arch": arch, "registers": usage.registers, "stack_bytes": usage.stack,
            "shared_bytes": usage.shared, "instructions": sass.instructions(code[name]), **sass.counts(code[name]),
            "cp_async_bytes": sorted(sass.widths(code[name], "LDGSTS")),
            "load_bytes": max(sass.widths(code[name], "LDG"), default=0),
            "hazards": len(found[name]), "first_hazard": next(iter(found[name]), ""),
        }
        for name, usage in usages.items()
    ]  # fmt: skip


def _extension_faults(row: dict[str, Any]) -> list[str]:
    by_wgmma = "wgmma_" in row["kernel"]
    checks = (
        (row["stack_bytes"] > 0, f"{row['stack_bytes']} bytes of stack"),
        (row["spills"] > 0, f"{row['spills']} spills"),
        (row["hazards"] > 0, f"{row['hazards']} hazards, the first: {row['first_hazard']}"),
        (by_wgmma and not row["wgmma"], "no wgmma"),
        (by_wgmma and not row["tma_loads"], "no TMA load"),
    )
    return [text for wrong, text in checks if wrong]


def _progress(items, total: int, hidden: bool, what: str = "compiling"):
    from rich.progress import track

    return track(items, what, total=total, disable=hidden, transient=True)


def show(result: dict[str, Any]) -> None:
    (_show_extension if "extension" in result else _show_tiles)(result)


def _show_extension(result: dict[str, Any]) -> None:
    from rich.table import Table

    columns = {
        "arch": "arch", "registers": "registers", "stack_bytes": "stack bytes", "spills": "LDL/STL",
        "shared_bytes": "static shared bytes", "instructions": "instructions", "wgmma": "wgmma", "mma": "mma",
        "tma_loads": "TMA loads",
        "tma_stores": "TMA stores", "cp_async": "cp.async", "cp_async_bytes": "of bytes", "loads": "loads",
        "load_bytes": "of bytes, up to", "hazards": "hazards",
    }  # fmt: skip
    table = Table("kernel", *columns.values(), "")
    for row in result["extension"]:
        cells = (" ".join(map(str, value)) if isinstance(value := row[n], list) else str(value) for n in columns)
        table.add_row(row["kernel"], *cells, "; ".join(_extension_faults(row)))
    console_for(240).print(table)
    faulty = [f"{row['kernel']} ({row['arch']})" for row in result["extension"] if _extension_faults(row)]
    if result["extension"]:
        print(f"not sound: {', '.join(faulty)}" if faulty else f"all {len(result['extension'])} kernels are sound")
    else:
        print("there is no machine code")
    print(f"{result['file']}; PTX of {', '.join(result['ptx']) or 'none'}")


def _show_tiles(result: dict[str, Any]) -> None:
    from rich.table import Table

    columns = ("kernel", "arch", "patch", "dtype", "registers", "spill_bytes", "shared_bytes", "wgmma", "mma", "tma",
               "load_bytes", "hazards")  # fmt: skip
    table = Table("tile", "default", *(c.replace("_", " ") for c in columns), "")
    for row in result["kernels"]:
        c = row["config"]
        tile = f"{c['BM']}x{c['BN']}x{c['BK']} " * (c["BM"] > 0) + f"{c['warps']}w {c['stages']}s"
        table.add_row(tile, "yes" if row["default"] else "", *(str(row[n]) for n in columns), "; ".join(_faults(row)))
    console_for(150).print(table)
    print("every configuration is sound" if result["ok"] else "a configuration is not sound")
