"""The weight's gradient on sm_90a (csrc/backward/weight_sm90.cuh): random problems that it takes, against fp64."""

import random

import pytest
import torch

import vitkernels as vk
from vitkernels.backends import cuda
from vitkernels.backends.cuda import extension
from vitkernels.gpu import Gpu
from vitkernels.profiling.compile_triton import problem
from vitkernels.testing import verify

pytestmark = pytest.mark.usefixtures("poisoned")

HALF, BF16, F32, U8 = torch.float16, torch.bfloat16, torch.float32, torch.uint8


def drawn(seed: int) -> dict:
    rng = random.Random(seed)
    one = rng.choice
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    T = one((BF16, HALF))
    pixels = (U8, T, F32)[seed % 3]
    layout = one(("contiguous", "contiguous", "channels-last", "cut out"))
    P_h, P_w = one(((16, 16), (16, 16), (32, 32), (12, 16), (8, 32)))
    C = one((1, 3, 3, 4))
    B, D = one((1, 2, 3, 5, 9, 17, 33)), one((8, 64, 72, 136, 256, 264, 304))
    G_h, G_w = one(((1, 3), (3, 5), (2, 2), (7, 3), (1, 1), (2, 9)))
    if B * G_h * G_w > 200 or P_h == 32:
        B = min(B, 5)
    images = torch.rand(B, C, G_h * P_h, G_w * P_w, generator=generator)
    images = (images * 255).byte() if pixels == U8 else images.to(pixels)
    if layout == "channels-last":
        images = images.contiguous(memory_format=torch.channels_last)
    elif layout == "cut out":
        around = torch.full((B, C, G_h * P_h, G_w * P_w + 16), 255 if pixels == U8 else float("nan"), dtype=pixels)
        around[..., : G_w * P_w] = images
        images = around[..., : G_w * P_w]
    arguments = {"images": images, "weight": (normal(D, C, P_h, P_w) * (C * P_h * P_w) ** -0.5).to(T)}
    if rng.random() < 0.5:
        arguments["bias"] = normal(D).to(T)
    if rng.random() < 0.5:
        arguments["prefix"] = normal(one((1, 2, 5)), D).to(T)
    if rng.random() < 0.2 and P_h == P_w == 16 and G_h > 1 and G_w > 1:
        arguments["stride"] = one(((8, 16), (16, 32), (24, 16)))
    if rng.random() < 0.5:
        arguments.update(mean=(0.4, 0.5, 0.6, 0.5)[:C], std=(0.2, 0.3, 0.25, 0.2)[:C])
    elif rng.random() < 0.3:
        arguments["scale"] = 1 / 255
    return arguments


def on(arguments: dict, device: str) -> dict:
    return {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}


@pytest.fixture(scope="module")
def willing():
    """The emulated extension with a plan for which wgmma costs nothing, nor do parts: small problems take it, too."""
    from host import build

    change = ("backward/plan.h", "HOPPER_RATE[] = {1.6, 1.3}", "HOPPER_RATE[] = {1e6, 1e6}")
    parts = ("backward/plan.h", "5.0 * static_cast<double>(p.D)", "0.0 * static_cast<double>(p.D)")
    try:
        return build.mutated("backward/backward.cu", change, parts)
    except build.NoCompiler as error:
        pytest.skip(f"csrc/ can't be emulated: {error}")


class Watched:
    """The extension, and the plans of gradients that it makes."""

    def __init__(self, module):
        self.module, self.plans = module, []

    def __getattr__(self, name):
        return getattr(self.module, name)

    def plan_backward(self, *arguments):
        self.plans.append(self.module.plan_backward(*arguments))
        return self.plans[-1]


@pytest.fixture
def watched(request, on_cuda_kernels, device, monkeypatch):
    """Call it with a number of multiprocessors to emulate; on a GPU it is what it is, and its plans are its own."""
    on_cuda_kernels(90)
    if device == "cuda" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the GPU is no sm_90")
    module = extension.load() if device == "cuda" else request.getfixturevalue("willing")
    watched = Watched(module)
    monkeypatch.setattr(extension, "load", lambda: watched)

    def use(count: int) -> list:
        if device != "cuda":
            monkeypatch.setattr(cuda, "gpu_of", lambda d: Gpu("H100", 90, count, 232448))
            cuda._gpu.cache_clear()
        watched.plans.clear()
        return watched.plans

    cuda._problem.cache_clear()  # they are of the module that made them
    yield use
    cuda._problem.cache_clear()


def splits_of(plan, weight: torch.Tensor) -> int:  # of a plan for the weight alone
    return plan.scratch_bytes // (4 * weight.numel())


@pytest.mark.parametrize("seed", range(90))
def test_random_problem(watched, device, seed):
    arguments = on(drawn(seed), device)
    plans = watched(random.Random(seed).choice((1, 2, 5, 132)))
    rows = verify.compare(arguments, "cuda", gradients=True)
    assert [r for r in rows if not r["ok"]] == []
    assert device == "cuda" or (plans and all(p.hopper for p in plans))


@pytest.mark.parametrize("count", [25, 40, 132])
def test_splits(watched, device, count):
    """The same bits twice, and near those of one split: parts that hold whole blocks of patches and a shorter last."""
    images = torch.rand(33, 3, 48, 80, device=device).to(BF16)
    start = torch.randn(200, 3, 16, 16, device=device).to(BF16)
    grad = torch.randn(33, 15, 200, device=device).to(BF16)

    def gradient(count: int) -> tuple[torch.Tensor, int]:
        plans = watched(count)
        weight = start.clone().requires_grad_()
        vk.patch_embed(images, weight, backend="cuda").backward(grad)
        assert device == "cuda" or plans[0].hopper
        return weight.grad, splits_of(plans[0], weight)

    once, splits = gradient(count)
    assert torch.equal(once, gradient(count)[0])
    whole, one = gradient(1)
    assert device == "cuda" or (one == 1 and splits > 1)
    torch.testing.assert_close(once, whole, rtol=2**-7, atol=0.05)


@pytest.mark.parametrize(("patch", "dtype", "batch", "taken"), [
    (16, "bf16", 256, True),
    (16, "uint8->bf16", 256, True),
    (32, "bf16", 256, True),
    (14, "bf16", 256, False),
    (16, "tf32", 256, False),
    (16, "bf16", 1, False),
])  # fmt: skip
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_road_taken(on_cuda_kernels, device, arch, patch, dtype, batch, taken):
    if device == "cuda":
        pytest.skip("a GPU's architecture is its own")
    on_cuda_kernels(arch)
    p = problem(patch, dtype, B=batch)
    grad = (1024, cuda._NUMBER[p.out_dtype], (p.T + p.rows) * p.D, p.D, 1)
    images = (1024, cuda._NUMBER[p.image_dtype], *p.image_strides)
    weight = (1024, cuda._NUMBER[p.weight_dtype], p.K, p.K // p.C, p.P[1] * p.P[2], p.P[2], 1)
    tensors = (grad, images, weight, None, None, None, weight, None, None, None)
    plan = extension.load().plan_backward(cuda._problem(p, dtype == "tf32"), cuda._gpu(p.device), tensors)
    assert plan.hopper == (taken and arch == 90)


LAYOUTS = {  # of the tokens' gradient [B, N, D]: what is made of a contiguous one, and whether the road takes it
    "contiguous": (lambda g: g, True),
    "batch inside": (lambda g: g.transpose(0, 1).contiguous().transpose(0, 1), True),
    "rows cut out": (lambda g: torch.nn.functional.pad(g, (0, 8))[..., :-8], True),
    "rows a little cut out": (lambda g: torch.nn.functional.pad(g, (0, 1))[..., :-1], False),
    "begun at an odd address": (lambda g: torch.nn.functional.pad(g, (1, 7))[..., 1:-7], False),
    "channels outside": (lambda g: g.transpose(1, 2).contiguous().transpose(1, 2), False),
    "one for all channels": (lambda g: g[..., :1].expand_as(g), False),
    "one for all images": (lambda g: g[:1].expand_as(g), None),
    "one for all": (lambda g: g[:1, :1, :1].expand_as(g), False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("D", [33, 72])
def test_gradients_of_tokens_in_any_strides(watched, device, layout, D):
    """The same bits as from a contiguous copy on the road that takes it, near them where another does."""
    laid_out, taken = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(D)
    images = torch.rand(5, 3, 48, 32, generator=generator).to(BF16).to(device)
    weight = torch.randn(D, 3, 16, 16, generator=generator).to(BF16).to(device).requires_grad_()
    grad = laid_out(torch.randn(5, 6, D, generator=generator).to(BF16).to(device))

    def gradient(grad):
        plans = watched(2)
        (found,) = torch.autograd.grad(vk.patch_embed(images, weight, backend="cuda"), weight, grad)
        return found, plans[0].hopper

    strided, hopper = gradient(grad)
    copied, _ = gradient(grad.contiguous())
    torch.testing.assert_close(strided, copied, rtol=2**-7, atol=0.02)
    assert device == "cuda" or taken is None or hopper == (taken and D % 8 == 0)
