"""The operation beside its peers and ceilings, a group for each shape and mode: `pytest benchmarks/`.

One clock times everything: `vitkernels.bench` samples all implementations of a group in turns, on inputs that the cache
does not hold, with a GPU's events or its graph replay where there is one. pytest-benchmark is handed these samples
through its timer, and groups, prints, stores and compares them. What breaks the accuracy rule has no samples, so it has
no time: its test fails if it is ours, and is skipped with the reason if it is a peer.
"""

from __future__ import annotations

import pytest
import torch
from suites import CASES, CPU, CPU_TRAINING, TRAINING

from vitkernels import explain
from vitkernels.bench.baselines import PEERS
from vitkernels.bench.gate import gate
from vitkernels.bench.implementations import CEILINGS, OURS
from vitkernels.bench.op import bench, settings

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
GROUPS = [(case, "forward") for case in (CASES if GPU else CPU)]
GROUPS += [(case, mode) for case in (TRAINING if GPU else CPU_TRAINING) for mode in ("backward", "both")]


class Replay:
    """A timer that lets samples pass that were taken before: of two readings, the second is later by a sample."""

    def __init__(self) -> None:
        self.now, self.samples, self.running = 0.0, iter(()), False

    def __call__(self) -> float:
        if self.running:
            self.now += next(self.samples)
        self.running = not self.running
        return self.now


replay = Replay()


@pytest.fixture(scope="module")
def measured(request):
    """(case, mode) -> rows with their samples, measured when first asked for; only the last group is kept."""
    last: dict = {}

    def rows(case, mode):
        if (case, mode) not in last:
            last.clear()
            option = request.config.getoption
            last[case, mode] = bench(
                case, device=DEVICE, mode=mode, seconds=option("seconds"),
                compiled=option("compilers"), keep_samples=True,
            )  # fmt: skip
        return last[case, mode]

    return rows


def pytest_generate_tests(metafunc):
    asked = metafunc.config.getoption("compilers")
    compilers = GPU if asked is None else asked
    peers = [name for name in PEERS if compilers or not name.startswith("compile")]
    timings = ("eager", "graph") if GPU else ("eager",)
    impls = ("auto", *(name for name in OURS[1:] if GPU), *peers, *CEILINGS)
    values = [(case, mode, timing, impl) for case, mode in GROUPS for timing in timings for impl in impls]
    ids = [f"{case.name}-{mode}" + f"-{timing}" * GPU + f"-{impl}" for case, mode, timing, impl in values]
    metafunc.parametrize(("case", "mode", "timing", "impl"), values, ids=ids)


@pytest.mark.benchmark(timer=replay)
def test_patch_embed(benchmark, measured, case, mode, timing, impl):
    benchmark.group = f"{case.name} {mode}" + f" {timing}" * GPU + ", ceilings" * (impl in CEILINGS)
    if benchmark.disabled:
        check = gate if impl not in CEILINGS else lambda *_: None
        call = case.call(DEVICE)
        if impl in OURS[1:] and (reasons := explain(**call)[impl]):
            pytest.skip("; ".join(reasons))
        with settings(case):
            assert benchmark.pedantic(check, (impl, call, mode)) is None
        return
    row = next((r for r in measured(case, mode) if (r["impl"], r["timing"]) == (impl, timing)), None)
    if row is None:
        pytest.skip(f"{impl} is what auto takes, declines the problem, or does not exist on this device")
    if row["ms"] is None:
        (pytest.fail if impl in OURS else pytest.skip)(f"{impl} has no time: {row['error']}")
    samples = row["samples"]
    benchmark.extra_info["row"] = {key: value for key, value in row.items() if key != "samples"}
    replay.samples = iter([ms / 1e3 for ms in samples])
    benchmark.pedantic(lambda: None, rounds=len(samples))
