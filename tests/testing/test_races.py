"""That launches which do not give the same bits are seen, and named."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vitkernels import cli
from vitkernels.backends import reference
from vitkernels.testing import races

ROOT = Path(__file__).parents[2]


def runs(spoil=lambda launch, results: None, dtype=torch.bfloat16, device="cpu"):
    """A launch that counts itself: two results, the second of no contiguous layout."""
    made = []
    data = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)

    def run():
        results = [("tokens", data.clone()), ("gradient of weight", data.clone().transpose(1, 2))]
        made.append(1)
        spoil(len(made), results)
        return results

    return run, made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_the_same_bits_pass(dtype, device):
    run, made = runs(dtype=dtype, device=device)
    ticks = []
    assert races.hunt(run, 50, lambda: ticks.append(1)) == ""
    assert len(made) == 50 and len(ticks) == 49


@pytest.mark.parametrize("launch", [2, 7, 21, 50])
@pytest.mark.parametrize("result", [0, 1])
def test_one_flipped_bit_is_named(launch, result, device):
    def spoil(number, results):
        if number == launch:
            bits = results[result][1].view(torch.int16)
            bits[2, 1, 2] ^= 1

    run, _ = runs(spoil, device=device)
    clean = runs(device=device)[0]()[result]
    said = races.hunt(run, 50)
    name, was = clean[0], clean[1][2, 1, 2].double().item()
    now = (clean[1].clone().view(torch.int16)[2, 1, 2] ^ 1).view(torch.bfloat16).item()
    assert said == f"{name}[2, 1, 2] was {was!r} and is {now!r} in launch {launch} of 50"


def test_nan_is_held_to_its_bits(device):
    """A result that is NaN each time is the same each time; that it is wrong, the accuracy rule says."""

    def always(number, results):
        results[0][1][0, 0, 0] = math.nan

    def once(number, results):
        if number == 3:
            results[0][1][0, 0, 0] = math.nan

    assert races.hunt(runs(always, device=device)[0], 5) == ""
    assert "tokens[0, 0, 0] was" in races.hunt(runs(once, device=device)[0], 5)
    assert "is nan in launch 3 of 5" in races.hunt(runs(once, device=device)[0], 5)


def test_zero_has_two_signs_and_nothing_is_nothing():
    def sign(number, results):
        results[0][1][1, 1, 1] = -0.0 if number == 4 else 0.0

    assert "tokens[1, 1, 1] was 0.0 and is -0.0 in launch 4" in races.hunt(runs(sign)[0], 10)
    assert races.hunt(lambda: [("tokens", torch.empty(0, 4))], 10) == ""


def test_the_last_bit_of_fp64_is_printed():
    def last(number, results):
        results[0][1][0, 0, 0] = 1 + 2**-52 * (number == 2)

    assert "was 1.0 and is 1.0000000000000002" in races.hunt(runs(last, torch.float64)[0], 3)


def spoiled(forward):
    count = []

    def wrong(*arguments, **keywords):
        out = forward(*arguments, **keywords)
        count.append(1)
        if len(count) % 5 == 4 and out.numel():
            out.view(-1)[-1] += 1
        return out

    return wrong


def test_verify_repeats(capsys, monkeypatch):
    words = ["verify", "--device", "cpu", "--backend", "reference", "--cases", "1", "--repeat", "6", "--json"]
    assert cli.main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert {row["repeat"] for row in result["rows"]} == {6}
    same = [row for row in result["rows"] if row.get("what") == "same bits"]
    assert len(same) == 4 and all(row["ok"] for row in same)

    assert cli.main([*words[:-3], "--repeat", "1", "--json"]) == 0
    assert not [r for r in json.loads(capsys.readouterr().out)["rows"] if r.get("what") == "same bits"]

    monkeypatch.setattr(reference, "forward", spoiled(reference.forward))
    assert cli.main([*words, "--gradients"]) == 1
    failed = [row for row in json.loads(capsys.readouterr().out)["rows"] if row["ok"] is False]
    assert any("multiplying in" in r["reason"] and "tokens[" in r["reason"] and "launch" in r["reason"] for r in failed)
    assert cli.main(["verify", "--repeat", "0"]) == 2
    assert "--repeat must be at least 1, got 0" in capsys.readouterr().err


def test_the_suites_stage(tmp_path):
    script = [sys.executable, str(ROOT / "benchmarks" / "gpu_suite.py"), "--out", str(tmp_path), "--dry-run"]
    subprocess.run([*script, "--stages", "races"], check=True, timeout=240, capture_output=True)
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["stages"][0]["status"] == "done"
    checks = {(note["case"], note["impl"]): note["check"] for note in result["notes"]}
    assert len(checks) >= 5 and set(checks.values()) == {"right, 3 times the same bits"}
    assert {"reference", "reference gradient of parameters", "reference gradient of images"} <= {i for _, i in checks}
    assert "3 times the same bits" in (tmp_path / "summary.md").read_text()


def test_the_stage_holds_the_images_gradient_to_fp64(monkeypatch, device):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import gpu_stages
    from suites import TINY

    def check():
        found = {kernel: gate for kernel, gate, _ in gpu_stages._launches(TINY[0].call(device))}
        return found["reference gradient of images"]()

    def doubled(*arguments, grads):
        backward(*arguments, grads=grads)
        grads[0].mul_(2)

    backward = reference.backward
    assert check() is None
    monkeypatch.setattr(reference, "backward", doubled)
    assert "the images' gradient errs by" in check()


def test_every_kernel_has_its_turn(on_cuda_kernels, monkeypatch, device):
    """The list that the stage goes through, where both kernel backends run: Triton's interpreter, csrc/ emulated."""
    pytest.importorskip("triton")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import gpu_stages
    from suites import TINY

    on_cuda_kernels()
    seen = set()
    for case in (TINY[1], TINY[2]):
        for kernel, gate, run in gpu_stages._launches(case.call(device)):
            seen.add(kernel)
            if device == "cpu" and ("patches cut" in kernel or "pairs" in kernel or kernel.startswith("triton")):
                assert gate() is None, kernel
                assert races.hunt(run, 2) == "", kernel
    cuda = {"cuda gradient of parameters", "cuda gradient of parameters by pairs of blocks"}
    assert {"triton gradient of parameters", "reference"} | cuda <= seen
    assert any(kernel.startswith("triton descriptor") for kernel in seen) and any("triton gather" in r for r in seen)
    assert any(kernel.startswith("cuda: patches cut and tokens stored") for kernel in seen)
