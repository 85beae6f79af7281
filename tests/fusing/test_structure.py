"""Projections that `vk.fuse` finds by their structure: of models that no adapter knows, of strange shapes and uses."""

import copy
import pickle
from functools import partial

import pytest
import torch
from models import backward_through, close, given, gradients, outcome, per_sample, same, taken
from torch import nn
from torch.utils.checkpoint import checkpoint

import vitkernels as vk
from vitkernels.fusing import structure, swapping


def timm(name, **kwargs):
    return partial(pytest.importorskip("timm").create_model, name, **kwargs)


def torchvision(path, **kwargs):
    *folder, name = path.split(".")
    module = pytest.importorskip(".".join(["torchvision.models", *folder]))
    return partial(getattr(module, name), **kwargs)


def transformers(name, **config):
    library = pytest.importorskip("transformers")
    return lambda: getattr(library, name + "Model")(getattr(library, name + "Config")(**config))


HF = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 32}


def llama4():
    library = pytest.importorskip("transformers.models.llama4.modeling_llama4")
    config = pytest.importorskip("transformers").Llama4VisionConfig(hidden_size=32, patch_size=16)
    return library.Llama4UnfoldConvolution(config)


ONLY, OWN = "projection only", "projection; position and prefix as its code adds them"
KNOWN = {  # library's builder, image, note, what the calls of the operation are given
    "timm ConvNeXt": (
        lambda: timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)), (3, 64, 64), ONLY, [""],
    ),
    "timm Swin": (
        lambda: timm("swin_tiny_patch4_window7_224", img_size=56, embed_dim=8, depths=(1, 1), num_heads=(1, 1)),
        (3, 56, 56), ONLY, [""],
    ),
    "timm EVA": (
        lambda: timm("eva02_tiny_patch14_224", depth=1, img_size=28), (3, 28, 28),
        "projection, position and prefix tokens", ["p+"],
    ),
    "timm DINOv3": (
        lambda: timm("vit_small_patch16_dinov3", depth=1, embed_dim=48, num_heads=2, img_size=32), (3, 48, 32),
        "projection, position and prefix tokens", ["+"],
    ),
    "timm BEiT": (
        lambda: timm("beit_base_patch16_224", depth=1, embed_dim=48, num_heads=2, img_size=32), (3, 32, 32),
        "projection, position and class token", ["+"],
    ),
    "timm CaiT": (
        lambda: timm("cait_xxs24_224", depth=1, embed_dim=48, num_heads=2, img_size=32), (3, 32, 32),
        "projection and position", ["p"],
    ),
    "timm ConViT": (
        lambda: timm("convit_tiny", depth=1, embed_dim=12, num_heads=2, img_size=32), (3, 32, 32),
        "projection and position", ["p"],
    ),
    "timm Qwen3": (
        lambda: timm("qwen3_vit_88m", depth=1, embed_dim=48, num_heads=2), (3, 64, 64),
        "projection, position and prefix tokens", ["p"],
    ),
    "timm NaFlex": (
        lambda: timm("naflexvit_base_patch16_gap", depth=1, embed_dim=48, num_heads=2), (3, 64, 48),
        "of images", ["p+"],
    ),
    "timm NaFlex factorised": (
        lambda: timm("naflexvit_base_patch16_parfac_gap", depth=1, embed_dim=48, num_heads=2), (3, 48, 48),
        "of images", ["p+"],
    ),
    "timm CrossViT": (
        lambda: timm("crossvit_9_240"), (3, 240, 240), "projections, position and class token", ["p+", "p+"],
    ),
    "timm AIMv2": (
        lambda: timm("aimv2_large_patch14_224", depth=1, embed_dim=32, num_heads=2), (3, 224, 224), ONLY, [""],
    ),
    "timm distilled": (
        lambda: timm("deit_tiny_distilled_patch16_224", depth=1, embed_dim=32, num_heads=2, img_size=32), (3, 32, 32),
        "projection, position and prefix tokens", ["p+"],
    ),
    "torchvision ConvNeXt": (lambda: torchvision("convnext_tiny"), (3, 64, 64), ONLY, [""]),
    "torchvision Swin3D": (lambda: torchvision("video.swin3d_t"), (3, 4, 32, 32), ONLY, [""]),
    "transformers CLIP": (lambda: transformers("CLIPVision", patch_size=8, **HF), (3, 32, 32), OWN, ["p+"]),
    "transformers SigLIP": (lambda: transformers("SiglipVision", patch_size=8, **HF), (3, 32, 32), OWN, ["p"]),
    "transformers DINOv2": (
        lambda: transformers("Dinov2", patch_size=14, **HF | {"image_size": 28}), (3, 42, 28), OWN, ["p+"],
    ),
    "transformers BLIP": (lambda: transformers("BlipVision", patch_size=8, **HF), (3, 32, 32), OWN, ["p+"]),
    "transformers Llama 4": (lambda: llama4, (3, 32, 48), "projection", [""]),
    "transformers SAM": (
        lambda: transformers("SamVision", patch_size=8, output_channels=8, **HF | {"image_size": 64}), (3, 64, 64),
        ONLY, [""],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_agrees(name):
    build, size, note, calls = KNOWN[name]
    torch.manual_seed(0)
    model, images = build()().eval(), torch.randn(2, *size)
    expected, expected_gradients = gradients(model, images)
    keys = list(model.state_dict())
    report = vk.fuse(model)
    assert report.fused
    assert not report.skipped
    assert {e.note.partition(":")[0] for e in report} == {note}
    assert given(model, images) == calls
    out, found = gradients(model, images)
    close(out, expected, 5e-5)
    assert found.keys() == expected_gradients.keys()
    for parameter, gradient in found.items():
        close(gradient, expected_gradients[parameter], 1e-3)
    assert list(model.state_dict()) == keys
    vk.unfuse(model)
    close(gradients(model, images)[0], expected, 0)
    assert not taken(model, images)


F64, BF16 = torch.float64, torch.bfloat16
# convolution, image, whether it is the operation that runs
STRANGE = {
    "plain": (partial(nn.Conv2d, 3, 6, 4, 4), torch.randn(2, 3, 8, 12), True),
    "no bias": (partial(nn.Conv2d, 3, 6, 4, 4, bias=False), torch.randn(2, 3, 8, 12), True),
    "not square": (partial(nn.Conv2d, 1, 6, (2, 5), (2, 5)), torch.randn(2, 1, 9, 13), True),
    "padded": (partial(nn.Conv2d, 3, 6, 4, 4, padding=(2, 1)), torch.randn(2, 3, 8, 12), True),
    "valid": (partial(nn.Conv2d, 3, 6, 4, 4, padding="valid"), torch.randn(2, 3, 8, 12), True),
    "circular, not padded": (partial(nn.Conv2d, 3, 6, 4, 4, padding_mode="circular"), torch.randn(2, 3, 8, 12), True),
    "circular": (partial(nn.Conv2d, 3, 6, 4, 4, 2, padding_mode="circular"), torch.randn(2, 3, 8, 12), False),
    "dilated": (partial(nn.Conv2d, 3, 6, 4, 4, dilation=2), torch.randn(2, 3, 16, 12), False),
    "groups": (partial(nn.Conv2d, 4, 6, 4, 4, groups=2), torch.randn(2, 4, 8, 12), False),
    "features": (partial(nn.Conv2d, 8, 6, 2, 2), torch.randn(2, 8, 8, 12), False),
    "overlap": (partial(nn.Conv2d, 3, 6, 4, 2), torch.randn(2, 3, 8, 12), False),
    "channels last": (
        partial(nn.Conv2d, 3, 6, 4, 4), torch.randn(2, 3, 8, 12).to(memory_format=torch.channels_last), True,
    ),
    "sliced": (partial(nn.Conv2d, 3, 6, 4, 4), torch.randn(4, 5, 8, 12)[::2, 1:4], True),
    "double": (partial(nn.Conv2d, 3, 6, 4, 4, dtype=F64), torch.randn(2, 3, 8, 12).double(), True),
    "bf16 with fp32 pixels": (partial(nn.Conv2d, 3, 6, 4, 4, dtype=BF16), torch.randn(2, 3, 8, 12), False),
    "bytes": (partial(nn.Conv2d, 3, 6, 4, 4), torch.ones(2, 3, 8, 12).byte(), False),
    "no batch": (partial(nn.Conv2d, 3, 6, 4, 4), torch.randn(3, 8, 12), False),
    "empty": (partial(nn.Conv2d, 3, 6, 4, 4), torch.randn(0, 3, 8, 12), False),
    "too small": (partial(nn.Conv2d, 3, 6, 4, 4), torch.randn(2, 3, 3, 12), False),
    "channels": (partial(nn.Conv2d, 3, 6, 4, 4), torch.randn(2, 4, 8, 12), False),
    "video": (partial(nn.Conv3d, 3, 6, (2, 4, 4), (2, 4, 4)), torch.randn(2, 3, 4, 8, 12), True),
    "single patches": (partial(nn.Conv3d, 3, 6, (2, 4, 4), (2, 4, 4), bias=False), torch.randn(9, 3, 2, 4, 4), True),
    "subclass": (lambda: type("Mine", (nn.Conv2d,), {})(3, 6, 4, 4), torch.randn(2, 3, 8, 12), False),
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGE)
def test_strange_convolutions(name):
    build, images, runs = STRANGE[name]
    plain = nn.Sequential(build())
    fused = copy.deepcopy(plain)
    vk.fuse(fused)
    same(outcome(fused, images), outcome(plain, images))
    if not isinstance(outcome(plain, images), tuple):
        assert taken(fused, images) == runs
    if runs:
        assert fused(images).shape == plain(images).shape
        assert fused(images).requires_grad


class Towers(nn.Module):
    """A convolution that two paths share, one that is frozen, and one whose weight is tied to another's."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.GELU())
        self.shared = self.a[0]
        self.frozen = nn.Conv2d(3, 8, 4, 4).requires_grad_(False)
        self.tied = nn.Conv2d(3, 8, 4, 4)
        self.tied.weight = self.shared.weight
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        maps = self.a(x) + self.shared(x.flip(3)) + self.frozen(x) + self.tied(x * 2)
        return self.head(maps.flatten(2).mean(2))


def towers():
    torch.manual_seed(0)
    plain = Towers()
    fused = copy.deepcopy(plain)
    vk.fuse(fused)
    assert sum(isinstance(m, structure.Projection) for m in fused.modules()) == 3
    return plain, fused, torch.randn(2, 3, 8, 12)


def autocast(model, x):
    with torch.autocast("cpu", BF16):
        return model(x).float()


def inference(model, x):
    with torch.inference_mode():
        return model(x).clone()


USES = {
    "compile": lambda m, x: torch.compile(m, fullgraph=True, backend="aot_eager")(x),
    "export": lambda m, x: torch.export.export(m, (x,)).module()(x),
    "export, dynamic": lambda m, x: torch.export.export(
        m, (x,), dynamic_shapes=({0: torch.export.Dim("B", min=2), 2: None, 3: None},)
    ).module()(x),
    "fx": lambda m, x: torch.fx.symbolic_trace(m)(x),
    "jit.trace": lambda m, x: torch.jit.trace(m, x)(x),
    "jit.script": lambda m, x: torch.jit.script(m)(x),
    "deepcopy": lambda m, x: copy.deepcopy(m)(x),
    "pickle": lambda m, x: pickle.loads(pickle.dumps(m))(x),
    "inference mode": inference,
    "channels last": lambda m, x: m.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last)),
    "backward": backward_through(lambda m, x: m(x)),
    "checkpoint": backward_through(lambda m, x: checkpoint(m, x, use_reentrant=False)),
    "checkpoint, reentrant": backward_through(
        lambda m, x: checkpoint(m, x.clone().requires_grad_(), use_reentrant=True)
    ),
    "per sample": per_sample,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("use", USES)
def test_uses(use):
    plain, fused, x = towers()
    close(USES[use](fused, x), USES[use](plain, x), 1e-4)


def test_autocast():
    plain, fused, x = towers()
    close(autocast(fused, x), autocast(plain, x), 5e-2)
    assert fused.shared(x).dtype == torch.float32
    with torch.autocast("cpu", BF16):
        assert fused.shared(x).dtype == plain.shared(x).dtype == BF16


def test_the_result_is_a_view_of_tokens_that_may_be_written():
    plain, fused, x = towers()
    out = fused.shared(x)
    assert out.permute(0, 2, 3, 1).is_contiguous()
    for model in (plain, fused):
        out = model.shared(x)
        out += 1
        out.relu_().sum().backward()
    close(fused.shared.weight.grad, plain.shared.weight.grad)


@pytest.mark.parametrize("images", [(2, 3, 33, 47), (2, 3, 15, 47), (2, 4, 32, 48), (3, 32, 48)], ids=str)
@pytest.mark.parametrize("change", ["", "stride", "dilation", "Linear"])
def test_llama_4_with_other_images_and_parts(images, change):
    plain = llama4()
    fused = copy.deepcopy(plain)
    vk.fuse(fused)
    for model in (plain, fused):
        if change == "Linear":
            torch.manual_seed(1)
            model.linear = nn.Sequential(nn.Linear(3 * 16 * 16, 8))
        elif change:
            setattr(model.unfold, change, 2 if change == "dilation" else (7, 3))
    same(outcome(fused, torch.randn(images, generator=torch.Generator().manual_seed(0))),
         outcome(plain, torch.randn(images, generator=torch.Generator().manual_seed(0))))  # fmt: skip


def naflex(**kwargs):
    torch.manual_seed(0)
    return timm("naflexvit_base_patch16_gap", depth=1, embed_dim=48, num_heads=2, **kwargs)().eval()


NAFLEX = {  # input, whether it is one call
    "images": (torch.randn(2, 3, 64, 48), True),
    "channels last": (torch.randn(2, 3, 64, 48).to(memory_format=torch.channels_last), False),
    "to be padded": (torch.randn(2, 3, 50, 48), False),
    "double": (torch.randn(2, 3, 64, 48).double(), False),
    "bytes": (torch.ones(2, 3, 64, 48).byte(), False),
    "channels": (torch.randn(2, 4, 64, 48), False),
    "no batch": (torch.randn(3, 64, 48), False),
}


@pytest.mark.parametrize("name", NAFLEX)
def test_naflex_of_images(name):
    plain, (images, one_call) = naflex(), NAFLEX[name]
    fused = copy.deepcopy(plain)
    report = vk.fuse(fused)
    same(outcome(fused, images), outcome(plain, images))
    assert ("one call" in report.calls().get("embeds", {})) == one_call


def test_naflex_in_other_ways():
    """Patches that were cut before; a compiler; channels first; other parts."""
    plain, images = naflex(), torch.randn(2, 3, 64, 48)
    fused = copy.deepcopy(plain)
    vk.fuse(fused)
    coord = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(3), indexing="ij"), -1).reshape(1, 12, 2)
    cut = {"patches": torch.randn(2, 12, 768), "patch_coord": coord.expand(2, -1, -1)}
    cut["patch_valid"] = torch.ones(2, 12, dtype=torch.bool)
    close(fused(cut), plain(cut), 0)
    close(torch.compile(fused, backend="aot_eager")(images), plain(images))
    for model in (plain, fused):
        model.embeds.channels_last = False
    close(fused(images), plain(images))
    for model in (plain, fused):
        model.embeds.norm_input = nn.LayerNorm(768)
    close(fused(images), plain(images), 0)


def test_masks_of_sam_are_no_front_end():
    library = pytest.importorskip("transformers.models.sam.modeling_sam")
    config = pytest.importorskip("transformers").SamPromptEncoderConfig(hidden_size=16, mask_input_channels=8)
    mask_embed = library.SamMaskEmbedding(config)
    prompt_encoder = nn.ModuleDict({"mask_embed": mask_embed, "mask_downscaling": nn.Sequential(nn.Conv2d(1, 4, 2, 2))})
    assert vk.fuse(prompt_encoder) == []


def test_hooks_and_replacements_before_and_after():
    """Before: left alone, with the reason. After: they run, as a call of the convolution is still made."""
    plain = nn.Sequential(nn.Conv2d(3, 6, 4, 4))
    x = torch.randn(2, 3, 8, 8)
    plain[0].register_forward_hook(lambda module, args, out: out * 2)
    (entry,) = vk.fuse(plain)
    assert entry.note == "the projection has hooks"
    assert type(plain[0]) is nn.Conv2d
    fused = nn.Sequential(nn.Conv2d(3, 6, 4, 4))
    fused.load_state_dict(plain.state_dict())
    vk.fuse(fused)
    fused[0].register_forward_hook(lambda module, args, out: out * 2)
    close(fused(x), plain(x))
    assert taken(fused, x)
    torch.nn.utils.parametrizations.weight_norm(fused[0])
    fused[0].parametrizations.weight.original0.data *= 3
    close(fused(x)[:, :, 0, 0], (plain[0]._conv_forward(x, fused[0].weight, fused[0].bias) * 2)[:, :, 0, 0])


def test_what_is_changed_after_fusing():
    plain = nn.Conv2d(3, 6, 4, 4)
    fused, x = copy.deepcopy(plain), torch.randn(2, 3, 9, 11)
    vk.fuse(fused)
    for name, value in (("stride", (2, 3)), ("padding", (1, 2)), ("padding", (0, 0)), ("dilation", (2, 2))):
        for conv in (plain, fused):
            setattr(conv, name, value)
        close(fused(x), plain(x))


def test_a_named_backend():
    fused = nn.Sequential(nn.Conv2d(3, 6, 4, 4))
    vk.fuse(fused, backend="cuda")
    with pytest.raises(NotImplementedError, match="cuda"):
        fused(torch.randn(2, 3, 8, 8))
    assert isinstance(fused[0], swapping.Fused)
