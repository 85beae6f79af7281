"""benchmarks/ under pytest-benchmark: what it stores and prints, and that a wrong backend gets no time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHAPE = "B1-224-P16-D768-fp32-forward"
SPOILT = """
from vitkernels.backends import reference
right = reference.forward
reference.forward = lambda p, *tensors: right(p, *tensors) * 1.01
"""


def run(folder, *options):
    (folder / "spoilt.py").write_text(SPOILT)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join((str(ROOT), str(folder)))}
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_patch_embed.py", "-p", "no:cacheprovider", "-k", SHAPE,
               "--seconds", "0.01", "--benchmark-storage", str(folder / "stored"), *options]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )  # fmt: skip
    return done.returncode, done.stdout


def test_a_shape_is_timed_beside_its_peers_and_stored(tmp_path):
    status, said = run(tmp_path)
    assert status == 0, said
    assert f"{SHAPE}-auto]" in said
    assert "ours against the best peer" in said
    [file] = (tmp_path / "stored").rglob("*.json")
    stored = json.loads(file.read_text())
    assert stored["machine_info"]["vitkernels"].keys() >= {"cpu", "torch", "commit", "command"}
    rows = {b["extra_info"]["row"]["impl"]: b for b in stored["benchmarks"]}
    assert rows.keys() == {
        "auto", "timm_eager", "conv_channels_last", "reshape_linear", "copy", "gemm", "empty",
    }  # fmt: skip
    for found in rows.values():  # pytest-benchmark's figures are those of our clock
        assert found["stats"]["median"] * 1e3 == pytest.approx(found["extra_info"]["row"]["ms"]["median"], rel=1e-3)
        assert "samples" not in found["extra_info"]["row"]
    assert rows["auto"]["extra_info"]["row"]["images_per_s"] > 0


def test_a_wrong_backend_gets_no_time(tmp_path):
    status, said = run(tmp_path, "-p", "spoilt")
    assert status == 1
    assert "auto has no time: tokens: error" in said
    lines = [line for line in said.splitlines() if line.startswith("test_patch_embed[")]
    assert not any("-auto]" in line for line in lines)
    assert any("-timm_eager]" in line for line in lines)


def test_without_timing_it_is_the_accuracy_rule(tmp_path):
    assert run(tmp_path, "--benchmark-disable")[0] == 0
    status, said = run(tmp_path, "--benchmark-disable", "-p", "spoilt")
    assert status == 1
    assert f"FAILED benchmarks/bench_patch_embed.py::test_patch_embed[{SHAPE}-auto]" in said
    assert "1 failed" in said
