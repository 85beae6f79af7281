"""The definition: gradcheck, and what a GPU computes otherwise; and the oracle against a model's modules."""

from dataclasses import replace

import pytest
import torch
from problems import images_of
from torch import nn

import vitkernels as vk
from vitkernels.backends import reference
from vitkernels.backends.common import canonical
from vitkernels.backends.reference import gradients, unfold
from vitkernels.testing import accuracy, oracle

# The oracle itself


@pytest.mark.parametrize("T", [0, 1, 3])
@pytest.mark.parametrize("whole", [True, False], ids=["T+N", "N"])
def test_oracle_is_what_models_do(T, whole):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Conv2d(3, 10, 4, 4)
            self.cls_token = nn.Parameter(torch.randn(1, T, 10))
            self.pos_embed = nn.Parameter(torch.randn(1, 6 + T * whole, 10))

        def forward(self, pixels):
            mean, std = torch.tensor([[0.5, 0.4, 0.3], [0.2, 0.3, 0.4]]).view(2, 3, 1, 1)
            x = self.proj((pixels / 255 - mean) / std).flatten(2).transpose(1, 2)
            if not whole:
                x = x + self.pos_embed
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
            return x + self.pos_embed if whole else x

    model = Model().double()
    pixels = torch.randint(0, 256, (2, 3, 8, 12))
    expected = oracle.oracle(
        images=pixels.to(torch.uint8), weight=model.proj.weight, bias=model.proj.bias, pos_embed=model.pos_embed,
        prefix=model.cls_token if T else None, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4),
    )  # fmt: skip
    torch.testing.assert_close(expected, model(pixels.double()))


def test_oracle_keeps_patches_in_their_order():
    images, weight, pos = images_of(2, 3, 8, 12), images_of(5, 3, 4, 4), images_of(7, 5)
    keep = torch.tensor([[5, 0, 0], [1, 2, 4]])
    every = oracle.oracle(images=images, weight=weight, pos_embed=pos, prefix=pos[:1])
    kept = oracle.oracle(images=images, weight=weight, pos_embed=pos, prefix=pos[:1], keep=keep)
    for b in range(2):
        assert torch.equal(kept[b, 1:], every[b, 1 + keep[b]])
    assert torch.equal(kept[:, :1], every[:, :1])


# Gradients


KEEP = torch.tensor([[0, 3, 3], [1, 2, 0]])
GRADCHECK = {
    "picture": dict(images=(2, 3, 8, 6), weight=(4, 3, 4, 3)),
    "video": dict(images=(2, 2, 4, 4, 6), weight=(3, 2, 2, 2, 3)),
    "keep": dict(images=(2, 1, 8, 8), weight=(3, 1, 4, 4), keep=KEEP, pos_embed=(1, 4, 3)),
    "keep, position and prefix per image": dict(
        images=(2, 1, 8, 8), weight=(3, 1, 4, 4), keep=KEEP, pos_embed=(2, 6, 3), prefix=(2, 2, 3)
    ),
    "keep nothing": dict(images=(2, 1, 8, 8), weight=(3, 1, 4, 4), keep=KEEP[:, :0], pos_embed=(5, 3), prefix=(1, 3)),
    "overlap": dict(images=(1, 2, 7, 8), weight=(3, 2, 4, 3), stride=(1, 2)),
    "overlap in time": dict(images=(1, 1, 4, 4, 4), weight=(2, 1, 3, 2, 2), stride=(1, 2, 1)),
    "apart": dict(images=(2, 2, 9, 8), weight=(3, 2, 2, 2), stride=(4, 3)),
    "padding": dict(images=(2, 2, 5, 6), weight=(3, 2, 4, 4), padding=(2, 1), mean=0.3, std=(0.5, 2.0)),
    "padding and overlap": dict(
        images=(1, 2, 5, 6), weight=(3, 2, 3, 3), stride=2, padding=2, scale=0.5, mean=(0.3, 0.4)
    ),
    "normalised": dict(images=(2, 3, 4, 4), weight=(4, 3, 2, 2), mean=(0.1, 0.2, 0.3), std=(0.5, 0.3, 2.0), scale=2.0),
    "position, whole": dict(images=(2, 1, 4, 4), weight=(3, 1, 2, 2), pos_embed=(6, 3), prefix=(2, 3)),
    "position, patches": dict(images=(2, 1, 4, 4), weight=(3, 1, 2, 2), pos_embed=(1, 4, 3), prefix=(1, 2, 3)),
    "position, per image": dict(images=(2, 1, 4, 4), weight=(3, 1, 2, 2), pos_embed=(2, 4, 3), prefix=(2, 2, 3)),
    "one image": dict(images=(1, 1, 4, 4), weight=(3, 1, 2, 2), pos_embed=(1, 5, 3), prefix=(1, 1, 3)),
}


@pytest.mark.parametrize("case", GRADCHECK.values(), ids=GRADCHECK)
def test_gradcheck(case):
    rest = {n: v for n, v in case.items() if n not in oracle.LEARNT}
    names = [n for n in oracle.LEARNT if n in case] + ["bias"]
    shapes = {**case, "bias": case["weight"][:1]}
    inputs = [images_of(*shapes[n], seed=i).requires_grad_() for i, n in enumerate(names)]
    assert torch.autograd.gradcheck(
        lambda *values: vk.patch_embed(**dict(zip(names, values, strict=True)), **rest, backend="reference"), inputs
    )


def test_what_cannot_be_checked_on_a_gpu_is_nan_and_has_no_gradient(monkeypatch):
    from vitkernels import ops
    from vitkernels.backends import common
    from vitkernels.problem import in_grid

    def unchecked(p, keep):  # as on a GPU, where looking at the values would wait for it
        outside = (keep < 0) | (keep >= p.N)
        return keep.masked_fill(outside, 0), outside

    monkeypatch.setattr(ops, "check_keep", lambda *_: None)
    for module in (reference, common):
        monkeypatch.setattr(module, "in_grid", unchecked)
    images, weight = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 4, 4, requires_grad=True)
    pos = torch.randn(4, 5, requires_grad=True)
    right = vk.patch_embed(images, weight, pos_embed=pos, keep=torch.tensor([[1, 3], [2, 0]]), backend="reference")
    wrong = vk.patch_embed(
        images, weight, pos_embed=pos, keep=torch.tensor([[1, 9, 3], [-1, 2, 0]]), backend="reference"
    )
    assert wrong.isnan().all(-1).tolist() == [[False, True, False], [True, False, False]]
    assert torch.equal(wrong[~wrong.isnan().all(-1)].view(2, 2, 5), right)
    ours = torch.autograd.grad(wrong, (weight, pos), torch.ones_like(wrong))
    theirs = torch.autograd.grad(right, (weight, pos), torch.ones_like(right))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))
    assert in_grid(vk.explain(images, weight).problem, None) == (None, None)


# What a GPU computes otherwise: products of halves summed in fp32, rows padded to 16 bytes, many images at once


ON_A_GPU = {
    "no images": dict(images=(0, 3, 32, 48), weight=(20, 3, 16, 16), rows=2 + 6),
    "P = 16": dict(images=(3, 3, 32, 48), weight=(20, 3, 16, 16), rows=2 + 6),
    "P = 14, rows padded": dict(images=(3, 3, 28, 42), weight=(24, 3, 14, 14), rows=6),
    "overlap and padding": dict(images=(2, 3, 20, 20), weight=(8, 3, 7, 7), stride=(4, 3), padding=(2, 3), rows=2 + 35),
    "keep": dict(images=(4, 3, 28, 28), weight=(8, 3, 14, 14), keep=((3, 1, 1),) * 4, rows=2 + 4),
}


def largest(t):
    return t.abs().max().item() if t.numel() else 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("at_once", [1, 10**9], ids=["one piece an image", "one piece"])
@pytest.mark.parametrize("name", ON_A_GPU)
def test_as_on_a_gpu(name, at_once, dtype, anew, monkeypatch):
    case = dict(ON_A_GPU[name])
    rows = case.pop("rows")
    call = {n: images_of(*case.pop(n), dtype=dtype, seed=i) for i, n in enumerate(("images", "weight"))}
    D = call["weight"].shape[0]
    call |= {"bias": images_of(D, dtype=dtype), "pos_embed": images_of(rows, D, dtype=dtype), **case}
    call["prefix"] = images_of(2, D, dtype=dtype, seed=3)
    if "keep" in call:
        call["keep"] = torch.tensor(call["keep"])
    call["weight"] = call["weight"] / 8
    real = accuracy.evaluate(lambda **kw: vk.patch_embed(**kw, backend="reference"), call)

    def multiplied(a, b, out):  # mm's out_dtype is a GPU's own
        seen.append((a.dtype, b.shape[1]))
        return a.to(out) @ b.to(out)

    seen = []
    p = replace(vk.explain(**call).problem, device=torch.device("cuda", 90))
    monkeypatch.setattr(gradients, "product", multiplied)
    monkeypatch.setattr(unfold, "GPU_BYTES", at_once)
    tensors = canonical(*(call.get(n) for n in ("images", "weight", "bias", "pos_embed", "prefix", "keep")))
    tokens = reference.forward(p, *tensors)
    exact = accuracy.evaluate(oracle.oracle, accuracy._doubled(call))
    limit = {torch.bfloat16: 2**-7, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(tokens.double(), exact["tokens"], rtol=0, atol=limit * largest(exact["tokens"]))
    grad = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(tokens.numel()))
    grads = tuple(torch.empty_like(t) for t in tensors[:5])
    reference.backward(p, grad.to(torch.bfloat16).to(dtype), *tensors, grads=grads)
    for found, what in zip(grads, ("images", "weight", "bias", "pos_embed", "prefix"), strict=True):
        ours = found.double().view(exact[what].shape)
        torch.testing.assert_close(ours, exact[what], rtol=0, atol=limit * largest(exact[what]), msg=what)
        assert found.view(real[what].shape).stride() == real[what].stride()
    if p.B:
        assert {d for d, _ in seen} == {dtype}
        assert p.K % 8 == 0 or dtype == torch.float32 or any(n == -(-p.K // 8) * 8 for _, n in seen)
