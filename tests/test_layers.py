"""vk.PatchEmbed: timm's names and checkpoints, what is its own, and its errors."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vitkernels as vk
from vitkernels.layers import normalised, normed_patch_embed, with_position

D = 24


def layer(**kwargs) -> vk.PatchEmbed:
    torch.manual_seed(0)
    return vk.PatchEmbed(**{"img_size": 16, "patch_size": 4, "embed_dim": D, **kwargs})


def close(a, b, tolerance=1e-5):
    assert a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


AGAINST_TIMM = {
    "plain": ({}, (16, 16)),
    "floors": ({"img_size": (17, 18)}, (17, 18)),
    "one channel, no bias": ({"in_chans": 1, "bias": False}, (16, 16)),
    "not square": ({"img_size": (8, 20), "patch_size": (4, 5)}, (8, 20)),
    "norm": ({"norm_layer": nn.LayerNorm}, (16, 16)),
    "not flat": ({"flatten": False}, (16, 16)),
    "NHWC": ({"output_fmt": "NHWC", "norm_layer": nn.LayerNorm}, (16, 16)),
    "NCHW": ({"output_fmt": "NCHW"}, (16, 16)),
    "NCL": ({"output_fmt": "NCL"}, (16, 16)),
    "NLC": ({"output_fmt": "NLC"}, (16, 16)),
    "any size": ({"img_size": None}, (9, 15)),
    "not strict": ({"strict_img_size": False}, (8, 24)),
    "padded": ({"strict_img_size": False, "dynamic_img_pad": True}, (9, 3)),
}


@pytest.mark.parametrize("case", AGAINST_TIMM)
def test_is_timms(case):
    timm_layers = pytest.importorskip("timm.layers")
    kwargs, size = AGAINST_TIMM[case]
    theirs = timm_layers.PatchEmbed(**{"img_size": 16, "patch_size": 4, "embed_dim": D, **kwargs})
    ours = layer(**kwargs)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, kwargs.get("in_chans", 3), *size)
    close(ours(images), theirs(images))
    for name in ("img_size", "patch_size", "grid_size", "num_patches", "flatten", "output_fmt", "strict_img_size"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.feat_ratio() == theirs.feat_ratio()
    assert ours.feat_ratio(as_scalar=False) == theirs.feat_ratio(as_scalar=False)
    assert ours.dynamic_feat_size(size) == theirs.dynamic_feat_size(size)


@pytest.mark.parametrize("new", [{"img_size": (24, 8)}, {"patch_size": 8}, {"img_size": 20, "patch_size": (2, 5)}])
def test_set_input_size_is_timms(new):
    timm_layers = pytest.importorskip("timm.layers")
    ours, theirs = layer(), timm_layers.PatchEmbed(img_size=16, patch_size=4, embed_dim=D)
    theirs.load_state_dict(ours.state_dict())
    ours.proj.bias.requires_grad_(False)
    for each in (ours, theirs):
        each.set_input_size(**new)
    assert (ours.img_size, ours.grid_size, ours.patch_size) == (theirs.img_size, theirs.grid_size, theirs.patch_size)
    assert [p.requires_grad for p in ours.proj.parameters()] == [True, False]
    images = torch.randn(2, 3, *ours.img_size)
    close(ours(images), theirs(images), 1e-4)


MEAN, STD = (0.48, 0.45, 0.4), torch.tensor([0.22, 0.23, 0.24])


@pytest.mark.parametrize("norm_layer", [None, nn.LayerNorm])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("rows", ["N", "T+N", None])
def test_overlap_padding_pixels_prefix_position_keep(norm_layer, kept, rows):
    pe = layer(img_size=(16, 14), stride=2, padding=1, mean=MEAN, std=STD, norm_layer=norm_layer)
    assert pe.grid_size == (8, 7)
    images = torch.randint(256, (2, 3, 16, 14), dtype=torch.uint8)
    keep = torch.tensor([[3, 55, 0], [54, 3, 7]]) if kept else None
    prefix = torch.randn(1, 2, D, requires_grad=True)
    pos = None if rows is None else torch.randn({"N": 56, "T+N": 58}[rows], D, requires_grad=True)
    out = pe(images, pos_embed=pos, prefix=prefix, keep=keep)

    x = (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / STD.view(3, 1, 1)
    x = pe.norm(pe.proj(x).flatten(2).mT)
    x = x if pos is None else x + pos[-56:]
    x = x if keep is None else torch.stack([image[k] for image, k in zip(x, keep, strict=True)])
    head = prefix + pos[:2] if rows == "T+N" else prefix
    expected = torch.cat([head.expand(2, -1, -1), x], 1)
    close(out, expected)
    tensors = [t for t in (prefix, pos, *pe.parameters()) if t is not None]
    grad = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, tensors, grad), torch.autograd.grad(expected, tensors, grad), strict=True):
        close(a, b, 1e-4)


def test_dynamic_pad_is_zero_after_normalisation():
    pe = layer(strict_img_size=False, dynamic_img_pad=True, mean=MEAN, std=STD)
    images = torch.randint(256, (2, 3, 15, 18), dtype=torch.uint8)
    x = (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / STD.view(3, 1, 1)
    close(pe(images), pe.proj(F.pad(x, (0, 2, 0, 1))).flatten(2).mT)
    assert pe.dynamic_feat_size((15, 18)) == (4, 5)


def test_autocast_compile_copies():
    pe = layer(mean=MEAN, std=STD)
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        assert pe(images).dtype == torch.bfloat16
    expected = pe(images, prefix=pe.proj.bias[None])
    stored = io.BytesIO()
    torch.save(pe, stored)
    stored.seek(0)
    for other in (copy.deepcopy(pe), torch.load(stored, weights_only=False)):
        close(other(images, prefix=other.proj.bias[None]), expected, 0)
    compiled = torch.compile(pe, fullgraph=True, backend="aot_eager")
    close(compiled(images, prefix=pe.proj.bias[None]), expected)


def test_in_bfloat16_on_any_pixels():
    pe = layer(dtype=torch.bfloat16, norm_layer=nn.LayerNorm)
    assert pe.norm.weight.dtype == torch.bfloat16
    assert pe(torch.randn(2, 3, 16, 16)).dtype == torch.bfloat16


WRONG = {
    "size": ({}, (2, 3, 16, 20), "images are 16x20, this layer takes 16x16"),
    "not whole": ({"strict_img_size": False}, (2, 3, 16, 19), "lack 0 rows and 1 columns"),
    "dimensions": ({}, (3, 16, 16), r"\[3, 16, 16\]"),
    "channels": ({}, (2, 4, 16, 16), "4 channels"),
    "small": ({"img_size": None}, (2, 3, 3, 16), "3x16"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_images(case):
    kwargs, shape, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        layer(**kwargs)(torch.randn(shape))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"backend": "tpu"}, "tpu"),
        ({"output_fmt": "CHWN"}, "CHWN"),
        ({"patch_size": (4, 4, 4)}, r"patch_size .*\(4, 4, 4\)"),
        ({"stride": 0}, "stride .*0"),
        ({"img_size": 3}, r"\(3, 3\) is smaller than the patch \(4, 4\)"),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        layer(**kwargs)


def test_sequences_only_with_prefix():
    with pytest.raises(ValueError, match="it is NHWC"):
        layer(output_fmt="NHWC")(torch.randn(1, 3, 16, 16), prefix=torch.randn(1, D))


def test_position_of_another_grid():
    with pytest.raises(ValueError, match=r"\[15, 24\].*16.*17"):
        with_position(torch.randn(2, 16, D), torch.randn(15, D), torch.randn(1, D))


def test_a_wrapped_projection_is_not_passed_by():
    pe = layer()
    pe.proj.register_forward_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match="proj has hooks"):
        pe(torch.randn(1, 3, 16, 16))


def test_a_projection_padded_by_name_is_not_passed_by():
    layer = vk.PatchEmbed(8, 3, embed_dim=4, stride=1)
    layer.proj = torch.nn.Conv2d(3, 4, 3, padding="same")
    with pytest.raises(NotImplementedError, match="padding 'same' of mode 'zeros'"):
        layer(torch.zeros(1, 3, 8, 8))


def test_normed_patches_read_y_x_c():
    torch.manual_seed(0)
    before, linear, after = nn.LayerNorm(24), nn.Linear(24, D), nn.LayerNorm(D)
    for parameter in (*before.parameters(), *after.parameters()):
        nn.init.normal_(parameter)
    images = torch.randn(2, 3, 8, 6)
    patches = [images[:, :, y : y + 4, x : x + 2].permute(0, 2, 3, 1).flatten(1) for y in (0, 4) for x in (0, 2, 4)]
    prefix, pos = torch.randn(1, D), torch.randn(7, D)
    tokens = normed_patch_embed(images, before, linear, after, (4, 2), prefix=prefix, pos_embed=pos)
    expected = after(linear(before(torch.stack(patches, 1))))
    close(tokens, torch.cat([prefix.expand(2, 1, D), expected], 1) + pos)


def test_normalised_counts_in_fp32():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    close(normalised(images, torch.bfloat16, (0.5,), (0.25,)), ((images / 255 - 0.5) / 0.25).bfloat16(), 1e-4)
