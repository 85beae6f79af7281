"""What a call costs the host, beside F.linear, timm's eager chain and an empty operator: `pytest benchmarks/`.

Without a GPU the launches are stubs that return at once. One clock times all in turns, `vitkernels.bench.host`;
pytest-benchmark is handed its samples.
"""

from __future__ import annotations

import pytest
import torch
from bench_patch_embed import replay

from vitkernels.bench.host import KERNELS, MODES, host

IMPLS = (*KERNELS, "F.linear", "timm eagerly", "empty operator")


@pytest.fixture(scope="module")
def measured():
    return host("cuda" if torch.cuda.is_available() else "cpu", keep_samples=True)


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", MODES)
def test_host(benchmark, measured, mode, impl):
    benchmark.group = f"the host, {mode}"
    row = next((row for row in measured if (row["mode"], row["impl"]) == (mode, impl)), None)
    if row is None:
        pytest.skip(f"{impl} has no {mode}, or is not on this machine")
    benchmark.extra_info["host"] = {key: value for key, value in row.items() if key != "samples"}
    replay.samples = iter([us / 1e6 for us in row["samples"]])
    benchmark.pedantic(lambda: None, rounds=len(row["samples"]))
