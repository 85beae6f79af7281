"""Small models of every library that `vk.fuse` knows, and how their results are compared."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


def timm(**kwargs):
    module = pytest.importorskip("timm.models.vision_transformer")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    return module.VisionTransformer(**{**sizes, **kwargs})


def eva(**kwargs):
    module = pytest.importorskip("timm.models.eva")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    return module.Eva(**{**sizes, "use_rot_pos_emb": True, "ref_feat_shape": (4, 4), **kwargs})


def beit(**kwargs):
    module = pytest.importorskip("timm.models.beit")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    return module.Beit(**{**sizes, "use_abs_pos_emb": True, "use_rel_pos_bias": True, **kwargs})


def clip(**kwargs):
    module = pytest.importorskip("transformers")
    return module.CLIPVisionModel(module.CLIPVisionConfig(**{**HF, "image_size": 32, **kwargs}))


def transformers(name="ViTForImageClassification", **kwargs):
    module = pytest.importorskip("transformers")
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = module.ViTConfig(**{**sizes, "intermediate_size": 48, "num_labels": 5, "encoder_stride": 8, **kwargs})
    return getattr(module, name)(config)


HF = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "patch_size": 8}
HF_DECODER = {
    "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 24,
}  # fmt: skip


def mae(name="ViTMAEModel", **kwargs):
    module = pytest.importorskip("transformers")
    return getattr(module, name)(module.ViTMAEConfig(**{**HF, **HF_DECODER, "image_size": 32, **kwargs}))


def videomae(name="VideoMAEModel", **kwargs):
    module = pytest.importorskip("transformers")
    sizes = {"image_size": 16, "num_frames": 4, "num_labels": 5}
    return getattr(module, name)(module.VideoMAEConfig(**{**HF, **HF_DECODER, **sizes, **kwargs}))


def torchvision(**kwargs):
    module = pytest.importorskip("torchvision.models.vision_transformer")
    return module.VisionTransformer(32, 8, 2, 2, 32, 48, **{"num_classes": 5, **kwargs})


def vit_pytorch(**kwargs):
    module = pytest.importorskip("vit_pytorch")
    sizes = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 32, "depth": 2, "heads": 2, "mlp_dim": 48}
    return module.ViT(**{**sizes, **kwargs})


def timm_embed(**kwargs):
    return partial(pytest.importorskip("timm.layers").PatchEmbed, **kwargs)


NO_CLASS = {"class_token": False, "global_pool": "avg"}
MASK = torch.arange(32).view(2, 16) % 3 == 0
NOISE = torch.rand(2, 16, generator=torch.Generator().manual_seed(3))
HIDDEN = torch.tensor([[1, 0, 0, 1, 1, 0, 1, 1], [1, 1, 0, 1, 0, 1, 0, 1]]).bool()  # other patches, as many in each
# library, arguments of the model, size of the image, arguments of the call
CASES = {
    "timm": (timm, {}, (3, 32, 32), {}),
    "timm registers": (timm, {"reg_tokens": 2}, (3, 32, 32), {}),
    "timm registers alone": (timm, {**NO_CLASS, "reg_tokens": 2}, (3, 32, 32), {}),
    "timm no prefix": (timm, NO_CLASS, (3, 32, 32), {}),
    "timm position of patches": (timm, {"no_embed_class": True, "reg_tokens": 2}, (3, 32, 32), {}),
    "timm no position": (timm, {"pos_embed": "none"}, (3, 32, 32), {}),
    "timm norm before": (timm, {"pre_norm": True}, (3, 32, 32), {}),
    "timm not square": (timm, {"img_size": (16, 40), "in_chans": 1}, (1, 16, 40), {}),
    "timm dynamic": (timm, {"dynamic_img_size": True, "reg_tokens": 1}, (3, 40, 16), {}),
    "timm dynamic, patches": (timm, {"dynamic_img_size": True, "no_embed_class": True}, (3, 40, 16), {}),
    "timm dynamic, as built": (timm, {"dynamic_img_size": True}, (3, 32, 32), {}),
    "timm dynamic, no position": (timm, {"dynamic_img_size": True, "pos_embed": "none"}, (3, 40, 16), {}),
    "timm padded": (timm, {"dynamic_img_size": True, "dynamic_img_pad": True}, (3, 37, 9), {}),
    "timm causal": (timm, {}, (3, 32, 32), {"is_causal": True}),
    "eva": (eva, {}, (3, 32, 32), {}),
    "eva registers": (eva, {"num_reg_tokens": 2, "no_embed_class": True}, (3, 32, 32), {}),
    "eva dynamic": (eva, {"dynamic_img_size": True}, (3, 40, 16), {}),
    "eva no position": (eva, {"use_abs_pos_emb": False, "class_token": False, "global_pool": "avg"}, (3, 32, 32), {}),
    "beit": (beit, {}, (3, 32, 32), {}),
    "beit no position": (beit, {"use_abs_pos_emb": False, "in_chans": 1}, (1, 32, 32), {}),
    "clip": (clip, {}, (3, 32, 32), {}),
    "clip interpolated": (clip, {}, (3, 40, 24), {"interpolate_pos_encoding": True}),
    "transformers": (transformers, {}, (3, 32, 32), {}),
    "transformers model": (transformers, {"name": "ViTModel"}, (3, 32, 32), {}),
    "transformers masked": (
        transformers, {"name": "ViTForMaskedImageModeling"}, (3, 32, 32), {"bool_masked_pos": MASK},
    ),
    "transformers interpolated": (transformers, {}, (3, 40, 48), {"interpolate_pos_encoding": True}),
    "transformers interpolated, as built": (
        transformers, {"image_size": (64, 16)}, (3, 64, 16), {"interpolate_pos_encoding": True},
    ),
    "mae": (mae, {}, (3, 32, 32), {"noise": NOISE}),
    "mae not square": (mae, {"image_size": (32, 16), "num_channels": 1}, (1, 32, 16), {"noise": NOISE[:, :8]}),
    "mae pretraining": (mae, {"name": "ViTMAEForPreTraining"}, (3, 32, 32), {"noise": NOISE}),
    "mae interpolated": (mae, {}, (3, 32, 32), {"noise": NOISE, "interpolate_pos_encoding": True}),
    "videomae": (videomae, {}, (4, 3, 16, 16), {}),
    "videomae masked": (videomae, {}, (4, 3, 16, 16), {"bool_masked_pos": HIDDEN}),
    "videomae tubelets": (
        videomae, {"tubelet_size": 1, "num_frames": 2, "image_size": (16, 32), "num_channels": 1}, (2, 1, 16, 32), {},
    ),
    "videomae pretraining": (
        videomae, {"name": "VideoMAEForPreTraining", "norm_pix_loss": False}, (4, 3, 16, 16),
        {"bool_masked_pos": HIDDEN},
    ),
    "videomae classifier": (videomae, {"name": "VideoMAEForVideoClassification"}, (4, 3, 16, 16), {}),
    "torchvision": (torchvision, {}, (3, 32, 32), {}),
    "vit_pytorch": (vit_pytorch, {}, (3, 32, 32), {}),
    "vit_pytorch mean": (vit_pytorch, {"pool": "mean", "channels": 1}, (1, 32, 32), {}),
    "vit_pytorch tokens": (vit_pytorch, {"num_classes": 0}, (3, 16, 32), {}),
}  # fmt: skip
UNFUSED_CALLS = (
    "transformers masked", "transformers interpolated", "transformers interpolated, as built", "mae interpolated",
)  # fmt: skip
LIBRARIES = ("timm", "eva", "beit", "transformers", "mae", "videomae", "clip", "torchvision", "vit_pytorch")


def build(case: str, **more) -> tuple[nn.Module, torch.Tensor, dict]:
    library, kwargs, size, call = CASES[case]
    torch.manual_seed(0)
    model = library(**kwargs, **more)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval(), torch.randn(2, *size), call


def result(output) -> torch.Tensor:
    """The last tensor of an output, but for MAE's mask."""
    if isinstance(output, torch.Tensor):
        return output
    return [v for k, v in output.items() if isinstance(v, torch.Tensor) and k not in ("mask", "ids_restore")][-1]


def close(a, b, tolerance=1e-5):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    largest = float(b.detach().abs().max()) if b.numel() else 0
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1, largest))


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def gradients(model, images):
    out = first(model(images))
    model.zero_grad()
    out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape))
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class Calls(TorchDispatchMode):
    """What each call of the registered operation is given: p for a table of positions, + for tokens in front."""

    def __init__(self):
        super().__init__()
        self.given = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.vitkernels.patch_embed.default:
            _, _, _, pos, prefix, *_ = args
            self.given.append(("p" if pos is not None else "") + ("+" if prefix is not None else ""))
        return func(*args, **(kwargs or {}))


def given(model, images) -> list[str]:
    with Calls() as calls:
        model(images)
    return sorted(calls.given)


def taken(model, images) -> bool:
    with torch.no_grad():
        return bool(given(model, images))


def outcome(function, *args):
    try:
        with torch.no_grad():
            return function(*args)
    except Exception as error:
        return type(error), str(error)


def same(got, expected):
    if isinstance(expected, tuple) or isinstance(got, tuple):
        assert got == expected
    else:
        close(got, expected)


def per_sample(model, x):
    parameters = {k: v.detach() for k, v in model.named_parameters() if v.requires_grad}

    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, (image[None],)).sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    return torch.cat([g.flatten() for g in each.values()])


def backward_through(run):
    def gradient(model, x):
        run(model, x).square().sum().backward()
        found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        return found

    return gradient
