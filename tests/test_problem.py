"""Sizes, defaults, strings and the cache of problems."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vitkernels.problem import arguments_of, check_keep, problem_of
from vitkernels.testing import oracle, random_problems


def build(images, weight, bias=None, pos_embed=None, prefix=None, keep=None, *, stride=None, padding=0, mean=None,
          std=None, scale=None, out_dtype=None):  # fmt: skip
    arguments = arguments_of(images, weight, stride, padding, mean, std, scale, out_dtype)
    return problem_of(images, weight, bias, pos_embed, prefix, keep, arguments)


@pytest.mark.parametrize("seed", range(0, 500, 5))
def test_sizes_are_those_of_the_convolution(seed):
    t = random_problems.case(seed).tensors()
    p = build(**t)
    x = t["images"].double()
    convolution = F.conv3d if p.video else F.conv2d
    stride = t["weight"].shape[2:] if t["stride"] is None else t["stride"]
    grid = convolution(x, t["weight"].double(), None, stride, t["padding"]).shape[2:]
    assert p.G == (*(() if p.video else (1,)), *grid)
    assert grid.numel() == p.N
    assert t["weight"][0].numel() == p.K
    assert p.out_shape == tuple(oracle.eager(**t).shape)
    assert p.flops == 2 * p.B * p.rows * p.K * p.D


@pytest.mark.parametrize("seed", range(20))
def test_the_same_metadata_is_the_same_problem(seed):
    case = random_problems.case(seed)
    p = build(**case.tensors())
    assert build(**case.tensors()) is p
    other = torch.float32 if case.weight_dtype == torch.float64 else torch.float64
    assert build(**dataclasses.replace(case, weight_dtype=other).tensors()) is not p


def test_strides_are_the_problems():
    images, weight = torch.zeros(2, 3, 8, 8), torch.zeros(4, 3, 4, 4)
    p, q = build(images, weight), build(images.to(memory_format=torch.channels_last), weight)
    assert p is not q
    assert p.image_strides == (192, 64, 0, 8, 1)
    assert q.image_strides == (192, 1, 0, 24, 3)


IMAGES = {dtype: torch.zeros(2, 3, 8, 8).to(dtype) for dtype in (torch.uint8, torch.float16, torch.float64)}


def test_defaults():
    p = build(IMAGES[torch.uint8], torch.zeros(4, 3, 4, 2))
    assert (p.P, p.S, p.pad, p.scale, p.T, p.rows) == ((1, 4, 2), (1, 4, 2), (0, 0, 0), 1 / 255, 0, 8)
    assert (p.compute_dtype, p.out_dtype, p.normalised) == (torch.float32, torch.float32, False)
    p = build(IMAGES[torch.float16], torch.zeros(4, 3, 4, 4, dtype=torch.bfloat16))
    assert (p.scale, p.compute_dtype, p.out_dtype) == (1.0, torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_gives_the_dtype(dtype):
    with torch.autocast("cpu", dtype):
        p = build(IMAGES[torch.uint8], torch.zeros(4, 3, 4, 4))
        q = build(IMAGES[torch.uint8], torch.zeros(4, 3, 4, 4), out_dtype=torch.float32)
    assert (p.weight_dtype, p.compute_dtype, p.out_dtype) == (torch.float32, dtype, dtype)
    assert (q.compute_dtype, q.out_dtype) == (dtype, torch.float32)


@pytest.mark.parametrize(
    "mean",
    [0.5, [0.5] * 3, (0.5, 0.5, 0.5), torch.tensor(0.5), torch.full((3,), 0.5), np.full(3, 0.5), np.float32(0.5),
     [np.float32(0.5)] * 3, [0.5]],
)  # fmt: skip
def test_forms_of_mean(mean):
    assert build(IMAGES[torch.uint8], torch.zeros(4, 3, 4, 4), mean=mean).mean == (0.5,) * 3


@pytest.mark.parametrize("stride", [2, (2, 2), [2, 2], torch.Size((2, 2)), np.int64(2)])
def test_forms_of_stride(stride):
    assert build(IMAGES[torch.uint8], torch.zeros(4, 3, 4, 4), stride=stride).S == (1, 2, 2)


def test_normalisation():
    p = build(IMAGES[torch.uint8], torch.zeros(4, 3, 4, 4), mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2))
    m, a = p.centred
    slope, intercept = p.affine
    for c, (mean, std) in enumerate(zip((0.1, 0.2, 0.3), (0.5, 0.25, 2), strict=True)):
        assert (100 - m[c]) * a[c] == pytest.approx((100 / 255 - mean) / std)
        assert 100 * slope[c] + intercept[c] == pytest.approx((100 / 255 - mean) / std)


def test_traffic():
    weight, keep = torch.zeros(4, 3, 4, 4), torch.zeros(2, 1, dtype=torch.int64)
    assert build(IMAGES[torch.uint8], weight).bytes == 2 * 3 * 64 + 4 * 48 * 4 + 2 * 4 * 4 * 4
    assert build(IMAGES[torch.uint8], weight, keep=keep).bytes == 2 * 48 + 4 * 48 * 4 + 2 * 4 * 4


def test_prints_as_one_line_with_its_sizes():
    line = str(build(torch.zeros(2, 3, 4, 8, 8), torch.zeros(5, 3, 2, 4, 4), prefix=torch.zeros(1, 5)))
    assert line == "B=2 C=3 4x8x8 patch 2x4x4 D=5 T=1 float32 -> float32"


@pytest.mark.parametrize(("values", "ok"), [([0, 3], True), ([3, 3], True), ([-1, 0], False), ([0, 4], False)])
def test_keep_is_checked_on_the_cpu(values, ok):
    keep = torch.tensor([values, [0, 0]])
    p = build(IMAGES[torch.uint8], torch.zeros(4, 3, 4, 4), keep=keep)
    if ok:
        check_keep(p, keep)
    else:
        with pytest.raises(ValueError, match=rf"0\.\.3, got {min(values)}\.\.{max(values)}"):
            check_keep(p, keep)
