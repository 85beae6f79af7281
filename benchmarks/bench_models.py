"""Whole models before and after `fuse`, and the way from a decoder's bytes to tokens: `pytest benchmarks/`.

A group for each model, task and timing. One clock times them in turns, `vitkernels.bench.model`; pytest-benchmark is
handed its samples. Outputs that differ get no time.
"""

from __future__ import annotations

import pytest
import torch
from bench_patch_embed import replay
from suites import MODELS

from vitkernels.bench.input_pipeline import PIPELINES
from vitkernels.bench.model import bench_model

GPU = torch.cuda.is_available()
SMALL = "num_hidden_layers=4,num_attention_heads=3,hidden_size=192,intermediate_size=768"
CPU = [  # (model, batch, dtype, task), as MODELS: what a CPU times in a minute
    ("timm:vit_tiny_patch16_224", 4, "fp32", "inference"),
    ("timm:vit_tiny_patch16_224", 4, "fp32", "training"),
    (f"transformers:ViTMAEModel,{SMALL}", 8, "fp32", "inference"),
    (f"transformers:ViTMAEModel,{SMALL}", 8, "fp32", "training"),
    (f"transformers:VideoMAEModel,num_frames=4,{SMALL}", 1, "fp32", "inference"),
    (f"transformers:VideoMAEModel,num_frames=4,mask_ratio=0.9,{SMALL}", 4, "fp32", "training"),
    ("vit_pytorch:ViT,dim=192,depth=4,heads=3,mlp_dim=768", 4, "fp32", "inference"),
    ("timm:vit_tiny_patch16_224", 16, "fp32", "pipeline"),
]


@pytest.fixture(scope="module")
def measured(request):
    """(model, batch, dtype, task) -> what bench_model found, when first asked for; only the last one is kept."""
    last: dict = {}

    def found(*key):
        if key not in last:
            last.clear()
            spec, batch, dtype, task = key
            last[key] = bench_model(
                spec, batch=batch, device="cuda" if GPU else "cpu", dtype=dtype, mode=task, keep_samples=True,
                seconds=request.config.getoption("seconds"),
            )  # fmt: skip
        return last[key]

    return found


def pytest_generate_tests(metafunc):
    values = [
        (model, timing, impl)
        for model in (MODELS if GPU else CPU)
        for timing in ("eager", *["graph"] * (GPU and model[3] == "inference"))
        for impl in (PIPELINES if model[3] == "pipeline" else ("before", "fused"))
    ]
    ids = [
        "-".join((spec, f"B{batch}", dtype, task, timing, impl)) for (spec, batch, dtype, task), timing, impl in values
    ]
    metafunc.parametrize(("model", "timing", "impl"), values, ids=ids)


@pytest.mark.benchmark(timer=replay)
def test_model(benchmark, measured, model, timing, impl):
    spec, batch, dtype, task = model
    pytest.importorskip(spec.partition(":")[0])
    benchmark.group = f"{spec} B{batch} {dtype} {task}" + f" {timing}" * GPU
    found = measured(*model)
    [row] = [r for r in found["rows"] if (r["impl"], r["timing"]) == (impl, timing)]
    if row["ms"] is None:
        (pytest.skip if timing == "graph" else pytest.fail)(f"{impl} has no time: {row['error']}")
    benchmark.extra_info["row"] = {key: value for key, value in row.items() if key != "samples"}
    benchmark.extra_info["verdict"] = found["verdict"]
    replay.samples = iter([ms / 1e3 for ms in row["samples"]])
    benchmark.pedantic(lambda: None, rounds=len(row["samples"]))
