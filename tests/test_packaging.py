"""What is shipped: wheel, sdist, the extension or why it is missing, version, README, an import that costs nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

import vitkernels
from vitkernels import cli
from vitkernels.backends.cuda import extension
from vitkernels.cli import info
from vitkernels.report import results, summary

ROOT = Path(__file__).parents[1]
LEFT_BEHIND = (".*", "build", "dist", "*.egg-info", "__pycache__", "demo-output", "_cuda.*.so", "_cuda_build.json")
RECORD = "vitkernels/_cuda_build.json"
KERNEL = """
struct Arguments { const float4* x; float4* y; int n; };
template <int FACTOR> __global__ void scale(Arguments a) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < a.n) a.y[i] = make_float4(FACTOR * a.x[i].x, 0, 0, 0);
}
void launch(const Arguments& a) { scale<2><<<1, 128>>>(a); }
"""
BINDINGS = """
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include "answer.h"
PYBIND11_MODULE(VITKERNELS_MODULE, m) { m.def("answer", [] { return answer; }); }
"""
FAKE_NVCC = """#!/bin/sh
test "$1" = --version && echo "Cuda compilation tools, release {release}, V{release}.88" && exit 0
echo "csrc/kernel.cu(3): error: this is no C++" >&2
exit 1
"""


def _copy(folder: Path) -> Path:
    """The sources in a place of their own, as builds leave things in the tree."""
    shutil.copytree(ROOT, folder / "vitkernels", ignore=shutil.ignore_patterns(*LEFT_BEHIND))
    return folder / "vitkernels"


def _environment(**changes: str) -> dict[str, str]:
    ours = ("VITKERNELS_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDACXX", "CUDA_HOME", "MAX_JOBS", "PYTHONPATH")
    return {name: value for name, value in os.environ.items() if name not in ours} | changes


def _build(source: Path, out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "build", "--no-isolation", *arguments, "--outdir", str(out), str(source)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=out, env=_environment(**environment), check=False
    )  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel built from that, beside what earlier builds left in the tree."""
    pytest.importorskip("build")
    source, out = _copy(tmp_path_factory.mktemp("source")), tmp_path_factory.mktemp("dist")
    (source / RECORD).write_text("{}")
    (source / "vitkernels" / "_cuda.cpython-30-x86_64-linux-gnu.so").touch()
    run = _build(source, out, VITKERNELS_CUDA="0")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return out


@pytest.fixture
def small(tmp_path) -> Path:
    """The sources with a csrc that compiles in seconds."""
    pytest.importorskip("build")
    pytest.importorskip("pybind11")
    source = _copy(tmp_path / "source")
    shutil.rmtree(source / "csrc", ignore_errors=True)
    (source / "csrc").mkdir()
    for name, text in (("kernel.cu", KERNEL), ("bindings.cpp", BINDINGS), ("answer.h", "constexpr int answer = 42;\n")):
        (source / "csrc" / name).write_text(text)
    return source


@pytest.fixture(scope="module")
def setup_py():
    spec = spec_from_file_location("setup_py", ROOT / "setup.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _script(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(text)
    file.chmod(0o755)
    return file


def _package_files() -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "vitkernels").rglob("*")
        if (path.suffix in (".py", ".json", ".html") or path.name == "py.typed") and path.name != Path(RECORD).name
    }


def test_wheel(built):
    (wheel,) = built.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info_dir = f"vitkernels-{vitkernels.__version__}.dist-info"
        metadata = message_from_string(archive.read(f"{info_dir}/METADATA").decode())
        entry_points = archive.read(f"{info_dir}/entry_points.txt").decode()
        record = json.loads(archive.read(RECORD))
    assert {name for name in names if not name.startswith(info_dir)} == _package_files() | {RECORD}
    assert record == {"built": False, "reason": "VITKERNELS_CUDA was 0"}
    assert f"{info_dir}/licenses/LICENSE" in names
    assert "vitkernels = vitkernels.cli:main" in entry_points
    assert metadata["Version"] == vitkernels.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    always = {re.match(r"[\w-]+", line)[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert always == {"torch", "triton", "numpy", "rich"}
    assert {"demo", "test", "dev"} <= set(metadata.get_all("Provides-Extra"))

    run = subprocess.run(
        [sys.executable, "-m", "vitkernels", "--version"],
        env={**os.environ, "PYTHONPATH": str(wheel)}, cwd=built, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout.split() == ["vitkernels", vitkernels.__version__]


def test_sdist(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"pyproject.toml", "setup.py", "Makefile", "README.md", "CHANGELOG.md", "LICENSE"}
    wanted |= {"CONTRIBUTING.md"} | {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}
    wanted |= {"docs/demo.png", "docs/train.png", "examples/train.py", "examples/data.py"}
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "benchmarks").rglob("*.py")}
    for folder in ("csrc", "tests"):
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix != ".pyc"]
        wanted |= {path.relative_to(ROOT).as_posix() for path in files}
    assert wanted | _package_files() <= names
    assert not {name for name in names if re.search(r"_cuda\b.*\.so$|_cuda_build|\.pyc$", name)}


@pytest.mark.parametrize(
    ("text", "archs"),
    (
        ("8.0;8.6 9.0a+PTX", ["8.0", "8.6", "9.0a+PTX"]),
        ("9.0", ["9.0a"]),
        (" 9.0+PTX, 10.0f;", ["9.0+PTX", "10.0f"]),
        ("Volta;Ampere;Hopper", ["8.0", "8.6+PTX", "9.0+PTX"]),
        ("Ampere+Tegra", ["8.7"]),
        ("7.0 7.5+PTX 8.0 9.0 9.0a", ["8.0", "9.0a"]),
        ("", []),
    ),
)
def test_architectures(setup_py, text, archs):
    assert setup_py.arch_list(text) == archs


@pytest.mark.parametrize("text", ("sm_90", "9.0b", "90", "9.0-PTX", "Huang"))
def test_wrong_architectures(setup_py, text):
    with pytest.raises(setup_py.PlatformError, match=re.escape(text)):
        setup_py.arch_list(f"8.0 {text}")


def test_targets_of_the_compiler(setup_py):
    assert [text.removeprefix("-gencode=arch=") for text in setup_py.gencode(["8.0+PTX", "9.0a", "10.0", "12.0"])] == [
        "compute_80,code=sm_80", "compute_80,code=compute_80", "compute_90a,code=sm_90a", "compute_100,code=sm_100",
        "compute_120,code=sm_120",
    ]  # fmt: skip
    assert setup_py.gencode(["9.0+PTX"]) == [
        "-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_90,code=compute_90"
    ]  # fmt: skip


REASONS = (  # VITKERNELS_CUDA, further environment, release of nvcc, what nvidia-smi says -> the reason, or the targets
    ("0", {}, "13.0", "", "VITKERNELS_CUDA was 0"),
    ("auto", {}, None, "9.0", "nvcc was not found (CUDACXX, CUDA_HOME, PATH)"),
    ("1", {}, None, "9.0", "nvcc was not found (CUDACXX, CUDA_HOME, PATH)"),
    ("1", {}, "12.4", "9.0", "nvcc 12.4.88 is too old, 12.8 or later is needed"),
    ("auto", {}, "13.0", None, "TORCH_CUDA_ARCH_LIST is '', visible none"),
    ("1", {}, "13.0", "7.5", "no GPU of compute capability 8.0 or later was asked for or visible"),
    ("1", {"TORCH_CUDA_ARCH_LIST": "7.5"}, "13.0", "9.0", "TORCH_CUDA_ARCH_LIST is '7.5', visible 9.0"),
    ("auto", {"TORCH_CUDA_ARCH_LIST": "sm_90"}, "13.0", "", "sm_90 is not of the kind of 8.0"),
    ("auto", {}, "13.0", "9.0\n8.6\n9.0\n7.5\n", ["8.6", "9.0a"]),
    ("auto", {"TORCH_CUDA_ARCH_LIST": "8.0+PTX"}, "12.8", "9.0", ["8.0+PTX"]),
    ("1", {"TORCH_CUDA_ARCH_LIST": "native"}, "13.0", "12.0", ["12.0"]),
    ("1", {}, "13.0", None, ["8.0+PTX", "9.0a", "10.0"]),
)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is one reason")
@pytest.mark.parametrize(("mode", "environment", "release", "gpus", "outcome"), REASONS)
def test_what_the_extension_is_built_with(setup_py, tmp_path, monkeypatch, mode, environment, release, gpus, outcome):
    pytest.importorskip("pybind11")
    monkeypatch.chdir(tmp_path)
    Path("csrc").mkdir()
    Path("csrc", "bindings.cpp").touch()
    for name in ("VITKERNELS_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDACXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    if gpus is not None:
        _script(tmp_path / "bin", "nvidia-smi", f"#!/bin/sh\necho '{gpus}'\n")
    if release:
        _script(tmp_path / "cuda", "nvcc", FAKE_NVCC.format(release=release))
        monkeypatch.setenv("CUDACXX", str(tmp_path / "cuda" / "nvcc"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if isinstance(outcome, str):
        with pytest.raises(setup_py.PlatformError, match=re.escape(outcome)):
            setup_py.find_tools(mode)
        return
    assert setup_py.find_tools(mode) == (str(tmp_path / "cuda" / "nvcc"), f"{release}.88", outcome)
    monkeypatch.setitem(sys.modules, "pybind11", None)
    with pytest.raises(setup_py.PlatformError, match="pybind11 was not installed"):
        setup_py.find_tools(mode)


@pytest.mark.parametrize("mode", ("auto", "0", "1"))
def test_metadata_needs_no_compiler(mode):
    command = [sys.executable, "setup.py", "-q", "--version"]
    environment = _environment(VITKERNELS_CUDA=mode, PATH="")
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    assert run.stdout.split() == [vitkernels.__version__]


def test_nothing_to_build_in_place(small):
    """An extension that was built before goes, and the reason is kept."""
    old = small / "vitkernels" / "_cuda.cpython-312-x86_64-linux-gnu.so"
    old.touch()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, env=_environment(VITKERNELS_CUDA="0"), cwd=small, check=True, capture_output=True)
    record = json.loads((small / RECORD).read_text())
    assert not old.exists() and not record["built"] and "VITKERNELS_CUDA was 0" in record["reason"]


@pytest.mark.skipif(sys.platform != "linux", reason="the extension is built on Linux only")
def test_a_compiler_that_fails(small, tmp_path):
    nvcc = _script(tmp_path / "cuda", "nvcc", FAKE_NVCC.format(release="13.0"))
    environment = {"CUDACXX": str(nvcc), "TORCH_CUDA_ARCH_LIST": "8.0"}
    error = "exit status 1: csrc/kernel.cu(3): error: this is no C++"
    must = _build(small, tmp_path, "--wheel", VITKERNELS_CUDA="1", **environment)
    assert must.returncode and error in must.stdout + must.stderr

    may = _build(small, tmp_path, "--wheel", **environment)
    assert may.returncode == 0, may.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    shutil.unpack_archive(wheel, installed, "zip")
    run = subprocess.run(
        [sys.executable, "-m", "vitkernels", "info", "--json"],
        env=_environment(PYTHONPATH=str(installed)), cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    said = json.loads(run.stdout)["versions"]["cuda extension"]
    assert said.startswith("the CUDA C++ extension was not built: nvcc failed on csrc/") and error in said


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_extension_is_built(small, tmp_path):
    environment = {"VITKERNELS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0 9.0+PTX"}
    run = _build(small, tmp_path, "--wheel", **environment)
    assert run.returncode == 0, run.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    python = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    assert re.search(rf"-{python}-{python}-linux_\w+\.whl$", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        record, names = json.loads(archive.read(RECORD)), set(archive.namelist())
    assert record["built"] and record["archs"] == ["8.0", "9.0+PTX"] and "-lineinfo" in record["flags"]
    compiled = {name for name in names if ".dist-info/" not in name} - _package_files()
    assert compiled == {RECORD, f"vitkernels/{record['file']}"}

    installed = tmp_path / "installed"
    shutil.unpack_archive(wheel, installed, "zip")
    words = "repr(missing()), load().answer(), about(), sep='; '"
    code = f"from vitkernels.backends.cuda.extension import about, load, missing; print({words})"
    command = [sys.executable, "-c", code]
    run = subprocess.run(
        command, env=_environment(PYTHONPATH=str(installed)), cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == f"''; 42; nvcc {record['nvcc']} for 8.0, 9.0+PTX"

    (small / "csrc" / "kernel.cu").touch()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    run = subprocess.run(
        command, env=_environment(**environment), cwd=small, capture_output=True, text=True, check=True
    )
    assert ": 1 of 2 files" in run.stdout
    assert (small / "vitkernels" / record["file"]).exists() and json.loads((small / RECORD).read_text())["built"]

    command = [sys.executable, "setup.py", "-q", "editable_wheel", "--dist-dir", str(tmp_path)]
    subprocess.run(command, env=_environment(VITKERNELS_CUDA="0"), cwd=small, capture_output=True, check=True)
    assert not (small / "vitkernels" / record["file"]).exists()
    assert json.loads((small / RECORD).read_text())["reason"] == "VITKERNELS_CUDA was 0"


@pytest.mark.parametrize(
    ("error", "record", "reason"),
    (
        (ModuleNotFoundError("none", name=extension.NAME), {"built": False, "reason": "nvcc was not found"},
         "was not built: nvcc was not found; build it with VITKERNELS_CUDA=1 pip install ."),
        (ModuleNotFoundError("none", name=extension.NAME), {"built": True, "file": "_cuda.cpython-30.so"},
         "was built for another Python, as _cuda.cpython-30.so"),
        (ImportError("undefined symbol: f", name=extension.NAME), {"built": True},
         "can't be loaded: undefined symbol: f"),
    ),
)  # fmt: skip
def test_why_the_extension_is_missing(monkeypatch, error, record, reason):
    def load():
        raise error

    monkeypatch.setattr(extension, "load", load)
    monkeypatch.setattr(extension, "record", lambda: record)
    assert reason in extension.missing.__wrapped__()


def test_import_costs_nothing():
    code = "import sys, vitkernels, vitkernels.cli; print({'torch', 'triton', 'numpy'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_version_is_in_the_changelog():
    assert f"## [{vitkernels.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", info.TABLES)
def test_tables(name):
    pages = "".join(page.read_text() for page in PAGES)
    (table,) = re.findall(rf"<!-- {name}\b[^>]*-->\n(.*?)\n<!-- /{name} -->", pages, re.DOTALL)
    assert table == info.TABLES[name](), f"`vitkernels info --markdown {name}` prints what goes between the markers"


def test_figures_are_those_of_stored_results():
    stored, page = ROOT / "benchmarks" / "results", (ROOT / "docs" / "measured.md").read_text()
    amd, *others = (
        stored / name for name in ("amd-epyc-2-threads", "amd-epyc-zen5-2-threads", "intel-xeon-amx-2-threads")
    )
    for files in (
        [amd / "operation.json", amd / "without-bf16-instructions.json"],
        *([other / "operation.json"] for other in others),
        [others[0] / "autocast.json"],
    ):
        assert summary.markdown(results.load(files)) in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, section in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]+))?\)", page.read_text()):
        file = (page.parent / target) if target else page
        assert file.exists(), target
        if section:
            titles = re.findall(r"(?m)^#+ (.+)$", file.read_text())
            assert section in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, section


def test_readme_names_every_command():
    readme = (ROOT / "README.md").read_text()
    assert all(f"| `{command}` |" in readme for command in cli.COMMANDS)


def test_readme_picture():
    picture = ROOT / "docs" / "demo.png"
    assert f"]({picture.relative_to(ROOT).as_posix()})" in (ROOT / "README.md").read_text()
    assert picture.stat().st_size < 400_000
