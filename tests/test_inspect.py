"""What the compilers make of the shipped defaults, on a machine without a GPU."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
# Of what `inspect` has, the part that a test has time for: fp16 is as bf16, and P = 32 as 16.
DTYPES = ("bf16", "uint8->bf16", "fp32", "tf32", "autocast")
CHOSEN = ("--patch", "14,16", "--dtype", ",".join(DTYPES))
ROADS = ("weight", "sums", "kept", "finish", "images")
KEYS = {
    "kernel", "arch", "patch", "dtype", "config", "default", "registers", "spill_bytes", "shared_bytes", "wgmma", "mma",
    "tma", "load_bytes",
}  # fmt: skip


def inspect(*arguments):
    command = [sys.executable, "-m", "vitkernels", "inspect", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout), done.returncode


@pytest.fixture(scope="module")
def hopper():
    return inspect("--arch", "sm_90", *CHOSEN)


def test_every_default_on_hopper(hopper):
    result, code = hopper
    rows = result["kernels"]
    assert all(set(r) == KEYS for r in rows)
    defaults = [r for r in rows if r["default"]]
    forward = [r for r in defaults if r["kernel"] in ("gather", "descriptor")]
    for rows, pixels in ((forward, True), *(([r for r in defaults if r["kernel"] == n], n != "images") for n in ROADS)):
        assert {(r["patch"], r["dtype"]) for r in rows} == {
            (p, d) for p in (14, 16) for d in DTYPES if pixels or ">" not in d
        }
    for r in defaults:
        assert r["spill_bytes"] == 0, r
        assert r["shared_bytes"] <= 232448, r
        assert r["registers"] <= 255, r
        product = r["kernel"] not in ("sums", "kept", "finish")
        assert (r["wgmma"] > 0) == (r["dtype"] != "fp32" and product) or r["kernel"] == "kept", r
    assert code == 0 and result["ok"]


def test_the_copy_engine_cuts_aligned_patches(hopper):
    for r in hopper[0]["kernels"]:
        assert (r["tma"] > 0) == (r["kernel"] == "descriptor"), r
        if r["kernel"] == "descriptor":
            assert r["load_bytes"] >= 16 and r["patch"] != 14, r
        elif r["dtype"] == "bf16" and r["kernel"] in ("gather", "weight"):
            assert r["load_bytes"] == (4 if r["patch"] == 14 else 16), r


@pytest.mark.parametrize("arch", ("sm_80", "sm_100"))
def test_every_default_elsewhere(arch):
    result, code = inspect("--arch", arch, "--defaults", "--patch", "14,16", "--dtype", "bf16,uint8->bf16")
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
from vitkernels.triton import compiled
from vitkernels.tuning import NOMINAL

for patch in (14, 16):
    full = compiled.problem(patch, "uint8->bf16", B=2)
    for change in (
        dict(T=0), dict(has_bias=False), dict(pos_rows=0), dict(T=0, has_bias=False, pos_rows=0),
        dict(mean=None, std=None), dict(T=0, pos_rows=full.N), dict(B=1, D=8), dict(n_keep=5, T=0),
        dict(pad=(0, 2, 3)), dict(out_dtype=torch.float32), dict(scale=1.0, mean=None, std=None),
    ):
        p = replace(full, **change)
        print(patch, change, compiled.measure(p, NOMINAL[90], False))
        if patch == 16:
            for road in ("weight", "sums", "finish", "kept")[: 4 if p.n_keep else 3]:
                print(road, compiled.measure(p, NOMINAL[90], False, (road, None)))
            print(compiled.measure(replace(p, image_dtype=torch.bfloat16), NOMINAL[90], False, ("images", None)))
"""


def test_whatever_is_absent_compiles():
    """The interpreter never looks into a branch that is not taken; a compiler does."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 22 + 11 * 4 + 1
