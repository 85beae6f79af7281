"""What is shipped: wheel, sdist, version, README, and an import that costs nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import vitkernels
from vitkernels import cli
from vitkernels.cli import info

ROOT = Path(__file__).parents[1]
LEFT_BEHIND = (".*", "build", "dist", "*.egg-info", "__pycache__", "demo-output")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel built from that; from a copy, as builds leave things in the tree."""
    pytest.importorskip("build")
    source, out = tmp_path_factory.mktemp("source") / "vitkernels", tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*LEFT_BEHIND))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=out, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return out


def _package_files() -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "vitkernels").rglob("*")
        if path.suffix in (".py", ".json") or path.name == "py.typed"
    }


def test_wheel(built):
    (wheel,) = built.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info_dir = f"vitkernels-{vitkernels.__version__}.dist-info"
        metadata = message_from_string(archive.read(f"{info_dir}/METADATA").decode())
        entry_points = archive.read(f"{info_dir}/entry_points.txt").decode()
    assert {name for name in names if not name.startswith(info_dir)} == _package_files()
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
    wanted |= {"docs/demo.png", "docs/train.png", "examples/train.py", "examples/data.py"}
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    assert wanted | _package_files() <= names


def test_import_costs_nothing():
    code = "import sys, vitkernels, vitkernels.cli; print({'torch', 'triton', 'numpy'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_version_is_in_the_changelog():
    assert f"## [{vitkernels.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", info.TABLES)
def test_readme_tables(name):
    readme = (ROOT / "README.md").read_text()
    table = re.search(rf"<!-- {name}\b[^>]*-->\n(.*?)\n<!-- /{name} -->", readme, re.DOTALL)
    assert table
    assert table[1] == info.TABLES[name](), f"`vitkernels info --markdown {name}` prints what goes between the markers"


def test_readme_names_every_command():
    readme = (ROOT / "README.md").read_text()
    assert all(f"| `{command}` |" in readme for command in cli.COMMANDS)


def test_readme_picture():
    picture = ROOT / "docs" / "demo.png"
    assert f"]({picture.relative_to(ROOT).as_posix()})" in (ROOT / "README.md").read_text()
    assert picture.stat().st_size < 400_000
