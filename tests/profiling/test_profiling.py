"""Traces and their tables on a CPU; ncu's and nsys's commands and output from text such as they print. Figures in that
text are made up."""

from __future__ import annotations

import json
import os
import shlex
import stat
import sys
from itertools import pairwise

import pytest
import torch

from vitkernels import cli
from vitkernels.bench.cases import Case
from vitkernels.cli import options
from vitkernels.cli import profile as command
from vitkernels.profiling import nsight, trace

SMALL = ("profile", "--device", "cpu", "--image", "32", "--dim", "64", "--batch", "2")

# `ncu --import … --page raw --csv --print-units base` of two kernels on an H100, as version 2025 prints it: the columns
# in the alphabet's order, units in the second row, messages before it where it is not imported.
HEAD = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device",'
    '"CC"'
)
RAW = {
    "dram__bytes.sum.per_second": ("byte/second", "2,211,340,021,276.60", "n/a"),
    "dram__bytes_read.sum": ("byte", "79,104,000", "1,024"),
    "dram__bytes_write.sum": ("byte", "24,829,120", "3,072"),
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": ("%", "66.01", "0.10"),
    "gpu__time_duration.sum": ("ns", "47,000", "2,048"),
    "launch__block_size": ("", "256", "128"),
    "launch__func_cache_config": ("", "CachePreferNone", "CachePreferNone"),
    "launch__registers_per_thread": ("register/thread", "170", "16"),
    "launch__shared_mem_per_block_dynamic": ("byte/block", "147,456", "0"),
    "launch__shared_mem_per_block_static": ("byte/block", "0", "32"),
    "launch__waves_per_multiprocessor": ("", "8.91", "0.01"),
    "lts__t_bytes.sum.per_second": ("byte/second", "4,100,000,000,000", "2,000,000,000"),
    "lts__t_sector_hit_rate.pct": ("%", "71.80", "50"),
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "58.20", "0.4"),
    "sm__inst_executed_pipe_tensor_op_gmma.avg.pct_of_peak_sustained_active": ("%", "2.86", "0"),
    "sm__maximum_warps_per_active_cycle_pct": ("%", "12.50", "100"),
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed": ("%", "41.30", "(!) n/a"),
    "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active": ("%", "45.83", "n/a"),
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "44.00", "0.2"),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("%", "12.49", "31.20"),
    "smsp__average_warps_issue_stalled_barrier_not_issued_per_issue_active.ratio": ("inst", "9.9", "0"),
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": ("inst", "1.26", "0"),
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": ("inst", "5.30", "3.00"),
    "smsp__average_warps_issue_stalled_selected_per_issue_active.ratio": ("inst", "1.00", "1.00"),
    "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio": ("inst", "1.35", "0"),
}
KERNELS = (
    '"0","4211","python3.12","127.0.0.1","descriptor_kernel","1","7","(256, 1, 1)","(1176, 1, 1)","0","9.0"',
    '"1","4211","python3.12","127.0.0.1","void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor'
    '<float>, std::array<char *, 1ul>>(int, T2, T3)","1","7","(128, 1, 1)","(1, 1, 1)","0","9.0"',
)


def wide(names=tuple(RAW)) -> str:
    row = lambda i: ",".join(f'"{RAW[name][i]}"' for name in names)  # noqa: E731
    lines = [HEAD + "," + ",".join(f'"{name}"' for name in names), '"",' * 11 + row(0)]
    return "\n".join([*lines, *(f"{kernel},{row(i)}" for i, kernel in enumerate(KERNELS, 1))]) + "\n"


def test_the_raw_page():
    first, second = map(nsight.row, nsight.parse(wide()))
    assert first["kernel"] == "descriptor_kernel" and second["kernel"].startswith("void at::native")
    assert (first["grid"], first["block"]) == ([1176, 1, 1], [256, 1, 1])
    expected = {
        "us": 47.0, "dram_gb_per_s": 2211.3400212766, "dram_percent": 66.01, "l2_gb_per_s": 4100, "l2_percent": 58.2,
        "l2_hit_percent": 71.8, "tensor_percent": 41.3, "sm_percent": 44, "registers": 170, "shared_bytes": 147456,
        "occupancy_percent": 12.49, "occupancy_possible_percent": 12.5, "waves": 8.91, "cycles": 8.91,
    }  # fmt: skip
    assert {key: first[key] for key in expected} == pytest.approx(expected)
    assert first["stalls"] == {"long_scoreboard": 5.3, "wait": 1.35, "barrier": 1.26}
    assert first["reading"] == (
        "memory-bound at 66 %, L2 at 58 %, tensor pipe at 41 %, multiprocessors at 44 %; main stall long_scoreboard, "
        "5.3 of 8.9 cycles: a warp waits for data from global memory or L2"
    )
    assert second["dram_gb_per_s"] == pytest.approx(2.0)  # what is n/a follows from the bytes and the time
    assert second["tensor_percent"] == 0.0  # of all its names the only one counted
    assert second["reading"].startswith("bound by latency: L2 at 0 % is the most")


@pytest.mark.parametrize("text", ["", "==WARNING== No kernels were profiled.\n", HEAD + ',"x__y"\n', "no table\n"])
def test_no_table_is_no_kernel(text):
    assert nsight.parse(text) == []


def test_other_units_and_names():
    """Older versions write units in full and scale them; another architecture has other counters of the tensor pipe."""
    text = f"""{HEAD},"dram__bytes_read.sum","dram__bytes_write.sum","gpu__time_duration.sum","sm__pipe_tensor_op_imma_cycles_active.avg.pct_of_peak_sustained_active","sm__pipe_tensor_subpipe_hmma_cycles_active.avg.pct_of_peak_sustained_elapsed"
{'"",' * 11}"Mbyte","Kbyte","msecond","%","%"
{KERNELS[0]},"50","50,000","0.05","0","88.0"
"""  # noqa: E501
    [kernel] = map(nsight.row, nsight.parse(text))
    assert kernel["us"] == pytest.approx(50) and kernel["dram_gb_per_s"] == pytest.approx(2000)
    assert kernel["tensor_percent"] == 88 and kernel["registers"] is None
    assert kernel["reading"] == "tensor pipe-bound at 88 %"
    assert nsight.row({"kernel": "k", "grid": [], "block": [], "metrics": {}})["reading"].startswith("nothing")


@pytest.mark.parametrize(
    ("text", "status", "words"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters on "
         "the target device 0. For instructions on enabling permissions and to get more information see "
         "https://developer.nvidia.com/ERR_NVGPUCTRPERM", 1, ("sudo", "NVreg_RestrictProfilingToAdminUsers=0")),
        ("==PROF== Disconnected from process 7\n==WARNING== No kernels were profiled.\n", 0, ("no kernel",)),
        ("==ERROR== Failed to find metric sm__nonsense.avg\n", 1, ("sm__nonsense",)),
        ("Traceback\nImportError: no vitkernels\n", 1, ("exit status 1", "no vitkernels")),
        ("==PROF== Report: /tmp/x.ncu-rep\n", 0, ()),
    ],
)  # fmt: skip
def test_problems_in_words(text, status, words):
    problem = nsight.problem_in(text, status)
    assert (problem is None) == (not words)
    assert all(word in problem for word in words)


# --- Commands, run with programs in the place of ncu and nsys.

FAKE = """#!{python}
import os, subprocess, sys
from pathlib import Path

argv = sys.argv[1:]
mode = Path({here!r}, "mode").read_text()
with Path({here!r}, "log").open("a") as log:
    log.write(repr(argv) + "\\n")
if "--import" in argv:
    assert argv[argv.index("--page") + 1] == "raw" and "--csv" in argv and os.environ["LC_ALL"] == "C"
    assert Path(argv[argv.index("--import") + 1]).is_file()
    print(Path({here!r}, "csv").read_text(), end="")
    sys.exit()
if mode == "forbidden":
    print("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission")
    sys.exit(1)
if mode == "old" and "--metrics" in argv:
    print("==ERROR== Failed to find metric lts__t_bytes.sum.per_second")
    sys.exit(1)
if mode == "slow":
    import time
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    time.sleep(60)
target = argv[argv.index(sys.executable):]
report = argv[argv.index("--export" if "--export" in argv else "--output") + 1]
target[target.index("--device") + 1] = "cpu"
status = 0
if mode == "whole":
    done = subprocess.run(target, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    status = done.returncode
print("==PROF== Report: " + report)
Path(report).write_text("report")
sys.exit(status)
"""


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """ncu and nsys on PATH that write down their arguments, run the target on the CPU, and give the table above."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("ncu", "nsys"):
        (folder / name).write_text(FAKE.format(python=sys.executable, here=str(tmp_path)))
        (folder / name).chmod(stat.S_IRWXU)
    (tmp_path / "mode").write_text("")
    (tmp_path / "csv").write_text(wide())
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return tmp_path


def nsight_of(tools, *argv):
    parser = cli.Parser()
    command.arguments(parser)
    args = parser.parse_args(
        ["--image", "32x48", "--patch", "16", "--dim", "64", "--batch", "2", "--dtype", "fp32", *argv]
    )
    args.out = tools / "out"
    case = options.case_of(args, "cuda")
    device = type("Device", (), {"type": "cuda", "__str__": lambda self: "cuda"})()
    result = {"traces": [], "roofline": {"attainable_us": 23.5}}
    return command._nsight(args, case, "auto", device, result, lambda text: None)


def test_ncu_and_nsys_are_run_and_read(tools):
    (tools / "mode").write_text("whole")
    found = nsight_of(tools, "--mode", "both", "--channels-last", "--keep", "0.5")
    assert "problem" not in found["ncu"] and "problem" not in found["nsys"], found
    assert found["ncu"]["kernels"][0]["kernel"] == "descriptor_kernel"
    assert found["ncu"]["us"] == pytest.approx(49.048)
    assert found["ncu"]["roofline_share"] == pytest.approx(23.5 / 49.048)
    files = [*found["ncu"]["files"], *found["nsys"]["files"]]
    assert [f.rpartition(".")[2] for f in files] == ["ncu-rep", "csv", "nsys-rep"]
    assert all(os.path.isfile(f) for f in files)
    collect, read, nsys = map(eval, (tools / "log").read_text().splitlines())
    assert [shlex.split(c)[1:] for c in (*found["ncu"]["commands"], *found["nsys"]["commands"])] == [
        collect,
        read,
        nsys,
    ]
    sections = [word for before, word in pairwise(collect) if before == "--section"]
    assert set(sections) >= {"SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats", "WarpStateStats"}
    for pair in (("--profile-from-start", "off"), ("--clock-control", "none"), ("--launch", "1"), ("--keep", "0.5")):
        assert pair in pairwise(collect)
    assert "--channels-last" in collect and "32x48" in collect
    assert ("--capture-range", "cudaProfilerApi") in pairwise(nsys)


def test_without_permission_it_says_what_to_do(tools):
    (tools / "mode").write_text("forbidden")
    found = nsight_of(tools)
    assert "sudo" in found["ncu"]["problem"] and "kernels" not in found["ncu"]


def test_a_metric_that_ncu_does_not_know_leaves_the_sections(tools):
    (tools / "mode").write_text("old")
    found = nsight_of(tools)["ncu"]
    assert len(found["kernels"]) == 2 and "problem" not in found


def test_no_run_prints_only(tools):
    found = nsight_of(tools, "--no-run")
    assert all(row["commands"] and "--no-run" in row["problem"] for row in found.values())
    assert not (tools / "log").exists()


def test_a_missing_tool_is_said(tools, monkeypatch):
    monkeypatch.setattr(nsight, "tool", lambda name: None)
    found = nsight_of(tools)
    assert found["ncu"]["commands"][0].startswith("ncu --profile-from-start off")
    assert all(row["problem"].startswith("not run: no n") for row in found.values())


def test_a_tool_that_hangs_is_ended_with_its_children(tools):
    (tools / "mode").write_text("slow")
    _, problem = nsight.run([nsight.tool("ncu"), "--metrics", sys.executable], seconds=1)
    assert problem == "it was ended after 1 s"  # and it came back: nobody holds the pipe


# --- Traces.


def test_a_gpus_trace():
    """Kernels and copies as Kineto writes them, whatever the CPU did meanwhile."""
    size = {"registers per thread": 170, "shared memory": 147456, "grid": [1176, 1, 1], "block": [256, 1, 1]}
    kernel = lambda ts, dur, name, **args: {  # noqa: E731
        "ph": "X", "cat": "kernel", "name": name, "pid": 0, "tid": 7, "ts": ts, "dur": dur,
        "args": {"device": 0, "stream": 7, "est. achieved occupancy %": 12, **args},
    }  # fmt: skip
    events = [
        {"ph": "X", "cat": "user_annotation", "name": "patch_embed", "pid": 9, "tid": 9, "ts": 0.0, "dur": 300.0},
        {"ph": "X", "cat": "gpu_user_annotation", "name": "patch_embed", "pid": 0, "tid": 7, "ts": 9.0, "dur": 98.0},
        {"ph": "X", "cat": "cpu_op", "name": "aten::empty", "pid": 9, "tid": 9, "ts": 1.0, "dur": 250.0},
        {"ph": "X", "cat": "cuda_runtime", "name": "cuLaunchKernelEx", "pid": 9, "tid": 9, "ts": 3.0, "dur": 5.0},
        kernel(10.0, 47.0, "descriptor_kernel", **size), kernel(60.0, 45.0, "descriptor_kernel", **size),
        {"ph": "X", "cat": "gpu_memset", "name": "Memset (Device)", "pid": 0, "tid": 7, "ts": 8.0, "dur": 8.0,
         "args": {"bytes": 4}},
        {"ph": "f", "cat": "ac2g", "name": "ac2g", "id": 1, "pid": 0, "tid": 7, "ts": 10.0},
        {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "python"}},
    ]  # fmt: skip
    first, second = trace.table({"traceEvents": events}, calls=2)
    assert first == {
        "name": "descriptor_kernel", "count": 1, "us": 46.0, "share": 0.92, "registers": 170, "shared_bytes": 147456,
        "grid": [1176, 1, 1], "block": [256, 1, 1],
    }  # fmt: skip
    assert second == {"name": "Memset (Device)", "count": 0.5, "us": 4.0, "share": 0.08}


def test_operations_count_without_those_inside():
    operation = lambda name, ts, dur, tid=1: {  # noqa: E731
        "ph": "X", "cat": "cpu_op", "name": name, "tid": tid, "ts": ts, "dur": dur,
    }  # fmt: skip
    events = [
        operation("inner", 2, 3), operation("outer", 0, 10), operation("inner", 6, 2), operation("leaf", 6.5, 1),
        operation("outer", 20, 1), operation("inner", 1, 4, tid=2),
    ]  # fmt: skip
    rows = {row["name"]: (row["count"], row["us"]) for row in trace.table({"traceEvents": events}, calls=1)}
    assert rows == {"outer": (2, 10 - 3 - 2 + 1), "inner": (3, 3 + 2 - 1 + 4), "leaf": (1, 1)}
    assert trace.table({"traceEvents": []}, calls=1) == []


@pytest.mark.parametrize("mode", options.MODES)
def test_a_trace_has_ranges_named_after_operation_and_shape(mode, tmp_path):
    case = Case(batch=2, image=32, patch=16, dim=64, dtype="fp32")
    cpu = torch.device("cpu")
    found = trace.trace(case, "auto", mode=mode, device=cpu, out=tmp_path, calls=4)
    events = json.loads((tmp_path / f"B2-32-P16-D64-fp32-{mode}-auto.json").read_text())["traceEvents"]
    ranges = [e for e in events if e.get("cat") == "user_annotation"]
    assert [e["name"] for e in ranges] == [f"patch_embed {mode} B2 32 P16 D64 fp32 [reference]"] * 4
    names = {row["name"]: row["count"] for row in found["kernels"]}
    assert names.get("vitkernels::patch_embed", 0) == (mode in ("forward", "both"))
    assert names.get("vitkernels::patch_embed_backward", 0) == (mode != "forward")
    assert sum(row["share"] for row in found["kernels"]) == pytest.approx(1)
    assert found["us"] == pytest.approx(sum(row["us"] for row in found["kernels"]))
    inside = sum(e["dur"] for e in ranges) / 4
    assert 0 < found["us"] <= inside * 1.01
    assert found["roofline_share"] > 0
    assert found["peak_mb"] < 1


def test_what_breaks_the_accuracy_rule_has_no_profile(tmp_path, monkeypatch):
    from vitkernels.bench import baselines

    conv = baselines.conv
    monkeypatch.setitem(baselines.PEERS, "timm_eager", lambda: lambda *a, **k: conv(*a, **k) * 1.1)
    case = Case(batch=2, image=32, patch=16, dim=64, dtype="fp32")
    found = trace.trace(case, "timm_eager", mode="forward", device=torch.device("cpu"), out=tmp_path)
    assert "above" in found["error"] and "us" not in found


# --- The command.


def test_profile_on_a_cpu(tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main([*SMALL, "--out", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["ok"] and [row["impl"] for row in result["traces"]] == ["auto", "timm_eager"]
    assert sorted(result["files"]) == sorted(str(f) for f in out.iterdir())
    roofline = result["roofline"]
    assert roofline["flops"] == 2 * 2 * 4 * 768 * 64
    times = roofline["bytes"] / roofline["peak_gb_per_s"] * 1e-3, roofline["flops"] / roofline["peak_tflops"] * 1e-6
    assert roofline["attainable_us"] == pytest.approx(max(times))
    for row in result["nsight"].values():
        assert "CPU" in row["problem"] and "--device cuda --dtype fp32" in row["commands"][0]

    assert cli.main([*SMALL, "--out", str(out), "--impl", "auto"]) == 0
    text = capsys.readouterr().out
    assert "[reference]" in text and "vitkernels::patch_embed" in text and "ncu --profile-from-start off" in text


def test_the_counters_are_shown(capsys):
    found = {"kernels": [nsight.row(k) for k in nsight.parse(wide())], "us": 49.0, "roofline_share": 0.48}
    result = {
        "header": {"gpu": "H100", "cpu": None, "torch": "2.11", "triton": "3.6", "vitkernels": "0", "commit": None},
        "roofline": {"flops": 1e9, "bytes": 1e6, "peak_gb_per_s": 3e3, "peak_tflops": 700.0, "attainable_us": 23.5,
                     "bound": "memory"},
        "case": "B2", "mode": "forward", "traces": [{"impl": "auto", "error": "tokens: [x] error 1"}], "files": [],
        "nsight": {"ncu": {"commands": ["ncu [a]"], **found}},
    }  # fmt: skip
    command.show(result)
    text = " ".join(capsys.readouterr().out.split())
    assert "descriptor_kernel: memory-bound at 66 %" in text and "48% of the roofline" in text
    assert "ncu [a]" in text and "[x] error 1" in text


def test_the_hidden_launch_only_launches(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*SMALL, "--launch", "2", "--mode", "both", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"launched": 2}
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit):
        cli.main(["profile", "--help"])
    assert "--launch" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "word"), [(("--impl", "nobody"), "nobody"), (("--dim", "0"), "--dim"), (("--keep", "x"), "--keep")]
)
def test_wrong_options_are_one_line(argv, word, capsys):
    try:
        status = cli.main([*SMALL, *argv])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and err.count("\n") == 1 and word in err


def test_options_and_words_agree():
    """What is passed to ncu's target is the case that was asked for."""
    parser = cli.Parser()
    options.shape_arguments(parser)
    argv = shlex.split(
        "--image 64x96 --patch 8 --dim 48 --batch 3 --chans 4 --prefix 0 --frames 8 --tubelet 4 --keep 0.25 "
        "--pixels uint8 --channels-last --mode backward --dtype bf16"
    )
    args = parser.parse_args(argv)
    again = parser.parse_args(options.words_of(args, "cpu", "bf16"))
    assert options.case_of(again, "cpu") == options.case_of(args, "cpu") and again.mode == "backward"
    assert options.case_of(args, "cpu").name == "B3-8f64x96-P4x8-D48-bf16-uint8-C4-T0-keep0.25-hwc"
    args = parser.parse_args(["--autocast"])
    dtype = options.dtype_of(args, "cpu")
    again = parser.parse_args(options.words_of(args, "cpu", dtype))
    assert dtype == "bf16" and options.case_of(again, "cpu") == options.case_of(args, "cpu") and again.autocast
    with pytest.raises(ValueError, match="to bf16 or fp16, not to fp32"):
        options.case_of(parser.parse_args(["--autocast", "--dtype", "fp32"]), "cpu")
    assert options.case_of(parser.parse_args([]), "cpu").dtype == "fp32"
    assert options.case_of(parser.parse_args([]), "cuda").dtype == "bf16"
