"""The clock, the gate in front of it, the peers, the command line and the suite's dry run."""

import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from vitkernels import cli, cost_model, dispatch
from vitkernels.backends import reference
from vitkernels.bench import gate, implementations, op, timing
from vitkernels.bench.peaks import Peaks

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from suites import CASES, CPU, CPU_TRAINING, HEADLINE, SMOKE, TINY, TRAINING  # noqa: E402

ROW = {"case", "mode", "dtype", "impl", "ms", "timing", "bytes", "flops", "roofline_share"}
CEILING_RATES = {"copy": (True, False), "gemm": (False, True), "empty": (False, False)}
EAGER_PEERS = ("timm_eager", "conv_channels_last", "reshape_linear")


def check_row(row):
    assert row.keys() >= ROW
    assert row["mode"] in implementations.MODES
    assert row["timing"] in ("eager", "graph")
    assert row["bytes"] > 0
    assert row["flops"] > 0
    if row["ms"] is None:
        assert row["error"]
    else:
        assert 0 < row["ms"]["p20"] <= row["ms"]["median"] <= row["ms"]["p80"]


def test_every_listed_case_is_a_right_problem_with_a_name_of_its_own():
    listed = [*CASES, *SMOKE, *TINY, *CPU, *CPU_TRAINING, *TRAINING]
    assert len({case.name for case in listed}) == len(set(listed))
    assert CASES[: len(HEADLINE)] == HEADLINE
    for case in {replace(case, batch=1): case for case in listed if case.image != 518 and case.patch != 8}:
        with op.settings(case):
            p = implementations.problem(case.call("cpu"))
        assert (p.B, p.D, p.T) == (1, case.dim, case.prefix)
        assert cost_model.work(p, "both") == (2 * p.flops, 2 * p.bytes)


@pytest.mark.parametrize("mode", ["forward", "backward", "images"])
@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
@pytest.mark.parametrize("impl", ["auto", *EAGER_PEERS])
def test_all_implementations_are_the_same_function(case, impl, mode):
    if mode == "images" and case.pixels == "uint8":
        with pytest.raises(ValueError, match="uint8 have no gradient"):
            op.bench(case, mode=mode, impls=[impl])
        return
    with op.settings(case):
        assert gate.gate(impl, case.call("cpu"), mode) is None


def test_a_compiled_peer_is_the_same_function_too():
    assert gate.gate("compile_linear", TINY[0].call("cpu")) is None


@pytest.mark.parametrize("mode", implementations.MODES)
def test_rows(mode):
    impls = ("auto", *EAGER_PEERS, *implementations.CEILINGS)
    rows = op.bench(TINY[1] if mode != "images" else TINY[2], mode=mode, impls=impls, seconds=0.01)
    assert [row["impl"] for row in rows] == list(impls)
    for row in rows:
        check_row(row)
        assert "error" not in row
        assert row["ratio"]["p20"] <= row["ratio"]["median"] <= row["ratio"]["p80"]
        assert (row["impl"] in implementations.CEILINGS) == (row["roofline_share"] is None)
        assert ("gb_per_s" in row, "tflops" in row) == CEILING_RATES.get(row["impl"], (True, True))
        assert row["peak_gb_per_s"] > 0
        assert row["peak_tflops"] > 0
    assert rows[0]["ratio"]["median"] == 1
    assert json.loads(json.dumps(rows)) == rows


def test_a_sample_leaves_out_the_call_that_wakes_the_threads():
    ran, awake = [], True

    def step(i):
        nonlocal awake
        ran.append(i)
        time.sleep(0.0006 if awake else 0.05)
        awake = True

    sample = timing.sampler_of(torch.device("cpu"), [partial(step, i) for i in range(4)])
    for _ in range(3):
        awake = False
        assert sample() < 10  # ms a call
    timed = len(ran[1:]) // 3  # and one before them
    turns = [ran[1 + i * timed : 1 + (i + 1) * timed] for i in range(3)]
    assert [i for turn in turns for i in turn[1:]] == [i % 4 for i in range(3 * (timed - 1))]
    assert all(turn[0] == (turn[1] - 1) % 4 for turn in turns)  # no set that is timed soon


@pytest.mark.parametrize("peaks", [(1e9, 1e15), (1e15, 1e9)], ids=["memory bounds", "arithmetic bounds"])
@pytest.mark.parametrize("mode", ["forward", "both"])
def test_the_figures_of_a_row(mode, peaks, monkeypatch):
    monkeypatch.setattr(op, "rounds", lambda samplers, seconds: [[i + 1.0] * 9 for i in range(len(samplers))])
    monkeypatch.setattr(op, "peaks_of", lambda *_: Peaks(*peaks))
    case, impls = TINY[0], ("auto", "timm_eager", "copy")
    p, times = implementations.problem(case.call("cpu")), 1 + (mode == "both")
    rows = op.bench(case, mode=mode, impls=impls)
    least = max(times * p.bytes / peaks[0], times * p.flops / peaks[1]) * 1e3
    for ms, row in enumerate(rows, 1):  # of 1, 2, 3 ms
        assert row["ms"] == row["ratio"] == {"median": ms, "p20": ms, "p80": ms}
        assert row["gb_per_s"] == pytest.approx(times * p.bytes / ms / 1e6, rel=1e-4)
    for ms, row in enumerate(rows[:2], 1):
        assert row["images_per_s"] == pytest.approx(1e3 * case.batch / ms, rel=1e-4)
        assert row["tflops"] == pytest.approx(times * p.flops / ms / 1e9, rel=1e-4)
        assert row["roofline_share"] == pytest.approx(least / ms, rel=1e-4)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda out: out * 1.01, "tokens: error"),
        (lambda out: out.index_fill(1, torch.tensor([0]), math.nan), "not finite"),
        (lambda out: out.roll(1, dims=1), "tokens: error"),
        (lambda out: out[:, 1:], "wanted"),
    ],
    ids=["scaled", "unwritten", "moved", "short"],
)
def test_a_wrong_backend_gets_no_time(monkeypatch, spoil, message):
    right = reference.forward
    monkeypatch.setattr(reference, "forward", lambda p, *tensors: spoil(right(p, *tensors)))
    dispatch._choose.cache_clear()
    rows = op.bench(TINY[0], impls=("reference", "timm_eager"), seconds=0.01)
    assert rows[0]["ms"] is None
    assert message in rows[0]["error"]
    assert rows[1]["ms"]["median"] > 0
    assert "ratio" not in rows[1]


def test_a_wrong_gradient_gets_no_time(monkeypatch):
    right = reference.backward

    def wrong(*args, grads):
        right(*args, grads=grads)
        grads[1].mul_(1.01)

    monkeypatch.setattr(reference, "backward", wrong)
    [row] = op.bench(TINY[0], mode="backward", impls=("reference",), seconds=0.01)
    assert row["ms"] is None
    assert "gradient of weight" in row["error"]


def test_a_backend_that_declines_says_why_in_its_row():
    [row] = op.bench(TINY[0], impls=("cuda",), seconds=0.01)
    assert row["ms"] is None
    assert "NotImplementedError" in row["error"]


def test_settings_come_back():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    with op.settings(op.Case(dtype="tf32")):
        assert torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32
    after = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    assert before == after


def test_autocast():
    case = op.Case(batch=2, image=32, dim=48, autocast=True)
    for mode in ("forward", "both"):
        rows = op.bench(case, mode=mode, impls=("auto", *EAGER_PEERS), seconds=0.01)
        assert [row["ms"] is None for row in rows] == [False] * 4, rows
    with op.settings(case):
        p = implementations.problem(case.call("cpu"))
    assert (p.compute_dtype, p.out_dtype, p.image_dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert not torch.is_autocast_enabled("cpu")


def test_command_line_prints_one_json_object(capsys):
    words = "bench --image 32x48 --patch 16 --dim 32 --batch 2 --pixels uint8 --channels-last --keep 0.5 --device cpu"
    assert cli.main([*words.split(), "--seconds", "0.01", "--mode", "both", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["header"].keys() >= {"gpu", "cpu", "driver", "torch", "triton", "commit", "command"}
    assert [row["impl"] for row in result["rows"]] == ["auto", *EAGER_PEERS, *implementations.CEILINGS]
    for row in result["rows"]:
        check_row(row)


def test_command_line_for_people(capsys):
    words = "bench --image 32 --dim 32 --batch 2 --device cpu --seconds 0.01 --impl auto,timm_eager,cuda"
    assert cli.main(words.split()) == 1  # cuda was named and has no time
    shown = capsys.readouterr().out
    assert "auto = reference" in shown
    assert "cuda (eager) has no time" in shown
    assert cli.main(["bench", "--impl", "nobody", "--image", "32", "--dim", "8"]) == 2
    assert "nobody" in capsys.readouterr().err


@pytest.mark.parametrize(("mode", "message"), [("forward", "tokens: error"), ("both", "RuntimeError: the version in")])
def test_another_version_is_sampled_in_the_same_rounds_and_held_to_the_rule(mode, message, tmp_path, capsys):
    wrong = tmp_path / "wrong" / "vitkernels"
    wrong.mkdir(parents=True)
    (wrong / "__init__.py").write_text(
        "def patch_embed(images, weight, **k): return images.new_zeros(len(images), 5, len(weight)) + weight.sum()"
    )
    words = "bench --image 32 --dim 32 --batch 2 --device cpu --seconds 0.02 --impl auto --json"
    status = cli.main([*words.split(), "--mode", mode, "--against", str(ROOT), "--against", str(wrong.parent)])
    result = json.loads(capsys.readouterr().out)
    ours, same, other = result["rows"]
    assert [row["impl"] for row in result["rows"]] == ["auto", f"auto@{ROOT.name}", "auto@wrong"]
    assert ours["ms"]
    assert same["ms"]
    assert same["ratio"]["median"] > 0
    assert other["ms"] is None
    assert other["error"].startswith(message)
    [line] = [line for line in result["against"] if line["against"] == ROOT.name]
    assert line["verdict"] in ("same", "slower", "faster")
    assert status == (line["verdict"] == "slower")

    assert cli.main([*words.split(), "--against", "no-such-revision"]) == 2
    assert "'no-such-revision' is no folder" in capsys.readouterr().err


def test_dry_run_of_the_gpu_suite(tmp_path):
    stages = "build,smoke,headline,training,targets"  # each a process, which imports torch for most of its time
    script = [sys.executable, str(ROOT / "benchmarks" / "gpu_suite.py"), "--out", str(tmp_path), "--dry-run"]
    subprocess.run([*script, "--stages", stages], check=True, timeout=240, capture_output=True)
    result = json.loads((tmp_path / "results.json").read_text())
    assert {stage["stage"]: stage["status"] for stage in result["stages"]} == dict.fromkeys(stages.split(","), "done")
    for row in result["rows"]:
        check_row(row)
        assert row["ms"], row
    assert {(row["stage"], row["mode"]) for row in result["rows"]} == {
        ("headline", "forward"),
        ("training", "both"),
        ("training", "backward"),
        ("targets", "forward"),
        ("targets", "images"),
    }
    told = [note["note"].rpartition(", ")[2] for note in result["notes"] if note["stage"] == "targets"]
    assert told == ["reached", "missed"]
    assert "setup.py build_ext: exit status 0" in [note.get("note") for note in result["notes"]]
    assert [note["check"] for note in result["notes"] if note.get("impl") == "reference"] == ["right"] * len(TINY)
    assert "| headline |" in (tmp_path / "summary.md").read_text()

    rows = len(result["rows"])
    subprocess.run([*script, "--stages", "headline", "--resume"], check=True, timeout=120, capture_output=True)
    assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == rows


def test_the_suite_survives_a_stage_that_dies_and_one_that_hangs(tmp_path):
    code = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import gpu_suite, gpu_stages
def dies(args, out, deadline):
    for what in ("first", "second"):
        if out.once(what):
            out.write({{"note": what}})
            os.abort()
def hangs(args, out, deadline):
    time.sleep(600)
gpu_stages.dies, gpu_stages.hangs = dies, hangs
gpu_suite.STAGES = {{"dies": (240, ""), "hangs": (3, "")}}
gpu_suite.LEAST_SECONDS = 1
gpu_suite.__file__ = {str(tmp_path / "suite.py")!r}
if __name__ == "__main__":
    gpu_suite.main()
"""
    (tmp_path / "suite.py").write_text(code)
    subprocess.run(
        [sys.executable, str(tmp_path / "suite.py"), "--out", str(tmp_path), "--device", "cpu"],
        check=True, timeout=300, capture_output=True,
    )  # fmt: skip
    result = json.loads((tmp_path / "results.json").read_text())
    assert {s["stage"]: s["status"] for s in result["stages"]} == {"dies": "done", "hangs": "cut off"}
    assert [note["note"] for note in result["notes"]] == ["first", "second"]


def test_the_suite_leaves_out_what_killed_the_smoke_test_and_tries_again_once(tmp_path):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import gpu_suite

    smoke = gpu_suite.Output(tmp_path, "smoke")
    assert smoke.once("one triton")
    smoke.write({"case": "one", "impl": "triton", "check": "right"})
    assert smoke.once("one cuda")  # and here the process ends
    assert gpu_suite.Output(tmp_path, "headline").killers() == {"cuda"}

    path = tmp_path / "rows.jsonl"
    for tried in (True, False):  # what was begun last is tried once more, not for ever
        with path.open("a") as file:
            file.write('{"stage": "smo')  # torn
        gpu_suite._clear(path, resume=True)
        assert gpu_suite.Output(tmp_path, "smoke").once("one cuda") == tried
    assert gpu_suite.collect(tmp_path, {}, [])["rows"] == []
