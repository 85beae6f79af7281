"""The forward, each shape a group: `pytest benchmarks --benchmark-group-by=group`.

On a machine with a GPU the headline shapes are timed there (CUDA synchronised after each call); vitkernels.bench, which
this leans on, has the graph replay, the ceilings and the profile.
"""

import pytest
import torch
from shapes import CPU, HEADLINE

from vitkernels.bench import default_impls, gate, settings, steps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = HEADLINE if DEVICE == "cuda" else CPU
IMPLS = ("auto", "timm_eager", "conv_channels_last", "reshape_linear")


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def problem(request):
    return request.param, request.param.call(DEVICE)


@pytest.mark.parametrize("impl", IMPLS)
def test_forward(benchmark, problem, impl):
    case, call = problem
    benchmark.group = case.name
    with torch.no_grad(), settings(case):
        assert impl in default_impls(call)
        assert gate(impl, call, "forward") is None
        [(step, _)] = steps(impl, [call])

        def timed():
            step()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        timed()
        benchmark.pedantic(timed, rounds=10, warmup_rounds=2)
    benchmark.extra_info["images_per_s"] = case.batch / benchmark.stats["median"] if benchmark.stats else None
