"""Every wrong input is an error with its numbers, before anything is launched or allocated."""

import re

import numpy as np
import pytest
import torch
from torch import zeros
from torch.utils._python_dispatch import TorchDispatchMode

import vitkernels as vk
from vitkernels import dispatch

# The right call: B=2, C=3, 8x12 pixels, patches of 4x4, N = 6, D = 5, T = 2.
RIGHT = dict(
    images=zeros(2, 3, 8, 12), weight=zeros(5, 3, 4, 4), bias=zeros(5), pos_embed=zeros(1, 8, 5), prefix=zeros(2, 5),
    keep=zeros(2, 4, dtype=torch.int64), mean=(0.5,) * 3, std=(0.5,) * 3,
)  # fmt: skip
VIDEO = dict(images=zeros(2, 3, 4, 8, 12), weight=zeros(5, 3, 2, 4, 4), pos_embed=zeros(1, 14, 5))
INT = torch.int64
ROWS = "pos_embed [1, 7, 5] has 7 rows; the grid 2x3 needs N = 6, or T+N = 8 with T = 2"

# What differs from the right call, the error, and what its message says.
WRONG = {
    # images
    "images: an array": (dict(images=np.zeros((2, 3, 8, 12))), TypeError, "images must be a torch.Tensor.*from_numpy"),
    "images: None": (dict(images=None), TypeError, "images must be a torch.Tensor, got NoneType"),
    "images: a list": (dict(images=[1.0]), TypeError, "images must be a torch.Tensor, got list"),
    "images: int64": (dict(images=zeros(2, 3, 8, 12, dtype=INT)), TypeError, "images.*int64.*[2, 3, 8, 12]"),
    "images: bool": (dict(images=zeros(2, 3, 8, 12) > 0), TypeError, "images.*torch.bool"),
    "images: complex": (dict(images=zeros(2, 3, 8, 12) * 1j), TypeError, "images.*complex64"),
    "images: sparse": (dict(images=zeros(2, 3, 8, 12).to_sparse()), TypeError, "images.*sparse_coo"),
    "images: no batch": (dict(images=zeros(3, 8, 12)), ValueError, "[B,C,H,W].*3 dimensions [3, 8, 12].*images[None]"),
    "images: five dimensions": (
        dict(images=zeros(2, 3, 1, 8, 12)),
        ValueError,
        "images.*5 dimensions [2, 3, 1, 8, 12]",
    ),
    "images: channels": (dict(images=zeros(2, 4, 8, 12)), ValueError, "4 channels, weight [5, 3, 4, 4] takes 3"),
    "images: channels-last shape": (
        dict(images=zeros(2, 8, 12, 3)),
        ValueError,
        "images have 8 channels.*takes 3; if these are [B,H,W,C], pass images.permute(0, 3, 1, 2)",
    ),
    "images: frames first": (
        VIDEO | dict(images=zeros(2, 4, 3, 8, 12)),
        ValueError,
        "4 channels.*[B,F,C,H,W], pass images.transpose(1, 2)",
    ),
    "images: video, channels last": (
        VIDEO | dict(images=zeros(2, 4, 8, 12, 3)),
        ValueError,
        "4 channels.*[B,F,H,W,C], pass images.permute(0, 4, 1, 2, 3)",
    ),
    "images: too low": (dict(images=zeros(2, 3, 3, 12)), ValueError, "images of 3x12.*patch 4x4: 3 < 4"),
    "images: too narrow": (dict(images=zeros(2, 3, 8, 1)), ValueError, "images of 8x1.*patch 4x4: 1 < 4"),
    "images: too small with padding": (dict(images=zeros(2, 3, 1, 8), padding=1), ValueError, "padding (1, 1).*3 < 4"),
    "images: no pixels": (dict(images=zeros(2, 3, 0, 12), padding=4), ValueError, "images.*empty.*[3, 0, 12]"),
    "images: no channels": (dict(images=zeros(2, 0, 8, 8), weight=zeros(5, 0, 4, 4)), ValueError, "empty.*0"),
    # weight
    "weight: an array": (dict(weight=np.zeros((5, 3, 4, 4))), TypeError, "weight must be a torch.Tensor.*ndarray"),
    "weight: uint8": (dict(weight=zeros(5, 3, 4, 4).byte()), TypeError, "weight.*torch.uint8"),
    "weight: a matrix": (dict(weight=zeros(5, 48)), ValueError, "weight must be [D,C,P_h,P_w].*[5, 48]"),
    "weight: six dimensions": (dict(weight=zeros(5, 3, 1, 1, 4, 4)), ValueError, "weight.*[5, 3, 1, 1, 4, 4]"),
    "weight: no patch": (dict(weight=zeros(5, 3, 0, 4), stride=4), ValueError, "weight.*empty.*[5, 3, 0, 4]"),
    "weight: D = 0": (dict(weight=zeros(0, 3, 4, 4)), ValueError, "weight.*empty.*[0, 3, 4, 4]"),
    "weight: on another device": (dict(weight=zeros(5, 3, 4, 4, device="meta")), ValueError, "weight is on meta.*cpu"),
    # bias
    "bias: a number": (dict(bias=0.0), TypeError, "bias must be a torch.Tensor, got float"),
    "bias: length": (dict(bias=zeros(4)), ValueError, "bias must be [D] = [5], got [4]"),
    "bias: two dimensions": (dict(bias=zeros(1, 5)), ValueError, "bias.*[5].*[1, 5]"),
    "bias: int": (dict(bias=zeros(5, dtype=INT)), TypeError, "bias.*int64"),
    "bias: on another device": (dict(bias=zeros(5, device="meta")), ValueError, "bias is on meta"),
    # pos_embed
    "pos_embed: rows": (dict(pos_embed=zeros(1, 7, 5)), ValueError, ROWS),
    "pos_embed: width": (dict(pos_embed=zeros(1, 8, 4)), ValueError, "pos_embed.*D = 5.*[1, 8, 4]"),
    "pos_embed: images": (dict(pos_embed=zeros(3, 8, 5)), ValueError, "pos_embed.*B = 2.*[3, 8, 5]"),
    "pos_embed: a vector": (dict(pos_embed=zeros(5)), ValueError, "pos_embed.*got [5]"),
    "pos_embed: a grid": (dict(pos_embed=zeros(1, 2, 3, 5)), ValueError, "pos_embed.*[1, 2, 3, 5]"),
    "pos_embed: N_keep rows": (dict(pos_embed=zeros(4, 5)), ValueError, "pos_embed.*4 rows.*N = 6"),
    "pos_embed: none": (dict(pos_embed=zeros(0, 5)), ValueError, "pos_embed [0, 5] has 0 rows"),
    "pos_embed: complex": (dict(pos_embed=zeros(1, 8, 5) * 1j), TypeError, "pos_embed.*complex64"),
    # prefix
    "prefix: width": (dict(prefix=zeros(2, 6)), ValueError, "prefix.*D = 5.*[2, 6]"),
    "prefix: images": (dict(prefix=zeros(3, 2, 5)), ValueError, "prefix.*B = 2.*[3, 2, 5]"),
    "prefix: a vector": (dict(prefix=zeros(5)), ValueError, "prefix.*got [5]"),
    "prefix: int": (dict(prefix=zeros(2, 5, dtype=INT)), TypeError, "prefix.*int64"),
    # keep
    "keep: a list": (dict(keep=[[0], [1]]), TypeError, "keep must be a torch.Tensor, got list"),
    "keep: float": (dict(keep=zeros(2, 4)), TypeError, "keep.*float32"),
    "keep: a mask": (dict(keep=zeros(2, 6) > 0), TypeError, "keep.*torch.bool"),
    "keep: a vector": (dict(keep=zeros(4, dtype=INT)), ValueError, "keep must be [B,N_keep] with B = 2, got [4]"),
    "keep: images": (dict(keep=zeros(3, 4, dtype=INT)), ValueError, "keep.*B = 2.*[3, 4]"),
    "keep: one list for all": (dict(keep=zeros(1, 4, dtype=INT)), ValueError, "keep.*B = 2.*[1, 4]"),
    # stride, padding
    "stride: 0": (dict(stride=0), ValueError, "stride must be at least 1, got 0"),
    "stride: negative": (dict(stride=(4, -4)), ValueError, "stride.*at least 1.*(4, -4)"),
    "stride: past 32 bits": (dict(stride=2**70), ValueError, "stride must be below 2147483648"),
    "stride: a float": (dict(stride=2.0), TypeError, "stride must be an int or 2 ints, got 2.0"),
    "stride: three for a picture": (dict(stride=(1, 2, 2)), ValueError, "stride.*2 ints, got 3: (1, 2, 2)"),
    "stride: one in a tuple": (dict(stride=(2,)), ValueError, "stride.*2 ints, got 1"),
    "stride: two for a video": (dict(VIDEO, stride=(2, 2)), ValueError, "stride.*3 ints, got 2"),
    "stride: a word": (dict(stride="same"), TypeError, "stride.*'same'"),
    "padding: a word": (dict(padding="same"), TypeError, "padding.*'same'"),
    "padding: None": (dict(padding=None), TypeError, "padding.*None"),
    "padding: negative": (dict(padding=-1), ValueError, "padding must be at least 0, got -1"),
    "padding: a float": (dict(padding=(1, 0.5)), TypeError, "padding.*(1, 0.5)"),
    # mean, std, scale
    "mean: two for three": (dict(mean=(0.5, 0.5)), ValueError, "mean must have one.*: got 2 for 3 channels"),
    "mean: none": (dict(mean=()), ValueError, "mean.*got 0 for 3"),
    "mean: a word": (dict(mean="imagenet"), TypeError, "mean.*'imagenet'"),
    "mean: NaN": (dict(mean=(0.5, float("nan"), 0.5)), ValueError, "mean must be finite, got (0.5, nan, 0.5)"),
    "mean: infinite": (dict(mean=float("inf")), ValueError, "mean must be finite.*inf"),
    "std: 0": (dict(std=(1, 0, 1)), ValueError, "std must be finite and above 0, got (1.0, 0.0, 1.0)"),
    "std: negative": (dict(std=-1), ValueError, "std.*above 0.*-1"),
    "std: four for three": (dict(std=(1,) * 4), ValueError, "std.*got 4 for 3 channels"),
    "scale: infinite": (dict(scale=float("inf")), ValueError, "scale must be finite and not 0, got inf"),
    "scale: NaN": (dict(scale=float("nan")), ValueError, "scale.*nan"),
    "scale: 0": (dict(scale=0), ValueError, "scale.*not 0, got 0"),
    "scale: per channel": (dict(scale=(1, 1, 1)), TypeError, "scale must be a number, got tuple (1, 1, 1)"),
    "scale: True": (dict(scale=True), TypeError, "scale.*bool True"),
    "scale: a tensor": (dict(scale=torch.tensor(2.0)), TypeError, "scale.*Tensor"),
    # out_dtype, backend
    "out_dtype: int": (dict(out_dtype=INT), TypeError, "out_dtype.*torch.int64"),
    "out_dtype: a word": (dict(out_dtype="float32"), TypeError, "out_dtype.*'float32'"),
    "backend: unknown": (dict(backend="cudnn"), ValueError, "one of auto, triton, cuda, reference; got 'cudnn'"),
    "backend: None": (dict(backend=None), ValueError, "backend.*None"),
    "backend: a list": (dict(backend=["triton"]), ValueError, "backend.*['triton']"),
    # videos
    "video: weight of pictures": (dict(images=VIDEO["images"]), ValueError, "[B,C,H,W].*5 dimensions [2, 3, 4, 8, 12]"),
    "video: no batch": (dict(VIDEO, images=zeros(3, 4, 8, 12)), ValueError, "images.*[B,C,F,H,W].*4 dimensions"),
    "video: too short": (dict(VIDEO, images=zeros(2, 3, 1, 8, 12)), ValueError, "images of 1x8x12.*2x4x4: 1 < 2"),
    "video: rows": (dict(VIDEO, pos_embed=zeros(6, 5)), ValueError, "6 rows; the grid 2x2x3 needs N = 12, or T+N = 14"),
}


class Nothing(TorchDispatchMode):
    """No operation runs."""

    allowed = ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func in self.allowed, f"{func} ran"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def untouched(monkeypatch):
    """No backend is reached."""

    def reached(*args):
        raise AssertionError("a backend was reached")

    for name in dispatch.MODULES:
        monkeypatch.setattr(dispatch.backend(name), "forward", reached)


def pattern(message):
    """A regular expression in which only `.*` means something."""
    return ".*".join(re.escape(part) for part in message.split(".*"))


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("call", [vk.patch_embed, vk.explain])
@pytest.mark.parametrize("name", WRONG)
def test_wrong(name, call):
    change, error, message = WRONG[name]
    with Nothing(), pytest.raises(error, match=pattern(message)) as raised:
        call(**RIGHT | change)
    assert type(raised.value) is error
    assert "\n" not in str(raised.value)


def test_the_right_call_is_right():
    assert vk.patch_embed(**RIGHT).shape == (2, 6, 5)
    assert vk.patch_embed(**RIGHT | VIDEO).shape == (2, 6, 5)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("backend", ["auto", *dispatch.MODULES])
def test_indices_out_of_range_are_read_and_nothing_else(backend):
    keep = torch.tensor([[0, 1], [2, 6]])
    read = Nothing()
    aten = torch.ops.aten
    read.allowed = (torch.ops.vitkernels.patch_embed.default, aten.aminmax.default, aten._local_scalar_dense.default)
    with read, pytest.raises(ValueError, match=re.escape("keep must hold patch indices 0..5, got 0..6")):
        vk.patch_embed(**RIGHT | dict(keep=keep, backend=backend))


@pytest.mark.usefixtures("untouched")
def test_a_named_backend_that_cannot_says_why():
    read = Nothing()
    read.allowed = (torch.ops.vitkernels.patch_embed.default,)
    right = {n: v for n, v in RIGHT.items() if n != "keep"}  # whose values are read first
    reasons = vk.explain(**right)["cuda"]
    assert reasons
    message = r"backend 'cuda' can't take this problem \(B=2 C=3 8x12"
    with read, pytest.raises(NotImplementedError, match=message) as raised:
        vk.patch_embed(**right, backend="cuda")
    for reason in reasons:
        assert reason in str(raised.value)


def test_wrong_backends_do_not_replace_each_other(monkeypatch):
    monkeypatch.setattr(dispatch.backend("reference"), "why_not", lambda p: ["no reference", f"not for D = {p.D}"])
    with pytest.raises(NotImplementedError, match="no reference; not for D = 7"):
        vk.patch_embed(zeros(1, 3, 8, 8), zeros(7, 3, 4, 4), backend="reference")
