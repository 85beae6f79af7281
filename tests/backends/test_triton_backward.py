"""The Triton backward by kernel and tile, in the interpreter where there is no GPU; its plans by arithmetic."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from problems import arguments

import vitkernels as vk
from vitkernels import gpu
from vitkernels.backends import split_k, triton
from vitkernels.backends.patch_layout import blocks_in
from vitkernels.backends.triton import backward_launch, backward_plan, config_cache, configs
from vitkernels.profiling import compile_triton
from vitkernels.testing import accuracy, oracle

pytest.importorskip("triton")

H100 = gpu.NOMINAL[90]
NORM = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
HALF, F32, F64, U8 = torch.bfloat16, torch.float32, torch.float64, torch.uint8
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def fresh_plans():
    config_cache.forget_plans()
    yield
    config_cache.forget_plans()


def reduction(p, weight=True, bias=True, pos=True, prefix=True, *, aligned=True, dtype=HALF):
    wanted = backward_plan.Wanted(weight, bias, pos, prefix)
    return backward_plan.reduction(p, H100, backward_plan.dense(p, dtype)._replace(aligned=aligned), wanted, False)


def right(call):
    rows = accuracy.compare(call, "triton", gradients=True)
    assert [r for r in rows if not r["ok"]] == []


CASES = {
    "bf16": dict(P=16),
    "uint8 normalised": dict(pixels=U8, **NORM),
    "uint8 scaled, channels-last": dict(pixels=U8, channels_last=True),
    "channels-last normalised": dict(channels_last=True, D=24, T=0, **NORM),
    "P = 14": dict(H=28, W=56, P=14, D=72, pos="N"),
    "kept, some twice": dict(kept=5, B=4, T=2),
    "kept, position per image": dict(kept=4, pos="B", T=2),
    "kept, no position": dict(kept=3, pos=""),
    "overlap": dict(stride=8, D=16),
    "overlap, padding": dict(P=7, stride=4, padding=2, H=30, W=27, D=16, pos="N"),
    "patches apart": dict(H=40, W=72, P=8, stride=11, D=16),
    "position per image": dict(pos="B"),
    "one patch, strides past the image": dict(H=16, W=16, stride=500, D=16),
    "strides past the padded image": dict(H=20, W=18, padding=9, stride=700, D=16),
    "pixels left over": dict(H=57, W=83, D=16),
    "13 channels, fp32": dict(B=1, C=13, P=8, D=16, pixels=F32, weights=F32),
    "fp16 to fp32": dict(weights=torch.float16, out_dtype=F32),
    "bf16 to fp64": dict(out_dtype=F64),
    "fp64": dict(pixels=F64, weights=F64, P=8, **NORM),
    "fp32 to bf16, kept": dict(pixels=F32, weights=F32, out_dtype=HALF, kept=5),
    "fp64, kept": dict(pixels=F64, weights=F64, P=8, kept=7, **NORM),
}
TILES = sorted(
    {c for (_, kernel, kind), row in configs.TABLE.items() for c in row if kernel == "weight" and kind != "fp64"}
)


@pytest.mark.parametrize("name", CASES)
def test_gradients(name, device):
    right(arguments(**CASES[name], device=device))


@pytest.mark.parametrize("tile", TILES, ids=lambda c: f"{c.BM}x{c.BN}x{c.BK}")
@pytest.mark.parametrize("name", ["P = 14", "kept, some twice"])
def test_every_tile_of_the_weight(name, tile, monkeypatch, device):
    monkeypatch.setattr(backward_plan, "weight_tiles", lambda *_: (tile,))
    right(arguments(**CASES[name], device=device))


BY_ENGINE = {
    "bf16": dict(B=3, H=48, W=80, P=16, D=72),
    "fp16, one image": dict(B=1, H=64, W=48, P=16, D=136, weights=torch.float16, pixels=torch.float16),
    "patches of 32 × 16": dict(H=64, W=32, P=(32, 16), stride=None, D=40),
    "patches of 16 × 8": dict(H=32, W=32, P=(16, 8), stride=None, D=40),
    "channels-last": dict(B=2, H=32, W=48, channels_last=True),
    "uint8 normalised": dict(B=5, H=32, W=48, pixels=U8, D=200, **NORM),
    "uint8 scaled, channels-last": dict(B=2, H=32, W=48, pixels=U8, channels_last=True),
    "two blocks of rows": dict(B=1, H=640, W=32, P=16),
    "two blocks of a row": dict(B=1, H=16, W=1280, P=16),
    "13 channels": dict(B=2, C=13, H=32, W=48),
    "patches apart": dict(H=72, W=72, stride=24),
    "patches overlap": dict(H=48, W=48, stride=8),
    "no prefix, position of patches": dict(T=0, pos="N"),
    "fp32 multiplied in bf16": dict(pixels=F32, weights=F32),
}


@pytest.mark.parametrize("tile", configs.rows(90, "weight_descriptor", "half"), ids=lambda c: f"{c.BM}x{c.BN}x{c.BK}")
@pytest.mark.parametrize("name", BY_ENGINE)
def test_the_weight_by_the_copy_engine(name, tile, monkeypatch, device):
    rows = configs.rows
    monkeypatch.setattr(configs, "rows", lambda a, n, k: (tile,) if n == "weight_descriptor" else rows(a, n, k))
    taken, true = [], backward_launch._launch
    monkeypatch.setattr(
        backward_launch, "_launch", lambda p, prepared, *a: taken.append(prepared) or true(p, prepared, *a)
    )
    call = arguments(**BY_ENGINE[name], device=device)
    with torch.autocast(device, HALF, enabled="multiplied in" in name):
        right(call)
    assert taken and all(one.weight is not None for one in taken)


def test_one_image_has_no_next(device):
    """Whatever its stride is."""
    call = arguments(B=1, P=16, device=device)
    call["weight"].requires_grad_()
    tokens = vk.patch_embed(**call, backend="triton")
    grad = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1)).to(tokens)
    odd = grad.as_strided(grad.shape, (7, *grad.stride()[1:]))
    found = [torch.autograd.grad(tokens, call["weight"], g, retain_graph=True)[0] for g in (grad, odd)]
    assert torch.equal(*found)


def test_a_tile_from_a_file_covers_the_weight_once():
    """BN is the patch's cut: another would make programs for which there is nothing to write."""
    p, wanted = compile_triton.problem(16, "bf16"), backward_plan.Wanted(True, False, False, False)
    for BN in (32, 128, 256):
        choice = "weight_descriptor", configs.Config(128, BN, 64, 4, 4)
        plan = backward_plan.reduction(p, H100, backward_plan.dense(p), wanted, False, choice=choice)
        assert plan.weight.grid == plan.parts["weight_parts"][0] * 6 * 6


def test_why_the_copy_engine_does_not_bring_the_weights_gradient():
    p = compile_triton.problem(16, "bf16")
    grad = backward_plan.dense(p)

    def reasons(p=p, product="half", gpu=H100, **changes):
        return backward_plan.no_weight_descriptor(p, gpu, product, grad._replace(**changes))

    assert reasons() == reasons(dtype=F32) == reasons(replace(p, B=1), strides=(0, 768, 1)) == []
    assert "channels of the tokens' gradient are 0 apart" in reasons(strides=(0, 0, 0))
    assert reasons(strides=(200 * 772, 772, 1)) == ["its rows are 1544 bytes apart, no multiple of 16"]
    assert reasons(strides=(0, 768, 1)) == ["its images are 0 bytes apart, no multiple of 16"]
    assert reasons(aligned=False) == ["images do not start on 16 bytes"]
    assert reasons(product="fp32") == ["no such kernel for fp32 on sm_90"]
    assert reasons(gpu=gpu.NOMINAL[80]) == ["no such kernel for half on sm_80"]
    assert reasons(compile_triton.problem(16, "bf16", keep=True)) == ["a keep list"]
    small = replace(p, P=(1, 8, 8), S=(1, 8, 8))
    assert reasons(small) == ["a patch of 8 rows of 8 is not cut into blocks of 128"]


@pytest.mark.parametrize("kind", ["half", "fp32"])
def test_every_tile_of_the_images(kind, monkeypatch, device):
    dtype = HALF if kind == "half" else F32
    rows = configs.rows
    for tile in {*rows(80, "images", kind), *rows(90, "images", kind)}:
        monkeypatch.setattr(configs, "rows", lambda a, n, k, t=tile: (t,) if n == "images" else rows(a, n, k))
        config_cache.forget_plans()
        right(arguments(P=(8, 16), stride=None, D=70, pixels=dtype, weights=dtype, device=device))
        right(arguments(stride=9, D=20, pixels=dtype, weights=dtype, device=device, **NORM))


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
@pytest.mark.parametrize("name", ["bf16", "kept, some twice", "fp64"])
def test_any_number_of_parts(splits, name, monkeypatch, device):
    def cheapest(p, gpu, tiles, steps, *_):
        each = -(-steps // splits)
        return split_k.Split(0.0, -(-steps // each), each)

    monkeypatch.setattr(split_k, "cheapest", cheapest)
    monkeypatch.setattr(backward_plan, "TABLE_BYTES", 1 << 30)
    p_sums = backward_plan.sums_of

    def sums_of(p, *rest):
        chunk = -(-p.B // splits)
        return p_sums(p, *rest)._replace(chunk=chunk, splits=-(-p.B // chunk))

    monkeypatch.setattr(backward_plan, "sums_of", sums_of)
    right(arguments(**{"B": 7, **CASES[name]}, device=device))


NEEDS = [
    *((n,) for n in oracle.LEARNT),
    *(("bias", "prefix"), ("pos_embed", "bias"), ("weight", "images"), ("prefix", "pos_embed")),
]


@pytest.mark.parametrize("needs", NEEDS, ids="+".join)
@pytest.mark.parametrize("name", ["bf16", "P = 14", "kept, some twice", "kept, position per image"])
def test_what_is_frozen_is_neither_computed_nor_in_the_way(needs, name, device):
    """Each subset of the gradients has the bits that it has among all."""
    call, everything = all_gradients(name, device)
    for name, gradient in gradients(call, needs).items():
        assert torch.equal(gradient, everything[name]), name


@cache
def all_gradients(name, device):
    call = arguments(**CASES[name], device=device)
    return call, gradients(call, [n for n in oracle.LEARNT if call.get(n) is not None])


def gradients(call, needs):
    leaves = {n: call[n].detach().requires_grad_() for n in needs}
    tokens = vk.patch_embed(**{**call, **leaves}, backend="triton")
    grad = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1)).to(tokens)
    return dict(zip(needs, torch.autograd.grad(tokens, list(leaves.values()), grad), strict=True))


def test_a_frozen_weight_is_no_product():
    p = compile_triton.problem(16, "bf16")
    everything = reduction(p, aligned=False)
    frozen = reduction(p, False, True, True, True)
    assert everything.reduce.constants["WEIGHT"] and not frozen.reduce.constants["WEIGHT"]
    assert frozen.weight is None and frozen.reduce.grid < everything.reduce.grid
    by_engine = reduction(p)
    assert by_engine.weight.grid > 0 and by_engine.reduce.grid == frozen.reduce.grid
    assert reduction(p, True, False, False, False).reduce.grid == 0
    weight = reduction(p, True, False, False, False, aligned=False)
    assert not weight.reduce.constants["SUMS"] and weight.reduce.grid == weight.reduce.scalars["weight_programs"]
    bias = reduction(p, False, True, False, False)
    assert bias.parts["table_parts"][1] == 0 and bias.reduce.scalars["first_row"] == p.T


def strided(tokens, kind):
    g = torch.Generator().manual_seed(2)
    grad = torch.randn(tokens.shape, generator=g).to(tokens)
    if kind == "one number":
        return grad[0, 0, 0].expand(tokens.shape)
    if kind == "one row":
        return grad[:1, :1].expand(tokens.shape)
    if kind == "channels first":
        return grad.transpose(1, 2).contiguous().transpose(1, 2)
    return torch.stack([grad, torch.full_like(grad, float("nan"))], -1)[..., 0]


@pytest.mark.parametrize("kind", ["one number", "one row", "channels first", "every other"])
@pytest.mark.parametrize("name", ["bf16", "kept, some twice", "overlap"])
def test_gradients_of_the_tokens_in_any_strides(kind, name, device):
    call = arguments(**CASES[name], device=device)
    found = []
    for dense in (False, True):
        leaves = [call[n].detach().requires_grad_() for n in oracle.LEARNT]
        tokens = vk.patch_embed(**{**call, **dict(zip(oracle.LEARNT, leaves, strict=True))}, backend="triton")
        grad = strided(tokens, kind)
        found.append(torch.autograd.grad(tokens, leaves, grad.contiguous() if dense else grad))
    for ours, dense in zip(*found, strict=True):
        assert torch.equal(ours, dense)


@pytest.mark.parametrize("lost", [1.0, float("nan")])
def test_an_index_out_of_range_has_no_gradient(lost, monkeypatch, device):
    from vitkernels import ops

    monkeypatch.setattr(ops, "check_keep", lambda *_: None)
    monkeypatch.setattr("vitkernels.backends.common.in_grid", unchecked)
    call = arguments(P=16, T=2, device=device)
    call["images"][0, :, :16, :16] = float("nan")  # where an index that is none would point to
    call["keep"] = torch.tensor([[1, 9, 3], [-1, 2, 5], [4, 5, 6]], device=device)
    real = dict(call, keep=torch.tensor([[1, 1, 3], [1, 2, 5], [4, 5, 1]], device=device))
    found = []
    for c in (call, real):
        leaves = [c[n].detach().requires_grad_() for n in oracle.LEARNT]
        tokens = vk.patch_embed(**{**c, **dict(zip(oracle.LEARNT, leaves, strict=True))}, backend="triton")
        grad = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1)).to(tokens)
        grad[0, 3] = grad[1, 2] = grad[2, 4] = 0 if c is real else lost  # the token of an index that is none is NaN
        found.append(torch.autograd.grad(tokens, leaves, grad))
    for ours, zero in zip(*found, strict=True):
        torch.testing.assert_close(ours, zero)


def unchecked(p, keep):
    """`in_grid`, as it is where nobody has looked at the values."""
    if keep is None:
        return None, None
    outside = (keep < 0) | (keep >= p.N)
    return keep.masked_fill(outside, 0), outside


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_gradients_lie_as_what_they_are_of(layout, device):
    call = arguments(C=4, channels_last=layout == "NHWC", device=device)
    call["weight"] = call["weight"].to(memory_format=torch.channels_last)
    found = gradients(call, oracle.LEARNT)
    for name, gradient in found.items():
        assert gradient.stride() == call[name].stride(), name
    plain = gradients({**call, "weight": call["weight"].contiguous()}, oracle.LEARNT)
    for name, gradient in found.items():
        assert torch.equal(gradient, plain[name]), name


HEADLINE = {
    "ViT-B/16": (16, 768), "ViT-L/14": (14, 1024), "ViT-S/16": (16, 384), "ViT-B/32": (32, 768), "ViT-g/14": (14, 1408),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADLINE)
@pytest.mark.parametrize("keep", [False, True])
def test_memory_and_occupation(name, keep):
    """The parts of these stay below 32 MB whatever the batch; from 64 images on all multiprocessors work on dW."""
    patch, D = HEADLINE[name]
    for B in (1, 8, 64, 256, 1024):
        p = compile_triton.problem(patch, "bf16", B=B, D=D, keep=keep)
        plan = reduction(p)
        assert sum(4 * torch.Size(shape).numel() for shape in plan.parts.values()) < 32 << 20
        if B >= 64 and patch < 32:  # whose 9 MB of dW allow two parts, and the last wave of its tiles is small
            programs = plan.weight.grid if plan.weight else plan.reduce.scalars["weight_programs"]
            waves = -(-programs // H100.multiprocessors)
            assert programs / (waves * H100.multiprocessors) > 0.75, (B, programs)


def test_parts_cover_every_patch_and_image_once():
    for B in (1, 2, 3, 7, 64, 255, 256):
        for patch, dtype in ((16, "bf16"), (14, "fp32"), (32, "uint8->bf16")):
            p = compile_triton.problem(patch, dtype, B=B)
            plan = reduction(p)
            splits = plan.parts["weight_parts"][0]
            if plan.weight:
                sides = [plan.weight.constants[side] for side in ("BB", "BY", "BX")]
                chunk, steps = plan.weight.scalars["chunk"], blocks_in(p, tuple(sides))
            else:
                chunk, steps = plan.reduce.scalars["weight_chunk"], p.B * p.rows
            assert (splits - 1) * chunk < steps <= splits * chunk
            splits, chunk = plan.parts["table_parts"][0], plan.reduce.scalars["sums_chunk"]
            assert (splits - 1) * chunk < B <= splits * chunk


def test_gradients_past_2_31_elements(device, tmp_path):
    """dY whose images lie 2³² elements apart."""
    call = arguments(B=2, P=16, D=8, T=1, device=device)
    size = (2, 7, 8)
    step = 2**32
    count = step + 7 * 8
    if device == "cpu":  # a file with holes: what is not touched takes no memory
        memory = torch.from_file(str(tmp_path / "holes"), shared=True, size=count, dtype=HALF)
    else:
        memory = torch.zeros(count, dtype=HALF, device=device)
    far = memory.as_strided(size, (step, 8, 1))
    near = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(far)
    far.copy_(near)
    found = []
    for grad in (far, near):
        leaves = [call[n].detach().requires_grad_() for n in oracle.LEARNT]
        tokens = vk.patch_embed(**{**call, **dict(zip(oracle.LEARNT, leaves, strict=True))}, backend="triton")
        assert tokens.shape == size
        found.append(torch.autograd.grad(tokens, leaves, grad))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_rows_near_2_31_are_declined():
    """What a kernel counts past the last row would not fit: 11 parts of dW end past 2³¹."""
    p = replace(compile_triton.problem(16, "bf16"), B=2**31 - 300, H=16, W=16, T=0, pos_rows=0)
    assert any("32 bits" in reason for reason in triton.why_not(p))


def test_triton_before_3_7_declines_what_it_cannot_multiply(monkeypatch):
    monkeypatch.setattr(triton, "_triton_version", lambda: (3, 6))
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    p = replace(compile_triton.problem(16, "fp32"), compute_dtype=F64, out_dtype=F64)
    assert any("fp64 what it loads as torch.float32" in reason for reason in triton.why_not(p))
    assert not any("fp64" in reason for reason in triton.why_not(replace(p, image_dtype=F64)))


def test_problems_are_planned_once(device):
    call = arguments(device=device)
    gradients(call, oracle.LEARNT)
    before = misses()
    gradients(call, oracle.LEARNT)
    assert misses() == before


def misses():
    return [f.cache_info().misses for f in (backward_launch._prepared_reduction, backward_launch._prepared_images)]
