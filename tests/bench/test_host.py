"""What a call costs the host: that it is timed, by which parts, and that the stubs leave no trace."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vitkernels as vk
from vitkernels import cli
from vitkernels.bench import host

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(host, "CALLS", 2)
    monkeypatch.setattr(host, "ROUNDS", 2)


def test_every_part_is_timed():
    rows = host.host()
    by = {(row["mode"], row["impl"]): row for row in rows}
    for mode in host.MODES:
        assert {impl for m, impl in by if m == mode} >= {"cuda", "triton", "F.linear", "timm eagerly"}
        assert by[mode, "F.linear"]["ratio"] == 1
        assert by[mode, "cuda"]["ratio"] == pytest.approx(by[mode, "cuda"]["us"] / by[mode, "F.linear"]["us"], rel=1e-3)
        assert by[mode, "cuda"]["stub"] and not by[mode, "F.linear"]["stub"]
    assert all(row["us"] > 0 for row in rows)
    assert {"call_of", "choose", "cuda backend's forward"} <= {impl for m, impl in by if m == "piece"}


def test_stubs_are_gone_afterwards(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    call = host.TINY.call("cpu")
    before = dict(vk.explain(**call))
    with host.stubs():
        assert vk.explain(**call)["cuda"] == [] == vk.explain(**call)["triton"]
        vk.patch_embed(**call, backend="cuda")
    assert dict(vk.explain(**call)) == before
    assert before["triton"]
    assert torch.isfinite(vk.patch_embed(**call)).all()


def test_the_benchmark(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_host.py", "-p", "no:cacheprovider", "-k", "inference",
               "--benchmark-storage", str(tmp_path)]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env=environment | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout
    [file] = tmp_path.rglob("*.json")
    stored = {b["extra_info"]["host"]["impl"]: b for b in json.loads(file.read_text())["benchmarks"]}
    assert stored.keys() == {"cuda", "triton", "F.linear", "timm eagerly", "empty operator"}
    for found in stored.values():
        assert found["stats"]["min"] * 1e6 == pytest.approx(found["extra_info"]["host"]["us"], rel=1e-3)


def test_the_command(capsys):
    assert cli.main(["bench", "--host", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["host"]
    assert cli.main(["bench", "--host", "--device", "cpu"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "the launch is a stub" in shown and "F.linear" in shown and "timm eagerly" in shown
