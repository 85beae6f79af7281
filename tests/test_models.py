"""vk.ViT against vit_pytorch's ViT, and without its patch norms."""

import copy
import pickle

import pytest
import torch
from torch import nn

import vitkernels as vk

SIZES = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 32, "depth": 2, "heads": 2, "mlp_dim": 48}


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.numel():
            nn.init.normal_(parameter, std=0.5)
    return model


def close(a, b, tolerance=2e-5):
    assert a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


AGAINST = {
    "cls": ({}, (32, 32)),
    "mean": ({"pool": "mean"}, (32, 32)),
    "no head": ({"num_classes": 0}, (32, 32)),
    "not square": ({"image_size": (32, 16), "patch_size": (4, 8)}, (32, 16)),
    "one head of its own width": ({"heads": 1, "dim_head": 32, "channels": 1}, (32, 32)),
    "a smaller image": ({}, (16, 32)),
}


@pytest.mark.parametrize("case", AGAINST)
def test_is_vit_pytorchs(case):
    vit_pytorch = pytest.importorskip("vit_pytorch")
    kwargs, size = AGAINST[case]
    kwargs = {**SIZES, **kwargs}
    theirs, ours = randomised(vit_pytorch.ViT(**kwargs)), vk.ViT(**kwargs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    images = torch.randn(3, kwargs.get("channels", 3), *size)
    out, expected = ours(images), theirs(images)
    close(out, expected)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if kwargs["num_classes"] or a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_same_seed_same_model():
    vit_pytorch = pytest.importorskip("vit_pytorch")
    states = []
    for cls in (vk.ViT, vit_pytorch.ViT):
        torch.manual_seed(0)
        states.append(cls(**SIZES).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


def test_slots_work_by_themselves():
    """vit_pytorch's wrappers (MAE, SimMIM) call to_patch_embedding[0] and [1:]."""
    model = randomised(vk.ViT(**SIZES))
    slots, images = model.to_patch_embedding, torch.randn(2, 3, 32, 32)
    tokens = slots[1:](slots[0](images))
    close(model.patch_embed(images), torch.cat([model.cls_token.expand(2, 1, -1), tokens], 1) + model.pos_embedding)


@pytest.mark.parametrize("patch_norm", [True, False])
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_parts_compose(patch_norm, pool):
    model = randomised(vk.ViT(**SIZES, patch_norm=patch_norm, pool=pool, dropout=0.2, emb_dropout=0.3)).train()
    images = torch.randn(2, 3, 32, 32)
    torch.manual_seed(3)
    whole = model(images)
    torch.manual_seed(3)
    close(model.head(model.transformer(model.patch_embed(images))), whole, 0)
    assert (model.patch_embed(images) == 0).float().mean() > 0.1  # dropped out
    model.eval()
    close(model(images), model(images), 0)


@pytest.mark.parametrize("pixels", [torch.uint8, torch.float32])
def test_front_end_without_norms(pixels):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    model = randomised(vk.ViT(**SIZES, patch_norm=False, mean=mean, std=std)).eval()
    assert isinstance(model.to_patch_embedding[1], nn.Identity)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    images = images if pixels == torch.uint8 else images / 255
    x = images / 255 if pixels == torch.uint8 else images
    x = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    tokens = model.to_patch_embedding(x)  # the slots, one after the other, without vk.patch_embed
    expected = torch.cat([model.cls_token.expand(2, 1, -1), tokens], 1) + model.pos_embedding
    close(model.patch_embed(images), expected, 1e-4)


def test_normed_front_end_takes_uint8():
    model = randomised(vk.ViT(**SIZES, mean=0.5, std=0.25)).eval()
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    close(model(images), model(images / 255), 1e-4)


@pytest.mark.parametrize("patch_norm", [True, False])
def test_compile_copies_autocast(patch_norm):
    model = randomised(vk.ViT(**SIZES, patch_norm=patch_norm)).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    close(torch.compile(model, fullgraph=True, backend="aot_eager")(images), expected)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(other(images), expected, 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.patch_embed(images).dtype == torch.float32  # the eager stream: an fp32 table was added
    assert model.bfloat16()(images).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"image_size": 30}, "8x8 do not fill images of 30x30"),
        ({"pool": "max"}, "'max'"),
        ({"backend": "tpu"}, "tpu"),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        vk.ViT(**{**SIZES, **kwargs})


@pytest.mark.parametrize("patch_norm", [True, False])
@pytest.mark.parametrize(("size", "message"), [((32, 30), "32x30"), ((64, 32), "32, T|32 rows|N = 32")])
def test_wrong_images(patch_norm, size, message):
    with pytest.raises(ValueError, match=message):
        vk.ViT(**SIZES, patch_norm=patch_norm)(torch.randn(1, 3, *size))
