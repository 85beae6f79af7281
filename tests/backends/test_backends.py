"""Every backend on random problems over the whole contract: tokens and gradients against fp64, in poisoned memory."""

import math

import pytest
import torch
from problems import arguments as make_arguments

import vitkernels as vk
from vitkernels import dispatch
from vitkernels.testing import accuracy, oracle, random_problems

BACKENDS = tuple(dispatch.MODULES)
# Triton compiles each of its problems on a GPU, and its interpreter takes 0.2 s for one.
SEEDS = {"reference": range(400), "triton": range(120), "cuda": range(300)}
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(params=BACKENDS)
def backend(request, on_cuda_kernels):
    if request.param == "cuda":
        on_cuda_kernels()
    return request.param


def skip_where_declined(backend, arguments):
    if reasons := vk.explain(**arguments)[backend]:
        pytest.skip(f"{backend}: {'; '.join(reasons)}")


def normal(*shape, device="cpu", dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize(("backend", "seed"), [(b, s) for b in BACKENDS for s in SEEDS[b]], indirect=["backend"])
def test_random_problem(backend, seed, device, on_cuda_kernels):
    if backend == "cuda" and seed % 2:
        on_cuda_kernels(multiprocessors=1 + seed % 5)
    arguments = random_problems.case(seed).tensors(device)
    skip_where_declined(backend, arguments)
    before = {n: v.clone() for n, v in arguments.items() if isinstance(v, torch.Tensor)}
    rows = accuracy.compare(arguments, backend, gradients=True)
    assert [r for r in rows if not r["ok"]] == [], random_problems.case(seed)
    for name, tensor in before.items():
        assert torch.equal(arguments[name], tensor), f"{name} was written to"


def test_triton_takes_nearly_everything(device):
    """Skipping must not pass for working."""
    pytest.importorskip("triton")
    declined = {}
    for case in random_problems.cases(0, 120):
        reasons = vk.explain(**case.tensors(device))["triton"]
        if reasons and "in fp64" not in reasons[0]:  # which Triton 3.6 can't, and a quarter of the problems are
            declined[str(case)] = reasons
    assert len(declined) <= 6, declined


@pytest.mark.parametrize("seed", range(120))
def test_cuda_takes_everything(device, on_cuda_kernels, seed):
    on_cuda_kernels()
    assert vk.explain(**random_problems.case(seed).tensors(device))["cuda"] == []


@pytest.mark.parametrize("seed", range(2000, 2020))
def test_twice_the_same_bits(backend, seed, device):
    arguments = random_problems.case(seed).tensors(device)
    skip_where_declined(backend, arguments)

    def call(**kwargs):
        return vk.patch_embed(**kwargs, backend=backend)

    first, second = accuracy.evaluate(call, arguments), accuracy.evaluate(call, arguments)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


# Hard inputs

HALF, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def hard(device, dtype=F32, spread=0.14, **change):
    """Images [2,3,20,24], patches 4×4, N = 30, D = 33, T = 1, with a position of every token."""
    return dict(
        images=normal(2, 3, 20, 24, device=device), weight=spread * normal(33, 3, 4, 4, device=device, dtype=dtype),
        bias=normal(33, device=device, dtype=dtype), pos_embed=normal(1, 31, 33, device=device, dtype=dtype),
        prefix=normal(1, 33, device=device, dtype=dtype),
    ) | {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in change.items()}  # fmt: skip


def bytes_near(mean):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(mean - 4, mean + 4, (2, 3, 20, 24), generator=generator).byte()


RAW = dict(images=bytes_near(128), scale=1.0, mean=128.0, std=58.0)
BARE = dict(bias=None, pos_embed=None, prefix=None)
HARD = {
    "pixels near a large mean": dict(images=1000 + 0.01 * normal(2, 3, 20, 24), mean=1000.0, std=0.01),
    "bytes near the mean": RAW,
    "bytes near the mean, fp16": dict(RAW, dtype=HALF),
    "bytes near the mean, bf16": dict(RAW, dtype=BF16),
    "small fp16 weights of bytes": dict(BARE, images=bytes_near(128), dtype=HALF, spread=0.002, std=(0.2, 0.25, 3.0)),
    "large raw bytes, bf16": dict(images=bytes_near(250), dtype=BF16, spread=1, scale=1.0),
    "negative scale": dict(scale=-3.0, mean=(0.5, -0.5, 0.1)),
    "tiny scale": dict(images=1e8 * normal(2, 3, 20, 24), scale=1e-8),
    "tiny scale, fp16": dict(images=6e4 * normal(2, 3, 20, 24).sigmoid(), dtype=HALF, scale=1e-5),
    "bias far above the product": dict(bias=1e4 * normal(33)),
    "fp32 to bf16": dict(out_dtype=BF16),
    "fp16 to fp32": dict(dtype=HALF, out_dtype=F32),
    "bf16 to fp64": dict(dtype=BF16, out_dtype=F64),
    "fp64 to bf16": dict(dtype=F64, out_dtype=BF16),
    "tables in other dtypes": dict(dtype=HALF, bias=normal(33, dtype=F64), pos_embed=normal(1, 31, 33, dtype=BF16)),
    "tables expanded": dict(bias=normal(1).expand(33), pos_embed=normal(1, 1, 33).expand(2, 33, 33),
                            prefix=normal(1, 1).expand(3, 33), weight=normal(33, 1, 4, 1).expand(-1, 3, 4, 4)),
    "a patch of padding alone": dict(padding=6, mean=0.5, stride=3, pos_embed=None),
    "D = 1": dict(BARE, images=normal(3, 1, 9, 9), weight=normal(1, 1, 3, 3)),
    "more patches than a piece": dict(BARE, images=normal(3, 1, 50, 51), weight=normal(3, 1, 2, 2)),
    "one pixel": dict(BARE, images=normal(1, 1, 1, 1), weight=normal(5, 1, 1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", HARD)
def test_hard(backend, name, device):
    arguments = hard(device, **HARD[name])
    skip_where_declined(backend, arguments)
    rows = accuracy.compare(arguments, backend, gradients=True)
    assert [r for r in rows if not r["ok"]] == []


NEIGHBOURS = {  # patch sizes whose rows end within a step of every kernel's, and at its end
    "P = 14": dict(B=4, H=56, W=56, P=14, D=40),
    "P = 14, autocast": dict(B=4, H=56, W=56, P=14, D=40, pixels=F32),
    "P = 6": dict(B=4, H=24, W=24, P=6, D=24),
    "P = 10": dict(B=3, H=40, W=40, P=10, D=33),
    "P = 16": dict(B=4, H=64, W=64, P=16, D=72),
    "P = 16, fp32": dict(B=3, H=48, W=64, P=16, D=36, pixels=F32, weights=F32),
    "P = 7, fp32": dict(B=3, H=21, W=28, P=7, D=20, pixels=F32, weights=F32),
    "P = 8, channels last": dict(B=3, H=32, W=32, P=8, D=24, channels_last=True),
    "normalised": dict(B=3, H=28, W=28, P=14, D=24, mean=0.5, std=0.2),
    "kept": dict(B=3, H=56, W=56, P=14, D=24, kept=5),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("one_patch", [False, True], ids=["image", "patch"])
@pytest.mark.parametrize("name", NEIGHBOURS)
def test_a_broken_image_reaches_no_other(backend, name, one_patch, value, device):
    """Nor a broken patch the others of its image; in tokens, and in the images' gradient. The reference can fail here
    on a CPU with AMX alone (test_reference_on_cpu.py holds its rows to be padded)."""
    arguments = make_arguments(**NEIGHBOURS[name], device=device)
    skip_where_declined(backend, arguments)
    images, P, keep = arguments["images"].clone(), arguments["weight"].shape[-1], arguments.get("keep")
    if one_patch:
        images[1, :, P : 2 * P, :P] = value
    else:
        images[1] = value
    G_w, T = images.shape[3] // P, arguments["prefix"].shape[0]
    arguments["images"] = images.requires_grad_()
    tokens = vk.patch_embed(**arguments, backend=backend)
    numbers = torch.arange(tokens.shape[1] - T).expand(len(images), -1) if keep is None else keep.cpu()
    broken = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    broken[1, T:] = (numbers[1] == G_w) if one_patch else True
    assert torch.equal(tokens.isfinite().all(2).cpu(), ~broken)

    grad = torch.ones_like(tokens)
    grad[broken.to(device)] = value
    arguments["images"] = images = make_arguments(**NEIGHBOURS[name], device=device)["images"].requires_grad_()
    vk.patch_embed(**arguments, backend=backend).backward(grad)
    finite = images.grad.isfinite().all(1).cpu()
    wrong = torch.zeros_like(finite)
    if one_patch:
        wrong[1, P : 2 * P, :P] = bool(broken.any())
    elif keep is None:
        wrong[1] = True
    else:
        for n in keep[1].tolist():
            wrong[1, n // G_w * P : (n // G_w + 1) * P, n % G_w * P : (n % G_w + 1) * P] = True
    assert torch.equal(finite, ~wrong)


@pytest.mark.parametrize("B", [0, 2])
@pytest.mark.parametrize("kept", [None, 0])
@pytest.mark.parametrize("T", [None, 0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_to_do(backend, B, kept, T, dtype, device):
    shapes = dict(images=(B, 3, 8, 8), weight=(5, 3, 4, 4), pos_embed=(4 + (T or 0), 5))
    shapes |= {} if T is None else {"prefix": (T, 5)}
    arguments = {name: normal(*shape, device=device).to(dtype) for name, shape in shapes.items()}
    if kept is not None:
        arguments["keep"] = torch.zeros(B, kept, dtype=torch.int64, device=device)
    skip_where_declined(backend, arguments)
    rows = accuracy.compare(arguments, backend, gradients=True)
    assert [r for r in rows if not r["ok"]] == []


def test_a_nan_stays_in_its_patch(backend, device):
    images = normal(2, 3, 9, 10, device=device)
    images[0, 1, 5, 2] = float("nan")  # in patch 2 of 2×2
    images[1, :, 8:], images[1, :, :, 8:] = float("nan"), float("nan")  # behind the last patch
    arguments = dict(images=images, weight=normal(40, 3, 4, 4, device=device), prefix=normal(1, 40, device=device))
    skip_where_declined(backend, arguments)
    y = vk.patch_embed(**arguments, backend=backend)
    assert y[0, 3].isnan().all()
    y[0, 3] = 0
    assert y.isfinite().all()
    kept = torch.tensor([[0, 1], [2, 3]], device=device)
    assert vk.patch_embed(**arguments, keep=kept, backend=backend).isfinite().all()


# Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out_dtype", [None, torch.float32])
@pytest.mark.parametrize("pixels", [torch.uint8, torch.float32])
def test_autocast(backend, dtype, out_dtype, pixels, device):
    arguments = hard(device, out_dtype=out_dtype, mean=0.5, std=0.25)
    arguments["images"] = (arguments["images"].sigmoid() * (255 if pixels == torch.uint8 else 1)).to(pixels)
    skip_where_declined(backend, arguments)
    with torch.autocast(device, dtype):
        assert vk.patch_embed(**arguments, backend=backend).dtype == (out_dtype or dtype)
        rows = accuracy.compare(arguments, backend, gradients=True)  # backward inside autocast, too
    assert [r for r in rows if not r["ok"]] == []


def test_positions_that_autocast_leaves_in_float32_are_added_in_it(backend, device):
    arguments = hard(device, bias=None, out_dtype=torch.float32)
    arguments["images"] = torch.zeros_like(arguments["images"], dtype=torch.float32)
    skip_where_declined(backend, arguments)
    with torch.autocast(device, torch.bfloat16):
        tokens = vk.patch_embed(**arguments, backend=backend)
    N = arguments["pos_embed"].shape[-2] - arguments["prefix"].shape[-2]
    assert (tokens[:, -N:] == arguments["pos_embed"][..., -N:, :]).all()


def test_gradients_know_nothing_of_autocast(backend, device):
    arguments = hard(device)
    skip_where_declined(backend, arguments)

    def call(**kwargs):
        return vk.patch_embed(**kwargs, backend=backend)

    outside = accuracy.evaluate(call, arguments)

    leaves = {n: arguments[n].detach().requires_grad_() for n in oracle.LEARNT}
    tokens = call(**leaves)
    grad = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(tokens.numel())).bfloat16().to(tokens)
    with torch.autocast(device, torch.bfloat16):
        inside = torch.autograd.grad(tokens, list(leaves.values()), grad)
    for name, gradient in zip(leaves, inside, strict=True):
        assert torch.equal(gradient, outside[name]), name


# Autograd


@pytest.mark.parametrize("needed", oracle.LEARNT)
def test_only_what_is_asked_for(needed, device):
    arguments = hard(device)
    arguments[needed].requires_grad_()
    vk.patch_embed(**arguments).sum().backward()
    assert [n for n in oracle.LEARNT if arguments[n].grad is not None] == [needed]


def test_no_graph_without_gradients(device):
    arguments = hard(device)
    assert vk.patch_embed(**arguments).grad_fn is None
    arguments["weight"].requires_grad_()
    with torch.no_grad():
        assert not vk.patch_embed(**arguments).requires_grad
    with torch.inference_mode():
        plain = vk.patch_embed(**arguments, mean=0.25)
    assert torch.equal(plain, vk.patch_embed(**arguments, mean=0.25).detach())  # constants cached there serve here


# Addresses beyond 32 bits


@pytest.mark.parametrize("dim", range(4))
def test_offsets_past_2_31(backend, dim, device, tmp_path):
    """Images [2,2,32,32] whose batch, channel, row or pixel stride takes the last elements past 2³¹ and 2³²."""
    shape = [2, 2, 32, 32]
    strides = [2048, 1024, 32, 1]
    strides[dim] = 2**32 // (shape[dim] - 1)
    size = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if device == "cpu":  # a file with holes: what is not touched takes no memory
        memory = torch.from_file(str(tmp_path / "holes"), shared=True, size=size, dtype=torch.uint8)
    else:
        memory = torch.zeros(size, dtype=torch.uint8, device=device)
    images = memory.as_strided(shape, strides)
    near = torch.randint(256, shape, generator=torch.Generator().manual_seed(0)).byte().to(device)
    images.copy_(near)
    weight = normal(3, 2, 16, 16, device=device) / 16
    skip_where_declined(backend, dict(images=images, weight=weight))
    results = [vk.patch_embed(x, weight.requires_grad_(), backend=backend) for x in (images, near)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), weight)[0] for y in results))


@pytest.mark.parametrize("across", [True, False])
def test_patches_past_2_32(backend, device, across):
    """N does not fit 32 bits, by strides of 0: the patch's place in its row must come from all of its index."""
    W, H = 40_001, 120_000
    row = normal(1, 1, 1, W, device=device)
    images = row.expand(1, 1, H, W) if across else row.transpose(2, 3).expand(1, 1, W, H)
    keep = torch.tensor([[0, 1, 2**31, 2**32 + 5, W * H - 1]], device=device)
    arguments = dict(images=images, weight=torch.ones(1, 1, 1, 1, device=device), keep=keep)
    skip_where_declined(backend, arguments)
    y = vk.patch_embed(**arguments, backend=backend)
    assert torch.equal(y[0, :, 0], row.flatten()[keep[0] % W if across else keep[0] // H])


def test_keep_out_of_range(backend, device):
    arguments = hard(device, pos_embed=None, keep=torch.tensor([[0, 30], [-1, 3]], device=device))
    skip_where_declined(backend, arguments)
    if device == "cpu":
        with pytest.raises(ValueError, match=r"0\.\.29, got -1\.\.30"):
            vk.patch_embed(**arguments, backend=backend)
    elif backend != "reference":  # whose indexing stops a GPU with an assertion
        y = vk.patch_embed(**arguments, backend=backend)
        assert y[0, 2].isnan().all()
        assert y[1, 1].isnan().all()
        assert math.prod(y[0, 1].isfinite()) == 1
