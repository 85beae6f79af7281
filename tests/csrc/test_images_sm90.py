"""The images' gradient on sm_90a (csrc/backward/images_sm90.cuh): random problems that it takes, against fp64."""

import random
import re

import pytest
import torch
from problems import arguments, drawn_for_the_copy_engine, on

import vitkernels as vk
from vitkernels.backends import cuda
from vitkernels.backends.common import canonical
from vitkernels.backends.cuda import backward_plan, images_plan
from vitkernels.backends.cuda.backward_operands import Grad
from vitkernels.gpu import NOMINAL
from vitkernels.testing import accuracy

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def watched(monkeypatch):
    """The plans that are made."""
    plans, true = [], backward_plan.wgmma_images_plan

    def kept(*arguments):
        plans.append(true(*arguments))
        return plans[-1]

    monkeypatch.setattr(backward_plan, "wgmma_images_plan", kept)
    return plans


def why_not(call: dict, images_at: int = 0) -> str:
    p = vk.explain(**call).problem
    dense = Grad(0, ((p.T + p.rows) * p.D, p.D, 1))
    return images_plan.no_wgmma_images(p, NOMINAL[90], p.image_strides, images_at, dense)


def drawn(seed: int, in_groups: bool) -> dict:
    """Of images that have a gradient, which patches cover without overlap."""
    call = drawn_for_the_copy_engine(seed, in_groups)
    call.pop("stride", None)
    if call["images"].dtype == torch.uint8:
        call["images"] = (call["images"] / 256).to(call["weight"].dtype)
    P, images = call["weight"].shape[-2:], call["images"]
    covered = images[..., : images.shape[2] // P[0] * P[0], : images.shape[3] // P[1] * P[1]]
    call["images"] = torch.empty_like(covered).copy_(covered)
    return call


@pytest.mark.parametrize("in_groups", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_random_problem(on_cuda_kernels, device, watched, seed, in_groups):
    multiprocessors = random.Random(seed).choice((1, 2, 5, 132))
    on_cuda_kernels(90, multiprocessors)
    call = on(device, drawn(seed, in_groups))
    if "padded to" in why_not(call):
        call |= {"mean": None, "std": None}
    reason = why_not(call)
    rows = accuracy.compare(call, "cuda", gradients=True)
    assert [r for r in rows if not r["ok"]] == []
    assert device == "cuda" or bool(watched) == (not reason)
    assert device == "cuda" or multiprocessors != 2 or all(plan.pair == 2 or plan.tiles == 1 for plan in watched)
    assert not reason or re.search("no multiple of (16|8 of|the [248])|rows are|patches are|patches in a line", reason)


def test_that_random_problems_are_taken():
    taken = [not why_not(drawn(seed, in_groups)) for seed in range(60) for in_groups in (False, True)]
    assert sum(taken) > 70


REFUSED = {
    "overlap": (dict(stride=8), r"patches of \(1, 16, 16\) every \(1, 8, 8\) pixels"),
    "pixels left over": (dict(H=40), r"patches cover \(1, 32, 48\) of \(1, 40, 48\) pixels"),
    "a keep list": (dict(kept=3), "a keep list"),
    "padding": (dict(padding=8), "padding"),
    "float32": (dict(pixels=torch.float32, weights=torch.float32), "the product is not of 16 bits"),
    "another float": (dict(pixels=torch.float16), "pixels are of another float type"),
    "channels": (dict(D=44), r"dY.* not .*16 bytes"),
    "tokens": (dict(out_dtype=torch.float32), "dY is of another type than the product"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_leaves_to_the_other_kernel(on_cuda_kernels, device, watched, case):
    on_cuda_kernels(90)
    more, reason = REFUSED[case]
    call = arguments(**{"B": 3, "H": 32, "W": 48, "P": 16, "D": 40} | more, device=device)
    assert re.search(reason, why_not(call))
    assert [r for r in accuracy.compare(call, "cuda", gradients=True) if not r["ok"]] == []
    assert not watched


def test_an_address(on_cuda_kernels, device, watched):
    """A gradient's memory may begin anywhere: then another kernel writes it."""
    on_cuda_kernels(90)
    call = arguments(3, 3, 32, 48, 16, 40, device=device)
    assert why_not(call) == "" and why_not(call, images_at=8) == "images do not start on 16 bytes"
    p = vk.explain(**call).problem
    tensors = canonical(*(call.get(name) for name in ("images", "weight", "bias", "pos_embed", "prefix", "keep")))
    grad = torch.randn(p.out_shape, device=device).to(torch.bfloat16)
    made = [torch.empty(at + call["images"].numel(), dtype=torch.bfloat16, device=device)[at:] for at in (0, 4)]
    for d_images in made:
        cuda.backward(p, grad, *tensors, (d_images.view_as(tensors[0]), *[None] * 4))
    assert device == "cuda" or len(watched) == 1
    torch.testing.assert_close(*made, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nothing_but_its_patches(on_cuda_kernels, device, watched, dtype):
    """What is not finite in a patch's tokens reaches its pixels, all of them and no others; and twice the same bits."""
    on_cuda_kernels(90, multiprocessors=2)
    call = arguments(5, 3, 48, 80, 16, 264, pixels=dtype, device=device)
    images = call.pop("images").requires_grad_()
    tokens = vk.patch_embed(images, **call, out_dtype=torch.bfloat16, backend="cuda")
    grad = torch.randn_like(tokens)
    grad[3, 1 + 7, 5] = float("nan")
    once, twice = (torch.autograd.grad(tokens, images, grad, retain_graph=True)[0] for _ in range(2))
    broken = once.isnan()
    assert broken[3, :, 16:32, 32:48].all() and broken.sum() == 3 * 16 * 16
    assert torch.equal(once.nan_to_num(), twice.nan_to_num())
    assert device == "cuda" or watched
