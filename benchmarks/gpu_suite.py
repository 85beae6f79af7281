"""Everything that a GPU has to tell about vitkernels, the most telling first, within a given time.

    python benchmarks/gpu_suite.py --minutes 25 --out results/h200
    python benchmarks/gpu_suite.py --dry-run --out /tmp/dry       # every stage, tiny, on the CPU

Needs torch, triton, numpy and pytest; no network, no installation. Every stage runs in a process of its own, since an
illegal address leaves a process without its GPU, and a hang must not outlive the stage's time. Rows are written as
they come, so a run that is cut off keeps what it has; `--resume` skips what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from functools import partial
from itertools import product
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

# stage: (the most seconds it may take, what it tells)
STAGES = {
    "build": (300, "the C++ extension, where there is one"),
    "smoke": (150, "each backend against fp64"),
    "headline": (240, "the headline shapes: ours, the peers, the ceilings"),
    "training": (240, "ViT-B/16 and L/14, forward and backward, beside torch.compile too"),
    "roads": (120, "every road and tile of the C++ extension on the headline shapes"),
    "compiled": (240, "the headline shapes beside torch.compile"),
    "tests": (240, "pytest tests/"),
    "tune": (240, "tuning of the headline shapes, which are then timed again"),
    "table": (600, "every shape, forward"),
    "backward": (400, "every shape, backward"),
    "profile": (120, "where the time of the first headline shape goes"),
    "sanitize": (120, "compute-sanitizer on tiny problems"),
}
DRY_SECONDS = 30


class Output:
    """rows.jsonl in the folder: a line per row or note, flushed as it comes; and the log of this stage on stdout."""

    def __init__(self, folder: Path, stage: str):
        self.path, self.stage = folder / "rows.jsonl", stage
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.begun = {line["begun"] for line in map(json.loads, lines) if "begun" in line}

    def write(self, line: dict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"stage": self.stage, **line}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def once(self, key: str) -> bool:
        """Whether this has not been begun before: what killed the process once is not tried again."""
        key = f"{self.stage} {key}"
        if key in self.begun:
            return False
        self.begun.add(key)
        self.write({"begun": key})
        return True


# --- The stages. Each takes (args, out, deadline) and writes rows; it runs in its own process.


def build(args, out, deadline):
    if not (ROOT / "csrc").is_dir():
        return out.write({"note": "no csrc/: nothing to build"})
    wanted = {**os.environ, "VITKERNELS_CUDA": "auto" if args.dry_run else "1"}
    done = subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, check=False, env=wanted)
    out.write({"note": f"setup.py build_ext: exit status {done.returncode}"})
    command = [sys.executable, "-m", "vitkernels", "inspect", "--extension"]
    return None if done.returncode or args.dry_run else say(subprocess.run(command, cwd=ROOT, check=False).returncode)


def smoke(args, out, deadline):
    import torch
    from shapes import SMOKE, TINY

    from vitkernels import dispatch
    from vitkernels.bench import alive, gate, problem, settings, short

    for case in TINY if args.dry_run else SMOKE:
        for backend in dispatch.MODULES:
            if not out.once(f"{case.name} {backend}"):
                continue
            row = {"case": case.name, "impl": backend, "check": "right"}
            try:
                call = case.call(args.device)
                if reasons := dispatch.why_not(problem(call), backend):
                    row["check"] = "declines: " + "; ".join(reasons)
                else:
                    with settings(case):
                        row["check"] = gate(backend, call, "forward") or gate(backend, call, "backward") or "right"
            except Exception as error:
                traceback.print_exc()
                row["check"] = short(error)
            say(f"{case.name:<32} {backend:<10} {row['check']}")
            out.write(row)
            alive(torch.device(args.device))


def headline(args, out, deadline):
    cases, tiny = _headline(args)
    _time(args, out, deadline, cases, ["forward"], compiled=False, seconds=0.02 if tiny else 0.5)


def training(args, out, deadline):
    from shapes import TINY, TRAINING

    cases = TINY[:1] if args.dry_run else TRAINING
    _time(args, out, deadline, cases, ["both", "backward"], compiled=False, seconds=0.02 if args.dry_run else 0.4)
    _beside_compilers(args, out, deadline, cases, "both")


def roads(args, out, deadline):
    """The guesses that plan.h takes its choice by (`rate_of`, the tiles' `rate`), measured."""
    import torch

    from vitkernels import cuda, dispatch
    from vitkernels.bench import problem, settings, short

    for case in _headline(args)[0]:
        if time.time() > deadline - 5 or not out.once(case.name):
            continue
        call = case.call(args.device)
        p = problem(call)
        if reasons := dispatch.why_not(p, "cuda"):
            out.write({"case": case.name, "note": "cuda declines: " + "; ".join(reasons)})
            continue
        names = ("images", "weight", "bias", "pos_embed", "prefix", "keep")
        tensors = dispatch.canonical(*(call.get(name) for name in names))
        with settings(case), torch.no_grad():
            chosen = cuda.how(p)
            for how, plan in cuda.candidates(p, *tensors[:2]).items():
                try:
                    ms = _milliseconds(partial(cuda.forward, p, *tensors, plan=plan), args.device)
                    row = {"case": case.name, "road": how, "chosen": how == chosen, "road_ms": ms}
                except RuntimeError as error:
                    row = {"case": case.name, "error": f"{how}: {short(error)}"}
                say(row)
                out.write(row)


def _milliseconds(step, device: str) -> float:
    if device == "cpu":
        begin = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - begin)
    from triton.testing import do_bench

    return do_bench(step, warmup=10, rep=60, return_mode="median")


def compiled(args, out, deadline):
    cases, _ = _headline(args)
    _beside_compilers(args, out, deadline, cases, "forward")


def _beside_compilers(args, out, deadline, cases, mode):
    peers = ["compile_conv", "compile_linear"]
    if args.device != "cpu":
        peers += ["compile_conv_max", "compile_linear_max"]
    tiny = args.dry_run
    for case in cases[: 1 if tiny else None]:
        for peer in peers[: 1 if tiny else None]:  # one at a time: a compiler that hangs costs one row
            _time(args, out, deadline, [case], [mode], impls=["auto", peer], seconds=0.02 if tiny else 0.3)


def tests(args, out, deadline):
    command = [sys.executable, "-m", "pytest", "-q", "-x" if args.dry_run else "--maxfail=30", "tests"]
    command += ["-p", "no:cacheprovider", "--ignore=tests/test_bench.py", "--durations=10"]
    if args.dry_run:
        command += ["-k", "case or problem"]
    log = Path(args.out) / "pytest.log"
    with log.open("w") as file:
        try:
            left = max(5, deadline - time.time() - 2)
            done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=left, check=False)
            end = f"exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            end = "cut off"
    lines = log.read_text().strip().splitlines()
    out.write({"note": f"pytest: {end}; {lines[-1] if lines else 'no output'}",
               "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))]})  # fmt: skip
    say("\n".join(lines[-15:]), end)


def tune(args, out, deadline):
    from vitkernels.bench import settings, short

    try:
        from vitkernels.tuning import tune as search
    except ImportError as error:
        return out.write({"note": f"no tuning: {short(error)}"})
    cases, tiny = _headline(args)
    for i, case in enumerate(cases):
        left = deadline - time.time()
        if left > 10 and out.once(case.name):
            try:
                with settings(case):
                    found = search(case.call(args.device), seconds=min(60, left * 0.6 / (len(cases) - i)))
                if Path(str(found.get("file"))).is_file():
                    shutil.copy(found["file"], args.out)
                out.write({"case": case.name, "tuned": json.loads(json.dumps(found, default=str))})
                say(case.name, found)
            except Exception as error:
                traceback.print_exc()
                out.write({"case": case.name, "error": f"tune: {short(error)}"})
    return _time(args, out, deadline, cases, ["forward"], compiled=False, seconds=0.02 if tiny else 0.4)


def table(args, out, deadline):
    from shapes import CASES, TINY

    _time(args, out, deadline, TINY[2:4] if args.dry_run else CASES, ["forward"], compiled=False, seconds=0.2)


def backward(args, out, deadline):
    from shapes import CASES, TINY

    cases = TINY[:2] if args.dry_run else CASES
    _time(args, out, deadline, cases, ["backward"], compiled=False, seconds=0.02 if args.dry_run else 0.2)


def profile(args, out, deadline):
    import torch
    from torch.profiler import ProfilerActivity

    from vitkernels.bench import problem, settings, steps
    from vitkernels.dispatch import why_not

    case = _headline(args)[0][0]
    gpu = args.device != "cpu"
    ours = ("auto", "cuda") if not why_not(problem(case.call(args.device)), "cuda") else ("auto",)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    with settings(case), torch.no_grad():
        for impl in (*ours, "timm_eager"):
            [(step, _)] = steps(impl, [case.call(args.device)])
            for _ in range(3):
                step()
            with torch.profiler.profile(activities=activities) as prof:
                for _ in range(10):
                    step()
                if gpu:
                    torch.cuda.synchronize()
            text = prof.key_averages().table(sort_by=f"self_{'cuda' if gpu else 'cpu'}_time_total", row_limit=12)
            (Path(args.out) / f"profile-{impl}.txt").write_text(text)
            say(text)
    out.write({"note": "profile-*.txt: torch.profiler"})
    sections = [f"--section={s}" for s in ("SpeedOfLight", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy",
                                           "WarpStateStats", "SchedulerStats", "SourceCounters")]  # fmt: skip
    for i in range(1 if args.dry_run else 4):
        _tool(args, out, deadline, "ncu", ["--clock-control", "none", "--launch-skip", "12", "--launch-count", "4",
              "--csv", "--page", "details", *sections], ["--once", str(i)])  # fmt: skip


def sanitize(args, out, deadline):
    for tool in ("memcheck", "racecheck")[: 1 if args.dry_run else 2]:
        _tool(args, out, deadline, "compute-sanitizer", ["--tool", tool, "--error-exitcode", "9"], ["--once", "tiny"])


# --- Their helpers.


def say(*words) -> None:
    print(*words, flush=True)


def _headline(args):
    from shapes import HEADLINE, TINY

    return (TINY[:2] if args.dry_run else HEADLINE), args.dry_run


def _time(args, out, deadline, cases, modes, *, impls=None, compiled=None, seconds) -> None:
    import torch

    from vitkernels.bench import alive, bench, short

    for mode in modes:
        for case in cases:
            if time.time() > deadline - 5:
                return out.write({"note": f"no time left for {case.name} {mode} and what follows"})
            if not out.once(f"{case.name} {mode} {' '.join(impls or ())}"):
                continue
            try:
                rows = bench(case, device=args.device, mode=mode, impls=impls, compiled=compiled, seconds=seconds)
            except Exception as error:
                traceback.print_exc()
                trace = traceback.format_exc()[-3000:]
                out.write({"case": case.name, "mode": mode, "error": short(error), "trace": trace})
                alive(torch.device(args.device))
                continue
            for row in rows:
                out.write(row)
                say(line_of(row))
    return None


def _tool(args, out, deadline, tool, options, what) -> None:
    """Run this file's --once under a tool of the CUDA toolkit, if there is one."""
    path = shutil.which(tool) or next((str(p) for p in [Path("/usr/local/cuda/bin") / tool] if p.exists()), None)
    name = f"{tool} {options[1]} {what[1]}"
    if path is None:
        path, options = sys.executable, []  # without the tool: that the program under it runs
        if not args.dry_run:
            return out.write({"note": f"no {tool} here"})
    left = deadline - time.time()
    if left < 10 or not out.once(name):
        return out.write({"note": f"no time for {name}"})
    own = [] if path == sys.executable else [sys.executable]
    command = [path, *options, *own, str(HERE / "gpu_suite.py"), *what, "--device", args.device]
    log = Path(args.out) / (name.replace(" ", "-") + ".log")
    with log.open("w") as file:
        try:
            done = subprocess.run(
                command + ["--dry-run"] * args.dry_run, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                timeout=min(left, 60), check=False,
            )  # fmt: skip
            end = f"exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            end = "cut off"
    tail = log.read_text(errors="replace").strip().splitlines()[-1:]
    say(name, end, *tail)
    return out.write({"note": f"{name}: {end}; {' '.join(tail)[:300]}; {log.name}"})


def once(args) -> None:
    """A few launches of each backend's kernels for a tool to look at: headline shape number `--once`, or the tiny ones,
    both directions."""
    import torch
    from shapes import TINY

    from vitkernels import dispatch
    from vitkernels.bench import problem, steps

    tiny = args.once == "tiny"
    cases = TINY if tiny else [_headline(args)[0][int(args.once) % len(_headline(args)[0])]]
    launches = []
    for case, backend in product(cases, dispatch.MODULES):
        call = case.call(args.device)
        if backend != "reference" and not dispatch.why_not(problem(call), backend):
            launches += steps(backend, [call], tiny)
    for _ in range(1 if tiny else 20):
        for step, leaves in launches:
            tokens = step()
            if tiny:
                torch.autograd.grad(tokens, leaves, torch.ones_like(tokens))
    if args.device != "cpu":
        torch.cuda.synchronize()


# --- Results.


def line_of(row: dict) -> str:
    head = f"{row['case']:<34} {row['mode']:<8} {row['impl']:<20} {row['timing']:<6}"
    if row.get("error"):
        return f"{head} {row['error']}"
    share, ratio = row["roofline_share"], row.get("ratio")
    return (
        f"{head} {row['ms']['median']:>10.4f} ms  ({row['ms']['p20']:.4f} to {row['ms']['p80']:.4f})"
        + (f"  {ratio:6.2f} x" if ratio else "")
        + (f"  {share:6.1%} of the roofline" if share else "")
    )


def collect(folder: Path, head: dict, statuses: list[dict]) -> dict:
    """results.json and summary.md from rows.jsonl."""
    path = folder / "rows.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    lines = [line for line in lines if "begun" not in line]
    rows = [line for line in lines if "ms" in line]
    result = {"header": head, "stages": statuses, "rows": rows, "notes": [line for line in lines if "ms" not in line]}
    temporary = folder / "results.json.part"
    temporary.write_text(json.dumps(result, indent=1))
    temporary.replace(folder / "results.json")
    (folder / "summary.md").write_text(summary(result))
    return result


def summary(result: dict) -> str:
    ceilings = ("copy", "gemm", "empty")
    text = [f"# {result['header'].get('gpu') or result['header'].get('cpu')}", ""]
    text += [f"- {key}: {value}" for key, value in result["header"].items() if value]
    text += ["", "| stage | status | seconds |", "| --- | --- | --- |"]
    text += [f"| {s['stage']} | {s['status']} | {s['seconds']} |" for s in result["stages"]]
    groups: dict[tuple, list[dict]] = {}
    for row in result["rows"]:
        groups.setdefault((row["stage"], row["case"], row["mode"], row["timing"]), []).append(row)
    text += [
        "", "| stage | case | mode | timing | auto ms | best peer | its ms | x | of the roofline | gemm ms | copy ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for (stage, case, mode, timing), rows in groups.items():
        ms = {row["impl"]: row["ms"]["median"] for row in rows if row["ms"]}
        ours = next((row for row in rows if row["impl"] == "auto"), None)
        if ours is None:
            continue
        peers = {i: t for i, t in ms.items() if i not in (*ceilings, "auto", "triton", "cuda", "reference")}
        best = min(peers, key=peers.get) if peers else ""
        if "auto" in ms:
            mine = f"{ms['auto']:.4f}"
            gain = f"{peers[best] / ms['auto']:.2f}" if best else ""
        else:
            mine, gain = ours.get("error", ""), ""
        share = f"{ours['roofline_share']:.0%}" if ours.get("roofline_share") else ""
        cells = [stage, case, mode, timing, mine, best, f"{peers[best]:.4f}" if best else "", gain, share]
        cells += [f"{ms[c]:.4f}" if c in ms else "" for c in ("gemm", "copy")]
        text.append("| " + " | ".join(cells) + " |")
    text += ["", "## Notes", ""]
    for note in result["notes"]:
        words = note.get("note") or note.get("error") or note.get("tuned")
        if "road" in note:
            words = f"{note['road_ms']:.4f} ms{', chosen' * note['chosen']}: {note['road']}"
        if "check" in note:
            words = f"{note['impl']}: {note['check']}"
        text.append(f"- {note['stage']} {note.get('case', '')}: {words}")
        text += [f"  - {line}" for line in note.get("failed", [])]
    errors = [f"- {line_of(row)}" for row in result["rows"] if row.get("error")]
    return "\n".join([*text, "", "## Without a time", "", *errors, ""])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25, help="of all stages together")
    parser.add_argument("--out", default="results", help="folder")
    parser.add_argument("--device", default=None, help="cuda, cuda:1, cpu (default: cuda, in a dry run cpu)")
    parser.add_argument("--dry-run", action="store_true", help="every stage on tiny shapes")
    parser.add_argument("--resume", action="store_true", help="skip what the folder has")
    parser.add_argument("--stages", default=",".join(STAGES), help="which, in order")
    parser.add_argument("--stage", help=argparse.SUPPRESS)  # this process is a stage
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--once", help=argparse.SUPPRESS)  # this process is what a tool looks at
    args = parser.parse_args(argv)
    args.device = args.device or ("cpu" if args.dry_run else "cuda")
    if args.once:
        once(args)
        return 0
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    if args.stage:
        globals()[args.stage](args, Output(folder, args.stage), args.deadline)
        return 0

    names = args.stages.split(",")
    if unknown := [name for name in names if name not in STAGES]:
        parser.error(f"unknown stages {unknown}; there are {', '.join(STAGES)}")
    _clear(folder / "rows.jsonl", args.resume)
    begin = time.time()
    end = begin + 60 * args.minutes
    command = "python benchmarks/gpu_suite.py " + " ".join(sys.argv[1:] if argv is None else argv)
    head = _header(args.device, command, folder)
    say(json.dumps(head))
    statuses = [{"stage": name, "status": "not begun", "seconds": 0} for name in names]
    for status in statuses:
        name = status["stage"]
        most = DRY_SECONDS if args.dry_run else STAGES[name][0]
        start = time.time()
        status["status"] = "no time left"
        for _ in range(4):  # a process that dies is begun again; what it was at is skipped then
            deadline = min(start + most, end)
            if deadline - time.time() < 8:
                break
            say(f"=== {name}: {STAGES[name][1]} ({deadline - time.time():.0f} s at most)")
            status["status"] = _run_stage(args, name, deadline, folder)
            if status["status"] == "done" or status["status"] == "cut off":
                break
        status["seconds"] = round(time.time() - start, 1)
        say(f"=== {name}: {status['status']}, {status['seconds']} s")
        collect(folder, head, statuses)
    say((folder / "summary.md").read_text())
    return 0


def _clear(path: Path, resume: bool) -> None:
    """Forget everything; to resume, what a stage had begun when its time was up."""
    lines = path.read_text().splitlines(keepends=True) if resume and path.exists() else []
    last = {json.loads(line)["stage"]: line for line in lines}
    path.write_text("".join(line for line in lines if line != last[json.loads(line)["stage"]] or '"begun"' not in line))


def _run_stage(args, name: str, deadline: float, folder: Path) -> str:
    command = [sys.executable, str(Path(__file__).resolve()), "--stage", name, "--out", str(folder)]
    command += ["--device", args.device, "--deadline", str(deadline), *["--dry-run"] * args.dry_run]
    with (folder / f"{name}.log").open("ab") as log:
        log.write(f"\n--- {' '.join(command)}\n".encode())
        log.flush()
        place = log.tell()
        # A session of its own, so that a stage that hangs takes what it started along.
        child = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = child.wait(timeout=max(1, deadline + 3 - time.time()))
            status = "done" if code == 0 else f"died ({code})"
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, 9)
            child.wait()
            status = "cut off"
    with (folder / f"{name}.log").open("rb") as log:
        log.seek(place)
        say(log.read()[-6000:].decode(errors="replace"))
    return status


def _header(device: str, command: str, folder: Path) -> dict:
    """In a process of its own: this one must not hold the GPU."""
    code = (
        f"import sys, json; sys.path.insert(0, {str(ROOT)!r})\n"
        f"from vitkernels.bench import header; print(json.dumps(header({device!r}, {command!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=False)
    try:
        head = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        head = {"command": command, "error": done.stderr[-2000:]}
    if smi := shutil.which("nvidia-smi"):
        query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,memory.total"
        done = subprocess.run([smi, f"--query-gpu={query}", "--format=csv"], capture_output=True, text=True, timeout=30,
                              check=False)  # fmt: skip
        head["nvidia_smi"] = done.stdout.strip()
    (folder / "header.json").write_text(json.dumps(head, indent=1))
    return head


if __name__ == "__main__":
    sys.exit(main())
