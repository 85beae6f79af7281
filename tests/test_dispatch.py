"""What `auto` takes where: asked of GPUs that are not here, and held to the figures that are stored."""

import json
import re
from pathlib import Path

import pytest
import torch

import vitkernels as vk
from vitkernels import dispatch
from vitkernels.backends.cuda import extension
from vitkernels.gpu import NOMINAL, OLDEST

HALF, F32, U8 = torch.bfloat16, torch.float32, torch.uint8
RESULTS = Path(__file__).parent.parent / "benchmarks/results/nvidia-h200"


def call(patch=16, pixels=HALF, weights=HALF, *, B=256, D=768, keep=None, device="meta"):
    made = dict(
        images=torch.empty(B, 3, 224, 224, dtype=pixels, device=device),
        weight=torch.empty(D, 3, patch, patch, dtype=weights, device=device),
    )
    if keep:
        made["keep"] = torch.empty(B, keep, dtype=torch.int64, device=device)
    return made


@pytest.fixture
def extension_here(host_extension, monkeypatch):
    """The plans of csrc/ for GPUs, from its emulation."""
    from host import backend

    monkeypatch.setattr(extension, "load", lambda: host_extension)
    monkeypatch.setattr(extension, "missing", lambda: "")
    monkeypatch.setattr(extension, "record", lambda: {"archs": ["8.0", "9.0a"]})
    monkeypatch.setattr(host_extension, "device_type", "cuda")
    backend.forget()
    yield
    backend.forget()


def taken(gpu="sm_90", **arguments):
    return {direction: name for direction, (name, _) in vk.explain(**call(**arguments), gpu=gpu).auto.items()}


REFERENCE = dict(forward="reference", weight="reference", images="triton")
MIXED = dict(forward="triton", weight="reference", images="triton")


@pytest.mark.parametrize(
    ("arguments", "expected", "without"),
    [
        ({}, dict(forward="triton", weight="cuda", images="triton"), MIXED),
        (dict(pixels=U8), dict(forward="triton", weight="cuda"), dict(forward="triton", weight="reference")),
        (dict(patch=14, D=1024), MIXED, MIXED),
        (dict(keep=49), MIXED, MIXED),
        (dict(pixels=F32, weights=F32), REFERENCE, REFERENCE),
        *((dict(gpu=gpu.name), MIXED, None) for arch, gpu in NOMINAL.items() if arch not in (75, 90)),
        (dict(gpu="T4"), dict.fromkeys(MIXED, "reference"), None),
        (dict(gpu="sm_80", pixels=U8), dict(forward="triton", weight="reference"), None),
        (dict(gpu="sm_89", pixels=F32, weights=F32), REFERENCE, None),
    ],
    ids=str,
)
def test_what_auto_takes(arguments, expected, without, extension_here, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # for NumPy's sake (triton._missing); nothing runs here
    assert taken(**arguments) == expected
    monkeypatch.setattr(extension, "missing", lambda: "not built")
    dispatch._choose.cache_clear()
    assert taken(**arguments) == (without or expected)


def test_the_switch_of_tf32_is_looked_at_in_each_call(monkeypatch):
    p = vk.explain(**call(pixels=F32, weights=F32), gpu="sm_90").problem
    taken = []
    monkeypatch.setitem(dispatch.MEASURED, (90, "forward", "tf32"), dispatch.Row(("triton", "reference"), "a test"))
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = precision
            taken.append(dispatch.choose(p, "auto").__name__.rpartition(".")[2])
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert taken == ["reference", "triton", "reference"]


@pytest.mark.parametrize("arch", NOMINAL)
@pytest.mark.parametrize("direction", dispatch.DIRECTIONS)
@pytest.mark.parametrize(
    "kind",
    [
        "half",
        *(
            f"half, {how}"
            for how in ("padded for wgmma", "copied for wgmma", "tokens copied for wgmma", "not by wgmma")
        ),
        "tf32",
        "fp32",
        "fp64",
    ],
)
def test_there_is_a_row_that_ends_with_what_takes_everything(arch, direction, kind, monkeypatch):
    dtype = {"half": HALF, "tf32": F32, "fp32": F32, "fp64": torch.float64}[kind.partition(",")[0]]
    patch = {"half, padded for wgmma": 14, "half, not by wgmma": 7}.get(kind, 16)
    p = vk.explain(**call(patch, dtype, dtype), gpu=f"sm_{arch}").problem
    monkeypatch.setattr(dispatch, "tf32", lambda: kind == "tf32")
    row = dispatch.row_of(p, direction)
    assert row.backends[-1] == "reference"
    assert arch == 90 or "not measured" in row.why
    taken = dispatch.choose(p, "auto", direction).__name__.rpartition(".")[2]
    assert taken == "reference" or arch >= OLDEST
    assert arch >= OLDEST or "need sm_80 or later" in dispatch.why_not(p, "triton")[-1]


def test_an_amd_gpu_is_no_hopper(monkeypatch):
    """It calls itself cuda, and its capability 9.4; the reference runs."""
    monkeypatch.setattr(torch.version, "hip", "6.4.1")
    why = vk.explain(**call(), gpu="sm_90")
    assert why.chosen == "reference"
    for name in ("triton", "cuda"):
        assert why[name] == ["this PyTorch is for AMD GPUs (ROCm 6.4.1); the kernels are for NVIDIA's"] or (
            name == "cuda" and extension.missing()
        )
    assert {name for name, _ in why.auto.values()} == {"reference"}
    with pytest.raises(NotImplementedError, match="for AMD GPUs"):
        dispatch.choose(why.problem, "triton")


def test_why_is_said():
    said = str(vk.explain(**call(weights=HALF), gpu="H100"))
    assert "auto takes triton for the tokens: triton 157 µs" in said
    assert "for the parameters' gradients: cuda 176 µs, reshape + linear 257" in said
    assert "for the images' gradient: not measured" in said
    with pytest.raises(ValueError, match=r"sm_90 \(H100\).*got 'sm_70'"):
        vk.explain(**call(), gpu="sm_70")


def test_what_a_mode_takes():
    why = vk.explain(**call(patch=14), gpu="sm_90")
    assert [why.takes(mode) for mode in ("forward", "backward", "both")] == [
        "triton",
        "reference",
        "triton, then reference",
    ]
    assert vk.explain(**call(B=1, device="cpu")).takes("both") == "reference"


def test_one_backend_gives_both_gradients_in_one_call():
    p = vk.explain(**call(pixels=F32, weights=F32), gpu="sm_90").problem
    one, two, three = torch.ones(1), torch.ones(2), torch.ones(3)
    mixed = dispatch.shares(p, "auto", (one, two, None, None, three))
    assert mixed == {
        dispatch.backend("triton"): (one, None, None, None, None),
        dispatch.backend("reference"): (None, two, None, None, three),
    }
    p = vk.explain(**call(pixels=F32, weights=F32, device="cpu", B=1)).problem
    assert dispatch.shares(p, "auto", (one, two, None, None, three)) == {
        dispatch.backend("reference"): (one, two, None, None, three)
    }
    assert dispatch.shares(p, "auto", (None,) * 5) == {}


# --- The rows come from stored results.


def stored():
    """Every time of the H200, in µs, as text may quote it."""
    times = [
        1e3 * row["ms"]["median"]
        for name in ("results", "compiled", "models")
        for row in json.loads((RESULTS / f"{name}.json").read_text())["rows"]
        if row["ms"]
    ]
    for name in ("tune", "host-cost"):
        times += [float(t) for t in re.findall(r"([\d.]+) [µu]s", (RESULTS / f"{name}.txt").read_text())]
    return {f"{t:,.0f}" for t in times} | {f"{t:,.1f}" for t in times}


def test_readme_quotes_stored_times():
    readme = (RESULTS.parent.parent.parent / "README.md").read_text()
    table = re.search(r"<!-- h200 -->\n(.*?)<!-- /h200 -->", readme, re.DOTALL)[1]
    figures = re.findall(r"(?<![\w×.,])\d[\d,]*(?:\.\d+)?(?= µs)", table)
    assert len(figures) > 20
    assert [n for n in figures if n not in stored()] == []


SHAPES = {  # the case whose figures a row quotes first
    ("forward", "half"): ("B256-224-P16-D768-bf16", "forward"),
    ("weight", "half"): ("B256-224-P16-D768-bf16", "backward"),
    ("weight", "half, padded for wgmma"): ("B256-224-P14-D1024-bf16", "backward"),
    ("weight", "half, copied for wgmma"): ("B256-224-P16-D768-bf16-keep0.25", "backward"),
    ("weight", "half, tokens copied for wgmma"): ("B256-224-P14-D1024-bf16", "backward"),
    ("weight", "half, not by wgmma"): ("B256-224-P14-D1024-bf16", "backward"),
    ("forward", "fp32"): ("B256-224-P16-D768-fp32", "both"),
    ("weight", "fp32"): ("B256-224-P16-D768-fp32", "backward"),
}


@pytest.mark.parametrize(("direction", "kind"), SHAPES)
def test_no_row_puts_what_is_slower_than_reshape_and_linear_first(direction, kind):
    rows = json.loads((RESULTS / "results.json").read_text())["rows"]
    case, mode = SHAPES[direction, kind]
    found = {
        row["impl"]: round(1e3 * row["ms"]["median"])
        for row in rows
        if (row["case"], row["mode"], row["timing"]) == (case, mode, "graph") and row["ms"]
    }
    row = dispatch.MEASURED[90, direction, kind]
    quoted = {int(n.replace(",", "")) for n in re.findall(r"[\d,]+\d", row.why)}
    assert {found["reshape_linear"], found["cuda"]} <= quoted
    for name in row.backends:
        if name in found and name != "triton":  # triton's were measured tile by tile: tune.txt
            assert found[name] < found["reshape_linear"]
