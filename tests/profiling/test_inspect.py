"""What the compilers make of the shipped defaults, on a machine without a GPU."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from host import build

from vitkernels import cli
from vitkernels.cli import inspect as inspect_command
from vitkernels.profiling import sass

pytest.importorskip("triton")
# Of what `inspect` has, the part that a test has time for: fp16 is as bf16, and P = 32 as 16.
DTYPES = ("bf16", "uint8->bf16", "fp32", "tf32", "autocast")
CHOSEN = {14: DTYPES[:2], 16: DTYPES}
GRADIENTS = ("weight", "sums", "kept", "finish", "images")
KEYS = {
    "kernel", "arch", "patch", "dtype", "config", "default", "registers", "spill_bytes", "shared_bytes", "wgmma", "mma",
    "tma", "load_bytes", "hazards", "first_hazard",
}  # fmt: skip


def inspect(*arguments):
    # One job, as pytest's workers share the cores, and each imports torch.
    command = [sys.executable, "-m", "vitkernels", "inspect", "--json", "--jobs", "1", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout), done.returncode


@pytest.fixture(scope="module")
def hopper():
    found = [inspect("--arch", "sm_90", "--patch", str(p), "--dtype", ",".join(d)) for p, d in CHOSEN.items()]
    return [row for result, _ in found for row in result["kernels"]], [code for _, code in found]


def test_every_default_on_hopper(hopper):
    rows, codes = hopper
    assert all(set(r) == KEYS for r in rows)
    assert [r for r in rows if r["hazards"]] == []  # of the others too: the tuner may take them
    defaults = [r for r in rows if r["default"]]
    forward = [r for r in defaults if r["kernel"] in ("gather", "descriptor")]
    for rows, pixels in (
        (forward, True),
        *(([r for r in defaults if r["kernel"] == n], n != "images") for n in GRADIENTS),
    ):
        assert {(r["patch"], r["dtype"]) for r in rows} == {
            (p, d) for p in CHOSEN for d in CHOSEN[p] if pixels or ">" not in d
        }
    for r in defaults:
        assert r["spill_bytes"] == 0, r
        assert r["shared_bytes"] <= 232448, r
        assert r["registers"] <= 255, r
        product = r["kernel"] not in ("sums", "kept", "finish")
        assert (r["wgmma"] > 0) == (r["dtype"] != "fp32" and product) or r["kernel"] == "kept", r
    assert codes == [0, 0]


def test_the_copy_engine_cuts_aligned_patches(hopper):
    for r in hopper[0]:
        assert (r["tma"] > 0) == ("descriptor" in r["kernel"]), r
        if "descriptor" in r["kernel"]:
            assert r["load_bytes"] >= 16 and r["patch"] != 14, r
        elif r["dtype"] == "bf16" and r["kernel"] in ("gather", "weight"):
            assert r["load_bytes"] == (4 if r["patch"] == 14 else 16), r


@pytest.mark.parametrize(("arch", "dtype"), (("sm_80", "uint8->bf16"), ("sm_100", "bf16")))
def test_every_default_elsewhere(arch, dtype):
    result, code = inspect("--arch", arch, "--defaults", "--patch", "14,16", "--dtype", dtype)
    spilt = [r for r in result["kernels"] if r["spill_bytes"]]
    assert result["kernels"] and code == 0, spilt
    assert all(r["mma"] > 0 for r in result["kernels"] if r["kernel"] not in ("sums", "finish"))


def test_a_wrong_architecture_is_one_line():
    command = [sys.executable, "-m", "vitkernels", "inspect", "--arch", "sm_1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "sm_1" in done.stderr and "sm_90" in done.stderr


BARE = """
import torch
from dataclasses import replace
from vitkernels.gpu import NOMINAL
from vitkernels.profiling import compile_triton

for patch in (14, 16):
    full = compile_triton.problem(patch, "uint8->bf16", B=2)
    for change in (
        dict(T=0), dict(has_bias=False), dict(pos_rows=0), dict(T=0, has_bias=False, pos_rows=0),
        dict(mean=None, std=None), dict(T=0, pos_rows=full.N), dict(B=1, D=8), dict(n_keep=5, T=0),
        dict(pad=(0, 2, 3)), dict(out_dtype=torch.float32), dict(scale=1.0, mean=None, std=None),
    ):
        p = replace(full, **change)
        print(compile_triton.compile_kernel(p, NOMINAL[90], False))
        if patch == 16:
            for kernel in ("weight", "sums", "finish", "kept")[: 4 if p.n_keep else 3]:
                print(compile_triton.compile_kernel(p, NOMINAL[90], False, (kernel, None)))
            p = replace(p, image_dtype=torch.bfloat16)
            print(compile_triton.compile_kernel(p, NOMINAL[90], False, ("images", None)))
"""


def test_whatever_is_absent_compiles():
    """The interpreter never looks into a branch that is not taken; a compiler does."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 22 + 11 * 4 + 1


KERNELS = r"""
#include <cuda_fp16.h>
enum class Dtype : int { f16, f32 };
struct Arguments { const float* x; float* y; const void* map; int n; };

namespace vk { namespace {
template <class T, int WIDTH, Dtype DTYPE> __global__ void copy(Arguments a) {
    __shared__ alignas(16) T tile[128];
    unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(&tile[threadIdx.x]));
    const T* from = reinterpret_cast<const T*>(a.x) + threadIdx.x;
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" :: "r"(to), "l"(from), "n"(sizeof(T)) : "memory");
    asm volatile("cp.async.wait_all;" ::: "memory");
    reinterpret_cast<T*>(a.y)[threadIdx.x] = tile[threadIdx.x];
    a.y[0] += static_cast<float>(reinterpret_cast<const double2*>(a.x)[7 * threadIdx.x].x) * WIDTH;
}
} }

#ifdef SPILLING
template <int N> __global__ void wanders(Arguments a) {
    float t[N];
    for (int i = 0; i < N; ++i) t[i] = a.x[i];
    for (int i = 0; i < a.n; ++i) t[(i * 7) % a.n] += t[i];
    a.y[0] = t[a.n % N];
}
#endif

template <int N> __global__ void wgmma_product(Arguments a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    __shared__ alignas(128) float tile[64];
    __shared__ alignas(8) unsigned long long barrier;
    unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(tile));
    unsigned done = static_cast<unsigned>(__cvta_generic_to_shared(&barrier));
    asm volatile("cp.async.bulk.tensor.1d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%2}], [%3];" :: "r"(to), "l"(a.map), "r"(a.n), "r"(done) : "memory");
    float d[4] = {};
#ifndef WITHOUT_WGMMA
    unsigned long long operand = a.n;
    asm volatile("wgmma.fence.sync.aligned;\n"
                 "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0,%1,%2,%3}, %4, %4, 1, 1, 1, 0, 0;\n"
                 "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(operand) : "memory");
#endif
    a.y[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
#endif
}

void launch(const Arguments& a) {
    vk::copy<float4, 3, Dtype::f32><<<1, 128>>>(a);
    vk::copy<float, -4, Dtype::f16><<<1, 128>>>(a);
    wgmma_product<8><<<1, 128>>>(a);
#ifdef SPILLING
    wanders<64><<<1, 128>>>(a);
#endif
}
"""
NAMES = {"copy<float4, 3, 1>", "copy<float, -4, 0>", "wgmma_product<8>"}


def built(folder, *flags):
    """A library with the kernels above, as setup.py makes one."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    source, library = folder / "kernels.cu", folder / "kernels.so"
    source.write_text(KERNELS)
    targets = ("compute_80,code=[sm_80,compute_80]", "compute_90a,code=sm_90a", "compute_100,code=sm_100")
    command = ["nvcc", "-shared", "--no-device-link", "-Xcompiler", "-fPIC", "-lineinfo", *flags]
    subprocess.run([*command, *(f"-gencode=arch={t}" for t in targets), source, "-o", library], check=True)
    return inspect("--extension", str(library))


def test_a_sound_extension(tmp_path):
    result, code = built(tmp_path)
    assert code == 0 and result["ok"] and result["ptx"] == ["sm_80"]
    rows = {(r["kernel"], r["arch"].rstrip("a")): r for r in result["extension"]}  # older tools leave out the a
    archs = ("sm_80", "sm_90", "sm_100")
    if shutil.which("c++filt"):
        assert {name for name, _ in rows} == NAMES
        assert {arch for name, arch in rows if "wgmma_" in name} == {"sm_90"}
        assert all((name, arch) in rows for name in NAMES for arch in archs if "copy" in name)
    for (name, _), r in rows.items():
        assert (r["wgmma"], r["tma_loads"]) == ((1, 1) if "wgmma_" in name else (0, 0)), r
        assert r["stack_bytes"] == r["spills"] == r["mma"] == r["tma_stores"] == 0, r
        assert 0 < r["registers"] <= 255, r
        if "copy" in name:
            moved = 16 if "float4" in name else 4
            assert (r["cp_async"], r["cp_async_bytes"]) == (1, [moved]), r
            assert r["loads"] >= 1 and r["load_bytes"] == 8, r  # of the double2 only x is wanted
            assert r["shared_bytes"] in (128 * moved, 128 * moved + 1024), r


def test_two_cubins_of_one_name(tmp_path, monkeypatch, capsys):
    """cuobjdump names a cubin as its source, and would write one over the other: ours have names of their own."""
    stems = [source.stem for source in (Path(__file__).parents[2] / "csrc").rglob("*.cu")]
    assert len(stems) > 10 and sorted(set(stems)) == sorted(stems)
    listed = (
        "ELF file    1: kernel.sm_80.cubin\nELF file    2: kernel.sm_90a.cubin\nELF file    3: kernel.sm_80.cubin\n"
    )
    monkeypatch.setattr(sass, "_run", lambda *_, **__: listed)
    (tmp_path / "kernels.so").touch()
    assert cli.main(["inspect", "--extension", str(tmp_path / "kernels.so")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds several of kernel.sm_80.cubin" in line


def machine_code(setup, arch, source):
    """A cubin of csrc's, with setup.py's flags but for line numbers, which take a tenth of the time and no part of the
    code. Made where no earlier test has done so."""
    flags = [flag for flag in setup["FLAGS"] if flag != "-lineinfo"]
    command = ["nvcc", *flags, f"-gencode=arch=compute_{arch},code=sm_{arch}", "-cubin", str(source)]
    files = sorted(file for file in Path("csrc").rglob("*.*h") if file.is_file())
    target = build.CACHE / f"{source.stem}-{build.key_of(build.version_of('nvcc'), *command, source, *files)}.cubin"
    target.parent.mkdir(parents=True, exist_ok=True)
    return build.made(target, command)


@pytest.mark.parametrize(
    ("stems", "arch"), [("sm80_bf16", "80"), ("sm90_bf16 sm90_f32", "90a"), ("", "100")], ids=["80", "90", "100"]
)
def test_csrc_as_it_ships(monkeypatch, stems, arch):
    """No kernel spills, on any architecture; those for Hopper use its tensor cores and its copy engine. Minutes, where
    build/ has no code yet: bfloat16's kernels (and float32's on Hopper) for the architecture that they are written
    for, those of the same templates for other types on a third. docs/wheels.md has a wheel's inspected whole."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    monkeypatch.chdir(Path(__file__).parents[2])
    setup = runpy.run_path("setup.py")
    found = {source: source.stem.partition("_")[2] for source in sorted(Path("csrc").rglob("*.cu"))}
    others = {stem for stem in found.values() if "bf16" not in stem and "sm90" not in stem}
    sources = [source for source, stem in found.items() if stem in (stems.split() or others)]
    with ThreadPoolExecutor(2) as pool:
        files = list(pool.map(partial(machine_code, setup, arch), sources))
    results = [inspect_command.run(Namespace(extension=str(file), jobs=1, json=True)) for file in files]
    rows = [row for result in results for row in result["extension"]]
    assert [r for r in rows if r["stack_bytes"] or r["spills"] or r["hazards"]] == []
    assert all(result["ok"] for result in results) and {r["arch"] for r in rows} == {f"sm_{arch}"}
    by_wgmma = [r for r in rows if "wgmma_" in r["kernel"]]
    assert len(by_wgmma) >= 54 * (arch == "90a") and all(r["wgmma"] and r["tma_loads"] for r in by_wgmma)
    # Small, as the general epilogue once did not fit the instruction cache: unrolled there were up to 13,120. Where
    # threads bring patches, some 900 of them are for positions of their own.
    assert all(r["instructions"] < 5900 for r in by_wgmma)
    stores = [r for r in by_wgmma if r["tma_stores"]]
    assert len(stores) == 34 * (arch == "90a")
    assert all(r["instructions"] < 4900 for r in stores if "true>, " not in r["kernel"])
    halves = [r for r in rows if r not in by_wgmma and ("half" in r["kernel"] or "bfloat16" in r["kernel"])]
    assert len(halves) >= 15 * (arch != "90a") and all(r["mma"] for r in halves if "sums" not in r["kernel"])


def test_an_extension_that_is_not_sound(tmp_path):
    result, code = built(tmp_path, "-DSPILLING", "-DWITHOUT_WGMMA")
    assert code == 1 and not result["ok"]
    command = [sys.executable, "-m", "vitkernels", "inspect", "--extension", str(tmp_path / "kernels.so")]
    text = subprocess.run(command, capture_output=True, text=True).stdout
    assert "stack" in text and "no wgmma" in text
    (line,) = (line for line in text.splitlines() if line.startswith("not sound: "))
    if shutil.which("c++filt"):
        assert {name.split("<")[0] for name in line[11:].split(", ")} == {"wanders", "wgmma_product"}


def test_no_extension_is_one_line(tmp_path):
    (tmp_path / "kernels.so").write_text("no library")
    for name, words in (("kernels.so", "cuobjdump failed with exit status"), ("none", "is no file")):
        command = [sys.executable, "-m", "vitkernels", "inspect", "--extension", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("modifiers", "width"),
    ((".E", 4), (".E.128.CONSTANT", 16), (".E.ENL2.256", 32), (".E.LTC128B.64", 8), (".E.U16", 2), (".S8", 1)),
)
def test_width_of_a_load(modifiers, width):
    assert sass.width(modifiers) == width
    code = f"LDG{modifiers} R2, [R4] ; LDGDEPBAR ; LDGSTS.E.BYPASS.LTC128B.128 [R1], [R2]"
    assert sass.widths(code, "LDG") == {width} and sass.widths(code, "LDGSTS") == {16}


@pytest.mark.parametrize("jump", ("BRX R2 -0x10", "BRA `(.L_x_1)"))
def test_where_an_indirect_jump_leads_is_asked_for(monkeypatch, jump):
    said, asked = {"cuobjdump": " Function k:\n  REG:8 STACK:0 SHARED:0 LOCAL:0", "nvdisasm": f" /*0010*/ {jump} ;"}, []
    monkeypatch.setattr(sass, "_run", lambda tool, *options, **_: (asked.append(options[:-1]), said[tool])[1])
    assert sass.read.__wrapped__(b"") == (sass.Usage(8, 0, 0), said["nvdisasm"])
    assert asked[1:] == [("-g", "-ndf", "-c"), *[("-g", "-c")] * ("BRX" in jump)]


@pytest.mark.skipif(not shutil.which("c++filt"), reason="needs c++filt")
def test_names_for_people():
    names = {
        "_ZN2vk14forward_kernelINS_13ForwardKernelI13__nv_bfloat16NS_6GatherIS2_EELi32ELi64ELi16ELi32EEEEEvNS_16ForwardArgumentsE":
            "forward_kernel<ForwardKernel<bfloat16, Gather<bfloat16>, 32, 64, 16, 32>>",
        "_ZN2vk40_GLOBAL__N__835c7b0e_8_scale_cu_0645469e13slow_spillingI4ArgsEEvT_": "slow_spilling<Args>",
        "_Z12scale_kernelILi3EhEv4Args": "scale_kernel<3, uint8>",
        "no_mangled_name": "no_mangled_name",
    }  # fmt: skip
    assert sass.demangled(names) == names
    assert sass.demangled([]) == {}


def test_names_stay_without_a_demangler(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert sass.demangled(["_Z4copy4Args"]) == {"_Z4copy4Args": "_Z4copy4Args"}


def test_tools_that_are_missing(monkeypatch):
    monkeypatch.setattr(sass, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="cuobjdump was found neither in Triton's wheel nor on PATH"):
        sass._tool.__wrapped__("cuobjdump")
