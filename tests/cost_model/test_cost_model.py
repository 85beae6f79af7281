"""The cost model against bytes that are counted: operators', Triton programs' in the interpreter, csrc's own plans."""

import json
import os
import subprocess
import sys
from collections import Counter
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import arguments
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vitkernels as vk
from vitkernels import cost_model
from vitkernels.backends import reference
from vitkernels.backends.common import canonical
from vitkernels.backends.cuda import forward_plan
from vitkernels.backends.reference import products, unfold
from vitkernels.backends.triton import configs
from vitkernels.bench import implementations
from vitkernels.bench.cases import Case
from vitkernels.cost_model import baselines as peers_model
from vitkernels.cost_model import cuda as cuda_model
from vitkernels.cost_model import data_sheets
from vitkernels.cost_model import reference as reference_model
from vitkernels.cost_model import triton as triton_model
from vitkernels.cost_model.traffic import gathered, needed
from vitkernels.gpu import NOMINAL
from vitkernels.profiling import compile_triton

ROOT = Path(__file__).resolve().parents[2]
H100 = NOMINAL[90]
NAMES = ("images", "weight", "bias", "pos_embed", "prefix", "keep")
NORM = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
HALF, F32, U8 = torch.bfloat16, torch.float32, torch.uint8


def call_of(B, H, W, P, D, *, pixels=F32, weights=F32, keep=None, **more):
    call = arguments(B, H=H, W=W, P=P, D=D, pixels=pixels, weights=weights, **more)
    if keep is not None:
        call["keep"] = torch.stack([torch.randperm(problem(call).N)[:keep] for _ in range(B)])
    return call


def problem(call):
    return vk.explain(**call).problem


def meta(call):
    return {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in call.items()}


# --- Operators: peers and the reference.


def distinct(t: torch.Tensor) -> int:
    """Bytes of a tensor's elements, those that it repeats (stride 0) once."""
    n = prod(size for size, step in zip(t.shape, t.stride(), strict=True) if step != 0 or size == 0)
    return n * t.element_size()


class Operators(TorchDispatchMode):
    """(name, bytes read, bytes written) of every operator that moves data. A gather reads what it takes, or the whole
    table where that is less, and its indices. `indices`: arithmetic with them counts, too."""

    def __init__(self, indices=True):
        super().__init__()
        self.indices = indices
        self.moved = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        outputs = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        passed_over = not self.indices and any(t.dtype == torch.int64 for t in outputs)
        if func.is_view or passed_over or name in ("_unsafe_view", "new_empty", "empty"):
            return result
        if name == "copy_":
            inputs = inputs[1:]  # what it writes over is not read
        if "out" in (kwargs or {}):
            inputs = inputs[:-1]
        if name == "convolution_backward" and not kwargs and not args[-1][0]:
            inputs = inputs[:2]  # the weight is for the images' gradient
        written = sum(map(distinct, outputs))
        read = 0 if name == "new_zeros" else sum(map(distinct, inputs))
        if name in ("index", "gather"):
            read += min(written, distinct(inputs[0])) - distinct(inputs[0])
        self.moved.append((name, read, written))
        return result


PEER_CASES = [
    Case(batch=2, image=32, dim=48, dtype="fp32", pixels="uint8"),
    Case(batch=3, image=32, dim=48, pixels="uint8", channels_last=True),
    Case(batch=2, image=(32, 64), dim=40, dtype="fp32"),
    Case(batch=2, image=28, patch=14, dim=40, dtype="fp32", prefix=0),
    Case(batch=5, image=32, patch=8, dim=48, dtype="fp32", keep=0.5),
    Case(batch=2, image=32, patch=8, dim=48, pixels="uint8", keep=0.25, prefix=5),
    Case(batch=3, image=32, patch=8, dim=16, dtype="fp32", keep=0.5, prefix=0),
    Case(batch=2, image=32, dim=48, dtype="fp32", frames=4, pixels="uint8"),
    Case(batch=2, image=32, patch=8, dim=48, dtype="fp32", frames=4, keep=0.5),
]


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("case", PEER_CASES, ids=lambda case: case.name)
def test_each_operator_of_the_peers_moves_what_the_model_says(case, mode):
    call = case.call("cpu")
    found, refused = peers_model.algorithms(problem(call), mode)
    assert not refused
    assert len(found) == 3
    for name, one in found.items():
        impl = "timm_eager" if name == "embed_all_then_gather" else name
        [(step, leaves)] = implementations.steps(impl, [call], mode)
        out = step() if mode == "backward" else None
        grad = None if out is None else torch.randn_like(out)
        with Operators() as operators:
            step() if out is None else torch.autograd.grad(out, leaves, grad)
        # `inside`: what a convolution does on a GPU beside its kernel, here a part of the operator
        modelled = [(p.name, p.read, p.written) for p in one.passes if not p.inside]
        counted = operators.moved
        assert [m[1:] for m in modelled] == [c[1:] for c in counted], (name, modelled, counted)


@pytest.mark.parametrize("case", PEER_CASES[:6], ids=lambda case: case.name)
def test_what_the_peers_keep_for_the_backward(case):
    call = case.call("cpu")
    p = problem(call)
    inputs = {call[name].untyped_storage().data_ptr() for name in NAMES if call.get(name) is not None}
    for name, one in peers_model.algorithms(p, "forward")[0].items():
        [(step, leaves)] = implementations.steps("timm_eager" if "embed" in name else name, [call], "both")
        known = inputs | {leaf.untyped_storage().data_ptr() for leaf in leaves}
        saved = {}

        def keep(t, saved=saved):
            if t.is_floating_point():  # indices are as few as patches
                saved[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = step()
        others = {at: distinct(t) for at, t in saved.items() if at not in known}
        assert sum(others.values()) == one.kept, name
        assert out.shape == p.out_shape


@pytest.mark.parametrize("piece", [1000, 5])
@pytest.mark.parametrize(
    "call",
    [
        dict(B=5, H=32, W=32, P=16, D=48, pixels=U8, **NORM),
        dict(B=5, H=32, W=32, P=16, D=8, pixels=U8, channels_last=True, **NORM),
        dict(B=3, H=32, W=48, P=8, D=40, weights=HALF, pixels=HALF),
        dict(B=3, H=32, W=32, P=8, D=24, keep=7, pixels=U8),
        dict(B=3, H=32, W=32, P=8, D=24, keep=7),
        dict(B=2, H=32, W=32, P=8, D=24, padding=3, pos="B"),
        dict(B=2, H=30, W=30, P=7, D=24, T=0, pos=None, stride=5),
        dict(B=2, H=32, W=32, P=8, D=24, T=0),
    ],
    ids=["normalised", "channels-last", "bf16", "kept", "kept floats", "padded", "overlap", "no prefix"],
)
def test_the_reference_moves_what_the_model_says(call, piece, maker, monkeypatch):
    monkeypatch.setattr(unfold, "_piece_rows", lambda *_: piece)
    monkeypatch.setattr(products, "_has_bf16", lambda: True)  # whatever CPU this is
    call = call_of(**call)
    p = problem(call)
    tensors = canonical(*(call.get(name) for name in NAMES))
    one = reference_model.forward(p)
    requested = one.passes[-1].requested
    with Operators(indices=False) as operators:
        reference.forward(p, *tensors)
    largest = max((w for name, _, w in operators.moved if "linear" in name or "addmm" in name), default=0)
    assert largest <= p.B * p.rows * p.D * 4
    kinds = {
        "images": ("constant_pad_nd", "copy_"), "normalise": ("sub_", "mul_"),
        "product": ("_linear_pointwise", "addmm", "addmm_", "mm"), "add": ("add", "add_"),
    }  # fmt: skip
    counted = Counter()
    for name, read, written in operators.moved:
        kind = next((k for k, names in kinds.items() if name in names), name)
        counted[kind] += read + written
    assert counted["product"] == requested["product"]
    assert counted["normalise"] == requested.get("normalise", 0)
    # Copies: images to their block and to the patches, weight and bias to the product's dtype; the prefix apart
    copies = requested.get("images", 0) + requested.get("patches", 0)
    if "position" not in requested or products.product_dtype(p) != p.out_dtype:  # else the sum is what is written
        copies += requested.get("tokens", 0)
    assert counted["images"] == copies
    if "position" in requested:  # prefix + its rows of the table
        table = p.T * p.D * (p.B if p.pos_per_image else 1) * p.weight_dtype.itemsize
        prefix_sum = (
            p.T * p.D * (p.out_dtype if p.weight_dtype == p.out_dtype else p.sum_dtype).itemsize
            + table
            + p.B * p.T * p.D * p.out_dtype.itemsize
        )
        table = requested.get("table", 0)
        assert counted["add"] == prefix_sum + table + requested["tokens"] + _added_positions(p, requested)
    assert f" {one.note.split()[1]}" == " pieces"


def _added_positions(p, requested):
    table = (p.sum_dtype if "table" in requested else p.weight_dtype).itemsize
    return requested["position"] if p.n_keep is None else p.B * p.rows * p.D * table


# --- Triton programs, in the interpreter: unmasked bytes of every load and store.


@pytest.fixture
def programs(monkeypatch):
    """Count what programs load and store, by tensor: those that are named in `where`, and "others"."""
    pytest.importorskip("triton")
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    builder = interpreter.InterpreterBuilder
    true_load, true_store = builder.create_masked_load, builder.create_masked_store
    loads, stores, where = Counter(), Counter(), {}

    def count(to, ptrs, mask):
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        addresses = ptrs.data[np.asarray(mask.data).astype(bool)]
        if addresses.size:
            first = int(addresses.min())
            name = next((name for name, (at, end) in where.items() if at <= first < end), "others")
            to[name] += addresses.size * size

    def load(self, ptrs, mask, *args, **kwargs):
        count(loads, ptrs, mask)
        return true_load(self, ptrs, mask, *args, **kwargs)

    def store(self, ptrs, value, mask, *args, **kwargs):
        count(stores, ptrs, mask)
        return true_store(self, ptrs, value, mask, *args, **kwargs)

    monkeypatch.setattr(builder, "create_masked_load", load)
    monkeypatch.setattr(builder, "create_masked_store", store)

    def name(**tensors):
        for key, t in tensors.items():
            if t is not None:
                storage = t.untyped_storage()
                where[key] = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        return loads, stores

    return name


FORWARD = {
    "fp32": dict(B=3, H=32, W=48, P=16, D=40),
    "uint8": dict(B=3, H=32, W=48, P=16, D=40, pixels=U8, weights=HALF, **NORM),
    "two tiles": dict(B=9, H=48, W=48, P=16, D=80, pixels=HALF, weights=HALF),
    "channels-last": dict(B=3, H=32, W=48, P=16, D=40, pixels=U8, weights=HALF, channels_last=True, **NORM),
    "P = 32": dict(B=3, H=64, W=96, P=32, D=40, pixels=HALF, weights=HALF, pos="B"),
    "P = 14": dict(B=2, H=56, W=42, P=14, D=40, pixels=HALF, weights=HALF, T=0, pos="N"),
    "kept": dict(B=5, H=32, W=48, P=8, D=40, pixels=HALF, weights=HALF, keep=7),
    "padded": dict(B=3, H=30, W=26, P=8, D=24, padding=3),
    "overlap": dict(B=2, H=32, W=48, P=16, D=24, pixels=HALF, weights=HALF, stride=8, pos=None),
}


GATHERED = ("fp32", "P = 14", "kept", "padded")  # the copy engine can't cut these


@pytest.mark.parametrize(
    ("name", "kernel"),
    [(name, kernel) for name in FORWARD for kernel in ("descriptor", "gather")[name in GATHERED :]],
)
def test_programs_request_what_the_model_says(name, kernel, programs, device):
    if device != "cpu":
        pytest.skip("programs are counted in the interpreter")
    from vitkernels.backends import triton

    call = call_of(**FORWARD[name])
    p = problem(call)
    found, refused = triton_model.algorithms(p, "forward", H100, False)
    assert list(refused) == ["triton descriptor"] * (name in GATHERED)
    tile = configs.default(p, kernel, "half" if p.compute_dtype == HALF else "fp32", H100)
    *packing, main = found[f"triton {kernel}"].passes
    tensors = canonical(*(call.get(n) for n in NAMES))
    keys = ("images", "weight", "bias", "position", "prefix", "keep")
    loads, stores = programs(**dict(zip(keys, tensors, strict=True)))
    with Operators() as operators:
        triton.forward(p, *tensors, choice=(kernel, tile))
    modelled = dict(main.requested)
    assert sum(stores.values()) == modelled.pop("tokens")
    # Of a packed copy nobody knows the address, as of the normalisation's constants.
    made = modelled.pop("centred", 0) + (modelled.pop("weight") if packing else 0)
    assert loads.pop("others", 0) == made
    assert dict(loads) == modelled
    copies = [m for m in operators.moved if m[0] in ("_to_copy", "clone", "constant_pad_nd")]
    # Padding is one operator, which writes zeros everywhere first. What follows makes the constants of a normalisation.
    moved = [(read, written + read * (name == "constant_pad_nd")) for name, read, written in copies]
    assert moved[: len(packing)] == [(m.read, m.written) for m in packing]
    assert p.normalised or len(moved) == len(packing)


BACKWARD = {
    "fp32": dict(B=3, H=32, W=48, P=16, D=40),
    "uint8": dict(B=9, H=32, W=48, P=16, D=40, pixels=U8, weights=HALF, **NORM),
    "channels-last": dict(B=3, H=32, W=48, P=16, D=40, pixels=U8, weights=HALF, channels_last=True, **NORM),
    "P = 14": dict(B=7, H=56, W=42, P=14, D=72, pixels=HALF, weights=HALF, T=0, pos="N"),
    "kept": dict(B=5, H=32, W=48, P=8, D=40, pixels=HALF, weights=HALF, keep=7),
    "padded": dict(B=3, H=30, W=26, P=8, D=24, padding=3),
    "no table": dict(B=2, H=32, W=48, P=16, D=24, stride=8, pos=None),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_programs_of_the_backward_request_what_the_model_says(name, programs, device):
    if device != "cpu":
        pytest.skip("programs are counted in the interpreter")
    from vitkernels.backends import triton

    call = call_of(**BACKWARD[name])
    p = problem(call)
    tensors = canonical(*(call.get(n) for n in NAMES))
    grad = torch.randn(p.out_shape).to(p.out_dtype)
    learnt = [None, *(None if t is None else torch.empty_like(t) for t in tensors[1:5])]
    loads, stores = programs(images=tensors[0], keep=tensors[5], dY=grad)
    triton.backward(p, grad, *tensors, tuple(learnt))
    one = triton_model.backward(p, H100, False)
    asked = Counter()
    for moved in one.passes:
        for key, size in moved.requested.items():
            asked[key] += size
    finish = one.passes[-1].requested
    assert sum(stores.values()) == asked["parts"] - finish["parts"] + asked["gradients"]
    for key in ("images", "dY", "keep"):
        assert loads[key] == asked[key], key
    assert loads["others"] == finish["parts"] + asked["centred"]
    # In memory: every part written is read once
    written = sum(moved.written for moved in one.passes[:-1])
    assert written == one.passes[-1].read == finish["parts"]


# --- What is needed at all.


@pytest.mark.parametrize(
    "call",
    [
        dict(B=2, H=57, W=80, P=16, D=8), dict(B=2, H=32, W=32, P=8, D=8, stride=12, pos=None),
        dict(B=2, H=32, W=32, P=8, D=8, stride=5, padding=3), dict(B=1, H=20, W=20, P=7, D=8, padding=2),
    ],
)  # fmt: skip
def test_pixels_that_are_needed(call):
    call = call_of(**call)
    p = problem(call)
    images = torch.ones_like(call["images"]).requires_grad_()
    ones = torch.ones_like(call["weight"][:1])
    out = torch.nn.functional.conv2d(images, ones, stride=p.S[1:], padding=p.pad[1:])
    out.sum().backward()
    assert needed(p) == int((images.grad > 0).sum())
    assert gathered(p, p.B * p.N) == int(images.grad.sum())


# --- The call.


def test_the_definition_by_hand():
    """docs: ViT-B/16, B = 256 in bf16: 59.2 GFLOP, 154 MB of pixels and tokens."""
    call = meta(call_of(2, 224, 224, 16, 768, pixels=HALF, weights=HALF))
    images = torch.empty(256, 3, 224, 224, dtype=HALF, device="meta")
    r = vk.roofline(vk.explain(**call | {"images": images}), gpus="H100 SXM")
    assert r.flops == 2 * 256 * 196 * 768 * 768
    [work] = r.works
    assert work.bytes["images"] == 256 * 3 * 224 * 224 * 2
    assert work.bytes["tokens"] == 256 * 197 * 768 * 2
    assert r.bytes == sum(work.bytes.values())
    found = r.gpus["H100 SXM"]
    assert found.bound == "arithmetic"
    assert found.ms == pytest.approx(r.flops / 989.4e12 * 1e3)
    assert found.memory_ms == pytest.approx(r.bytes / 3.35e12 * 1e3)
    assert found.ridge == pytest.approx(295, rel=0.01)
    ours, eager = (r.roads["H100 SXM"][one] for one in ("triton descriptor", "timm_eager"))
    assert ours.bytes == r.bytes  # one pass, which moves what has to be moved
    assert eager.bytes > 3 * ours.bytes
    assert r.road_ms("H100 SXM", "timm_eager") > 2 * r.road_ms("H100 SXM", "triton descriptor")


@pytest.mark.parametrize("mode", cost_model.MODES)
@pytest.mark.parametrize("keep", [None, 9])
def test_every_mode_on_every_gpu_without_a_tensor(mode, keep):
    pixels = HALF if mode == "images" else U8
    more = {} if mode == "images" else NORM
    call = meta(call_of(64, 96, 96, 16, 192, pixels=pixels, weights=HALF, keep=keep, **more))
    explained = vk.explain(**call)
    assert explained["triton"]  # no such device, which the model does not need
    r = vk.roofline(explained, mode)
    assert r.problem.device.type == "meta"
    assert list(r.gpus) == list(data_sheets.GPUS)
    shown = str(r)
    data = json.loads(json.dumps(r.as_dict()))
    for name in data_sheets.GPUS:
        assert name in shown
        a = r.gpus[name]
        assert a.ms >= max(a.memory_ms, a.arithmetic_ms) > 0
        assert any("triton" in one for one in r.roads[name])
        for one, moved in r.roads[name].items():
            assert moved.flops >= r.flops, one  # convolutions embed every patch
            assert moved.bytes >= r.bytes * 0.99, one
            ms = r.road_ms(name, one)
            assert ms is None or ms >= a.ms * 0.99
            assert data["gpus"][name]["roads"][one]["bytes"] == moved.bytes
            assert one in shown


def test_both_is_forward_and_backward():
    p = problem(meta(call_of(8, 64, 64, 16, 64)))
    forward, backward, both = (vk.roofline(p, mode, "L4") for mode in ("forward", "backward", "both"))
    assert both.flops == forward.flops + backward.flops
    assert both.gpus["L4"].ms == pytest.approx(forward.gpus["L4"].ms + backward.gpus["L4"].ms)
    one, other = forward.roads["L4"]["timm_eager"], backward.roads["L4"]["timm_eager"]
    assert both.roads["L4"]["timm_eager"].passes == one.passes + other.passes
    assert both.roads["L4"]["triton gather"].launches == 1 + backward.roads["L4"]["triton"].launches


def test_float32_by_three_products_of_tf32():
    """Their arithmetic bounds, which is less than that of the GPU's units for float32."""
    p = compile_triton.problem(16, "fp32")
    r = vk.roofline(p, gpus="H200")
    least = 1e3 * 3 * p.flops / r.sheets["H200"].flops("tf32")
    assert least < r.road_ms("H200", "cuda engine") < 1.02 * least < r.gpus["H200"].ms


def test_wrong_inputs():
    p = problem(meta(call_of(2, 32, 32, 16, 8, pixels=U8)))
    with pytest.raises(TypeError, match="got int"):
        vk.roofline(3)
    with pytest.raises(ValueError, match=r"'sideways'.*forward, backward, both, images"):
        vk.roofline(p, "sideways")
    with pytest.raises(ValueError, match=r"V100.*A100 SXM 80GB, H100 SXM"):
        vk.roofline(p, gpus=["H200", "V100"])
    with pytest.raises(ValueError, match="uint8 have no gradient"):
        vk.roofline(p, "images")


def test_the_page_is_what_the_model_says():
    script = [sys.executable, str(ROOT / "benchmarks" / "scale.py"), "--check"]
    subprocess.run(script, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "VITKERNELS_CACHE": "/nowhere"})


def test_data_sheets():
    for sheet in data_sheets.GPUS.values():
        assert sheet.source
        assert sheet.half >= sheet.tf32 > sheet.fp64 > 0
        assert 100 < sheet.ridge("half") < 500
        assert sheet.planned.multiprocessors == sheet.multiprocessors
        assert sheet.planned.shared_bytes == NOMINAL[sheet.arch].shared_bytes


def test_nobody_made_a_module_that_hides_the_function():
    code = "import vitkernels as vk, vitkernels.cost_model; assert callable(vk.roofline), vk.roofline"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not (ROOT / "vitkernels" / "roofline.py").exists()


def test_blocks_in_pairs_ask_for_the_weight_once():
    p = compile_triton.problem(16, "bf16", B=256)
    single, pair = (q for q in forward_plan.candidates(p, NOMINAL[90], False)[0] if (q.loader, q.BN) == ("engine", 256))
    asked = [cuda_model.forward(p, q).passes[-1].requested for q in (single, pair)]
    assert asked[0]["weight"] == 2 * asked[1]["weight"] and asked[0]["images"] == asked[1]["images"]


def test_positions_of_their_own_are_asked_for_apart():
    """Kept patches' bias once a tile by the kernel that stores by the copy engine, and each row's position."""
    p = compile_triton.problem(16, "bf16", B=256, keep=True)
    found = forward_plan.candidates(p, NOMINAL[90], False)[0]
    (plan,) = (q for q in found if (q.loader, q.BN, q.cluster) == ("stored", 192, 1))
    requested = cuda_model.forward(p, plan).passes[-1].requested
    assert requested["bias"] == plan.tiles // plan.tiles_n * p.D * 2
    assert requested["position"] == (p.B * p.rows + p.B * p.T) * p.D * 2
