"""Everything that a GPU has to tell about vitkernels, the most telling first, in under nine minutes.

    python benchmarks/gpu_suite.py --out results/h200
    python benchmarks/gpu_suite.py --out results/h200 --resume    # goes on where that ended, for nine minutes more
    python benchmarks/gpu_suite.py --dry-run --out /tmp/dry       # every stage, tiny, on the CPU

Needs torch, triton, numpy and pytest; no network, no installation. Every stage (gpu_stages.py) runs in a process of its
own, since an illegal address leaves a process without its GPU, and a hang must not outlive the stage's time. Rows are
written as they come, so a run that is cut off keeps what it has. `vitkernels report` draws what is left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

# stage: (the most seconds it may take in one run, what it tells). What one run has no time for, `--resume` does.
STAGES = {
    "build": (110, "the C++ extension, where there is one"),
    "smoke": (40, "each backend against fp64"),
    "races": (60, "every kernel some hundreds of times beside other work: the same bits?"),
    "headline": (60, "the headline shapes: ours, the peers, the ceilings"),
    "training": (60, "forward and backward"),
    "targets": (100, "our best beside what it should take: suites.TARGETS"),
    "host": (40, "what a call costs the host, beside F.linear"),
    "tests": (90, "pytest tests/, the backends first"),
    "profile": (50, "where the time of the first headline shape goes: trace and ncu"),
    "tune": (60, "tuning of the headline shapes, which are then timed again"),
    "compiled": (120, "the headline shapes beside torch.compile"),
    "models": (90, "whole models before and after fusing, and the input pipeline"),
    "table": (240, "every shape, forward"),
    "kernels": (60, "every loader and tile of the C++ extension on the headline shapes"),
    "backward": (240, "every shape, backward"),
    "sanitize": (120, "compute-sanitizer on tiny problems"),
}
DRY_SECONDS = 90
LEAST_SECONDS = 8  # for less, a stage is not begun
LOG_BYTES = 100_000  # of a log that is kept: its end


def lines_of(path: Path) -> list[dict]:
    """What was written; a line that was torn, by a full disk say, is left out."""
    found = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(text))
    return found


class Output:
    """rows.jsonl in the folder: a line per row or note, flushed as it comes; and the log of this stage on stdout."""

    def __init__(self, folder: Path, stage: str):
        self.path, self.stage = folder / "rows.jsonl", stage
        self.begun = {line["begun"] for line in lines_of(self.path) if "begun" in line}

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

    def killers(self) -> set[str]:
        """Backends that took the smoke test's process with them: begun, and no check, or a fatal one."""
        lines = lines_of(self.path)
        ended = {f"smoke {li['case']} {li['impl']}" for li in lines if "check" in li and not li.get("fatal")}
        begun = {li["begun"] for li in lines if li.get("begun", "").startswith("smoke ")}
        return {key.split()[-1] for key in begun - ended}


# --- Results.


def say(*words) -> None:
    print(*words, flush=True)


def collect(folder: Path, head: dict, statuses: list[dict]) -> dict:
    """results.json and summary.md from rows.jsonl."""
    lines = [line for line in lines_of(folder / "rows.jsonl") if not {"begun", "again"} & line.keys()]
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
        ratios = {row["impl"]: row["ratio"]["median"] for row in rows if row["ms"] and row.get("ratio")}
        best = min(peers, key=lambda i: ratios.get(i, peers[i])) if peers else ""
        if "auto" in ms:
            mine = f"{ms['auto']:.4f}"
            gain = f"{ratios[best]:.2f}" if best in ratios else ""
        else:
            mine, gain = ours.get("error", ""), ""
        share = f"{ours['roofline_share']:.0%}" if ours.get("roofline_share") else ""
        cells = [stage, case, mode, timing, mine, best, f"{peers[best]:.4f}" if best else "", gain, share]
        cells += [f"{ms[c]:.4f}" if c in ms else "" for c in ("gemm", "copy")]
        text.append("| " + " | ".join(cells) + " |")
    text += ["", "## Notes", ""]
    for note in result["notes"]:
        words = note.get("note") or note.get("error") or note.get("tuned")
        if "kernel" in note:
            words = f"{note['kernel_ms']:.4f} ms{', chosen' * note['chosen']}: {note['kernel']}"
        if "check" in note:
            words = f"{note['impl']}: {note['check']}"
        text.append(f"- {note['stage']} {note.get('case', '')}: {words}")
        text += [f"  - {line}" for line in note.get("failed", [])]
    errors = [
        f"- {row['case']} {row['mode']} {row['impl']} {row['timing']}: {row['error']}"
        for row in result["rows"]
        if row.get("error")
    ]
    return "\n".join([*text, "", "## Without a time", "", *errors, ""])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.8, help="of all stages together (8.8)")
    parser.add_argument("--out", default="results", help="folder")
    parser.add_argument("--device", default=None, help="cuda, cuda:1, cpu (default: cuda, in a dry run cpu)")
    parser.add_argument("--dry-run", action="store_true", help="every stage on tiny shapes")
    parser.add_argument("--resume", action="store_true", help="go on: skip what the folder has")
    parser.add_argument("--stages", default=",".join(STAGES), help="which, in order")
    parser.add_argument("--stage", help=argparse.SUPPRESS)  # this process is a stage
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)  # this process is what a tool looks at
    args = parser.parse_args(argv)
    args.device = args.device or ("cpu" if args.dry_run else "cuda")
    if args.once or args.stage:
        import gpu_stages

        if args.once:
            gpu_stages.once(args)
        else:
            getattr(gpu_stages, args.stage)(args, Output(Path(args.out), args.stage), args.deadline)
        return 0
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)

    names = args.stages.split(",")
    if unknown := [name for name in names if name not in STAGES]:
        parser.error(f"unknown stages {unknown}; there are {', '.join(STAGES)}")
    _clear(folder / "rows.jsonl", args.resume)
    begin = time.time()
    end = begin + 60 * args.minutes
    command = "python benchmarks/gpu_suite.py " + " ".join(sys.argv[1:] if argv is None else argv)
    head = _header(args.device, command, folder)
    say(json.dumps(head))
    if "error" in head:
        say(f"no figures can be taken on {args.device}: {head['error'].strip().splitlines()[-1:]}")
        return 2
    statuses = _statuses(folder, names, args.resume)
    for status in statuses:
        name = status["stage"]
        if name not in names or (status["status"] == "done" and name != "build"):  # another machine has no build
            continue
        most = DRY_SECONDS if args.dry_run else STAGES[name][0]
        start = time.time()
        status["status"] = "no time left"
        for _ in range(4):  # a process that dies is begun again; what it was at is skipped then
            deadline = min(start + most, end)
            if deadline - time.time() < LEAST_SECONDS:
                break
            say(f"=== {name}: {STAGES[name][1]} ({deadline - time.time():.0f} s at most)")
            status["status"] = _run_stage(args, name, deadline, folder)
            if status["status"] in ("done", "cut off", "ran out of time"):
                break
        status["seconds"] = round(status["seconds"] + time.time() - start, 1)
        say(f"=== {name}: {status['status']}, {status['seconds']} s")
        collect(folder, head, statuses)
    say((folder / "summary.md").read_text())
    return 0


def _clear(path: Path, resume: bool) -> None:
    """Forget everything; to resume, what a stage had begun when its time was up, which is tried once more."""
    lines = lines_of(path) if resume else []
    again = {line["again"] for line in lines if "again" in line}
    last = {line["stage"]: i for i, line in enumerate(lines)}
    for i, line in enumerate(lines):
        if "begun" in line and i == last[line["stage"]] and line["begun"] not in again:
            lines[i] = {"stage": line["stage"], "again": line["begun"]}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _statuses(folder: Path, names: list[str], resume: bool) -> list[dict]:
    """Of the stages named, and, to resume, of those that the folder knows."""
    before = folder / "results.json"
    known = json.loads(before.read_text())["stages"] if resume and before.exists() else []
    statuses = {s["stage"]: s for s in known}
    for name in names:
        statuses.setdefault(name, {"stage": name, "status": "not begun", "seconds": 0})
    return list(statuses.values())


def _run_stage(args, name: str, deadline: float, folder: Path) -> str:
    command = [sys.executable, str(Path(__file__).resolve()), "--stage", name, "--out", str(folder)]
    command += ["--device", args.device, "--deadline", str(deadline), *["--dry-run"] * args.dry_run]
    seen = len(lines_of(folder / "rows.jsonl"))
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
        with contextlib.suppress(ProcessLookupError):  # what it started and left behind
            os.killpg(child.pid, 9)
    with (folder / f"{name}.log").open("rb") as log:
        log.seek(place)
        said = log.read()
        say(said[-6000:].decode(errors="replace"))
    for path in folder.glob("*.log"):
        if path.stat().st_size > LOG_BYTES:
            path.write_bytes(path.read_bytes()[-LOG_BYTES:])
    notes = [
        line["note"] for line in lines_of(folder / "rows.jsonl")[seen:] if line["stage"] == name and "note" in line
    ]
    unfinished = any(note.startswith("no time left") for note in notes)
    return "ran out of time" if status == "done" and unfinished else status


def _header(device: str, command: str, folder: Path) -> dict:
    """In a process of its own: this one must not hold the GPU."""
    code = (
        f"import sys, json; sys.path.insert(0, {str(ROOT)!r})\n"
        f"from vitkernels.bench.environment import header; print(json.dumps(header({device!r}, {command!r})))"
    )
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=False)
        head = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        head = {"command": command, "error": done.stderr[-2000:]}
    except (OSError, subprocess.SubprocessError) as error:
        head = {"command": command, "error": str(error)}
    if smi := shutil.which("nvidia-smi"):
        query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,memory.total"
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            asked = [smi, f"--query-gpu={query}", "--format=csv"]
            done = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False)
            head["nvidia_smi"] = done.stdout.strip()
    (folder / "header.json").write_text(json.dumps(head, indent=1))
    return head


if __name__ == "__main__":
    sys.exit(main())
