"""What vk.fuse leaves alone, wholly or but for the projection, before and after fusing."""

import re

import pytest
import torch
from models import build, close, result, timm, timm_embed, torchvision
from torch import nn

import vitkernels as vk
from vitkernels.fusing import pending, structure


class Lora(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 1


class Lora3d(nn.Conv3d):
    def forward(self, x):
        return super().forward(x) + 1


class LoraLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def put(path, module=Lora, **kwargs):
    """A change: another module at path, with the parameters of the old one."""

    def change(model):
        old = model.get_submodule(path)
        sizes = (
            (old.in_features, old.out_features) if isinstance(old, nn.Linear) else (3, 32, old.kernel_size, old.stride)
        )
        model.set_submodule(path, module(*sizes, **kwargs))
        return model

    return change


def hook(path):
    return lambda model: model.get_submodule(path).register_forward_hook(lambda *args: args[2] * 2)


def pre_hook(path):
    return lambda model: model.get_submodule(path).register_forward_pre_hook(lambda _, args: (args[0] * 2,))


def parametrised(path):
    def change(model):
        torch.nn.utils.parametrizations.weight_norm(model.get_submodule(path))

    return change


def replaced(path, name):
    def change(model):
        module = model.get_submodule(path)
        method = getattr(module, name)
        setattr(module, name, lambda *args, **kwargs: method(*args, **kwargs) * 1)

    return change


def subclass(path, name):
    def change(model):
        module = model.get_submodule(path)
        base = type(module)
        module.__class__ = type("Mine", (base,), {name: lambda self, *a, **k: getattr(base, name)(self, *a, **k) * 2})

    return change


def subclass_masking(model):
    """Keep the patches that come last."""
    base = type(model.embeddings)

    def random_masking(self, sequence, noise=None):
        return base.random_masking(self, sequence.flip(1), noise)

    model.embeddings.__class__ = type("Mine", (base,), {"random_masking": random_masking})


def replaced_masking(model):
    masking = model.embeddings.random_masking
    model.embeddings.random_masking = lambda sequence, noise=None: masking(sequence * 2, noise)


def hf_patches(path):
    def change(model):
        module = model.get_submodule(path)
        module.__class__ = type("Hybrid", (type(module),), {})

    return change


PROJECTION = {
    "timm": "patch_embed.proj",
    "eva": "patch_embed.proj",
    "beit": "patch_embed.proj",
    "clip": "embeddings.patch_embedding",
    "transformers": "vit.embeddings.patch_embeddings.projection",
    "mae": "embeddings.patch_embeddings.projection",
    "videomae": "embeddings.patch_embeddings.projection",
    "torchvision": "conv_proj",
    "vit_pytorch": "to_patch_embedding.2",
}
CHANGES = {
    **{f"{at} hook": (at, hook(path), "has hooks") for at, path in PROJECTION.items()},
    **{f"{at} parametrised": (at, parametrised(path), "Parametrized") for at, path in PROJECTION.items()},
    **{
        f"{at} accelerate": (at, replaced(path, "forward"), "replaced on the instance")
        for at, path in PROJECTION.items()
    },
    "timm wrapped": ("timm", put("patch_embed.proj"), "proj is a Lora"),
    "timm dilated": ("timm", put("patch_embed.proj", nn.Conv2d, dilation=2, padding=4), r"dilation (2, 2)"),
    "timm circular": ("timm", put("patch_embed.proj", nn.Conv2d, padding=2, padding_mode="circular"), "circular"),
    "timm patches hook": ("timm", hook("patch_embed"), "patch_embed has hooks"),
    "timm norm": ("timm", lambda m: setattr(m.patch_embed, "norm", nn.LayerNorm(32)), "norm is a LayerNorm"),
    "transformers wrapped": ("transformers", put(PROJECTION["transformers"]), "projection is a Lora"),
    "transformers patches hook": ("transformers", hook("vit.embeddings.patch_embeddings"), "embeddings has hooks"),
    "transformers hybrid": (
        "transformers",
        hf_patches("vit.embeddings.patch_embeddings"),
        "patch_embeddings is a Hybrid",
    ),
    "mae wrapped": ("mae", put(PROJECTION["mae"]), "projection is a Lora"),
    "mae patches hook": ("mae", hook("embeddings.patch_embeddings"), "embeddings has hooks"),
    "mae hybrid": ("mae", hf_patches("embeddings.patch_embeddings"), "patch_embeddings is a Hybrid"),
    "videomae wrapped": ("videomae", put(PROJECTION["videomae"], Lora3d), "Lora3d, not a plain Conv3d"),
    "videomae dilated": (
        "videomae",
        put(PROJECTION["videomae"], nn.Conv3d, dilation=(2, 1, 1), padding=(1, 0, 0)),
        r"dilation (2, 1, 1)",
    ),
    "videomae patches hook": ("videomae", hook("embeddings.patch_embeddings"), "embeddings has hooks"),
    "videomae hybrid": ("videomae", hf_patches("embeddings.patch_embeddings"), "patch_embeddings is a Hybrid"),
    "torchvision wrapped": ("torchvision", put("conv_proj"), "conv_proj is a Lora"),
    "torchvision encoder hook": ("torchvision", pre_hook("encoder"), "encoder has hooks"),
    "vit_pytorch wrapped": ("vit_pytorch", put("to_patch_embedding.2", LoraLinear), "is a LoraLinear"),
    "vit_pytorch hook": ("vit_pytorch", hook("to_patch_embedding"), "the Sequential has hooks"),
}
BEFORE = {  # what is told from the class can't change afterwards
    "timm overrides _pos_embed": ("timm", subclass("", "_pos_embed"), "overrides _pos_embed"),
    "timm overrides forward": ("timm", subclass("patch_embed", "forward"), "patch_embed overrides forward"),
    "timm replaces _pos_embed": ("timm", replaced("", "_pos_embed"), "_pos_embed replaced on the instance"),
    "torchvision overrides": ("torchvision", subclass("", "_process_input"), "overrides _process_input"),
    "transformers overrides": ("transformers", subclass("vit.embeddings", "forward"), "overrides forward"),
    "mae overrides": ("mae", subclass_masking, "overrides random_masking"),
    "mae replaces": ("mae", replaced_masking, "random_masking replaced on the instance"),
    "videomae overrides": ("videomae", subclass("embeddings", "forward"), "overrides forward"),
}


ALONE = {f"{at} {how}" for at in PROJECTION for how in ("hook", "parametrised", "accelerate")} | {
    *(f"{at} wrapped" for at in PROJECTION), "timm dilated", "timm circular", "videomae dilated", "vit_pytorch hook",
}  # fmt: skip


@pytest.mark.parametrize("name", [*CHANGES, *BEFORE])
def test_left_alone(name):
    """Where the projection itself is not plain; where it is, but what surrounds it is not, it alone is fused."""
    library, change, reason = {**CHANGES, **BEFORE}[name]
    model, images, call = build(library)
    change(model)
    expected, classes = result(model(images, **call)), [type(m) for m in model.modules()]
    (entry,) = vk.fuse(model)
    assert reason in entry.note
    if name in ALONE:
        assert not entry.fused
        assert [type(m) for m in model.modules()] == classes
    else:
        assert entry.fused
        changed = [
            type(m)._vk_mixin for m, before in zip(model.modules(), classes, strict=True) if type(m) is not before
        ]
        own = changed == [pending.Embedding, structure.Projection]
        assert own or changed == [structure.Projection]
        assert entry.note.startswith("projection; position and prefix as its code" if own else "projection only: ")
    close(result(model(images, **call)), expected, 0 if name in ALONE else 1e-5)


@pytest.mark.parametrize(
    "said", ({"padding": "valid"}, {"padding_mode": "circular"}), ids=lambda said: next(iter(said))
)
@pytest.mark.parametrize("library", ("timm", "transformers", "mae", "videomae", "torchvision"))
def test_no_padding_in_other_words(library, said):
    model, images, call = build(library)
    put(PROJECTION[library], nn.Conv3d if library == "videomae" else nn.Conv2d, **said)(model)
    expected = result(model(images, **call))
    report = vk.fuse(model)
    assert [(entry.fused, "position" in entry.note, ";" in entry.note) for entry in report] == [(True, True, False)]
    close(result(model(images, **call)), expected, 1e-5)
    assert list(report.calls().values()) == [{"one call": 1}]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_fusing_is_not_passed_by(change):
    library, change, reason = CHANGES[change]
    (plain, images, call), (model, *_) = build(library), build(library)
    vk.fuse(model)
    for each in (plain, model):
        torch.manual_seed(9)
        change(each)
    close(result(model(images, **call)), result(plain(images, **call)))
    if change.__qualname__.startswith("parametrised") and library in ("eva", "beit", "clip"):  # of a fused class
        with pytest.raises(RuntimeError, match="Parametrized"):
            vk.fuse(model)
        return
    (entry,) = vk.fuse(model)
    assert reason in entry.note


LEFT = {
    "timm norm": (lambda: timm(embed_norm_layer=nn.LayerNorm), "norm is a LayerNorm"),
    "timm layout": (
        lambda: timm(embed_layer=timm_embed(output_fmt="NCL"), pos_embed="none"), "gives NCL",
    ),
    "torchvision stem": (
        lambda: torchvision(
            conv_stem_configs=[pytest.importorskip("torchvision.models.vision_transformer").ConvStemConfig(32, 8, 8)]
        ),
        "conv_proj is a Sequential",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_architectures_of_which_the_projection_is_fused(case):
    builder, reason = LEFT[case]
    (entry,) = vk.fuse(builder())
    assert entry.fused
    assert re.fullmatch(f"projection only: .*{reason}.*", entry.note)
