"""Front ends that einops cuts: Rearrange > [norm] > Linear in a Sequential, of vit_pytorch and of anyone."""

import copy
import math
import pickle
from functools import partial

import pytest
import torch
from models import close, gradients, outcome, same, taken
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import vitkernels as vk

einops = pytest.importorskip("einops.layers.torch")

P2 = {"p1": 4, "p2": 2}
# pattern, sizes of patches, image
PATTERNS = {
    "vit_pytorch": ("b c (h p1) (w p2) -> b (h w) (p1 p2 c)", P2, (2, 3, 8, 12)),
    "of a convolution": ("b c (h p1) (w p2) -> b (h w) (c p1 p2)", P2, (2, 3, 8, 12)),
    "columns first": ("b c (h p1) (w p2) -> b (h w) (p2 c p1)", P2, (2, 3, 8, 12)),
    "map": ("b c (h p1) (w p2) -> b h w (p1 p2 c)", P2, (2, 3, 8, 12)),
    "other letters": ("n ch (rows y) (cols x) -> n (rows cols) (y x ch)", {"y": 2, "x": 3}, (2, 1, 8, 12)),
    "channels last": ("b (h p1) (w p2) c -> b (h w) (p1 p2 c)", P2, (2, 8, 12, 3)),
    "no channels": ("b (h p1) (w p2) -> b h w (p1 p2)", P2, (2, 8, 12)),
    "series": ("b c (n p) -> b n (p c)", {"p": 5}, (2, 3, 20)),
    "video": ("b c (f pf) (h p1) (w p2) -> b (f h w) (pf p1 p2 c)", {"pf": 2, **P2}, (2, 3, 4, 8, 12)),
    "frames": ("b c (f pf) (h p1) (w p2) -> b f (h w) (pf p1 p2 c)", {"pf": 2, **P2}, (2, 3, 4, 8, 12)),
    "every frame": ("b c f (h p1) (w p2) -> b (f h w) (c p1 p2)", P2, (2, 3, 4, 8, 12)),
    "frames before channels": ("b f c (h p1) (w p2) -> b f (h w) (c p1 p2)", P2, (2, 4, 3, 8, 12)),
    "rows": ("b c (h p1) w -> b (h w) (p1 c)", {"p1": 4}, (2, 3, 8, 5)),
}
ROWS = {
    "Linear": lambda K: [nn.Linear(K, 6)],
    "no bias": lambda K: [nn.Linear(K, 6, bias=False)],
    "norms": lambda K: [nn.LayerNorm(K), nn.Linear(K, 6), nn.LayerNorm(6)],
    "and more": lambda K: [nn.Linear(K, 6), nn.GELU(), nn.Linear(6, 5)],
    "norm first": lambda K: [nn.LayerNorm(K), nn.Linear(K, 6)],
}


def front_end(pattern, lengths, shape, row):
    torch.manual_seed(0)
    left, right = pattern.split("->")
    C = dict(zip((a for a in left.replace("(", "").replace(")", "").split() if a not in lengths), shape, strict=True))
    K = math.prod(lengths.values()) * math.prod(C.get(a, 1) for a in right.rpartition("(")[2].strip(")").split())
    return nn.Sequential(einops.Rearrange(pattern, **lengths), *ROWS[row](K)), torch.randn(shape)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_agrees(pattern, row):
    model, images = front_end(*PATTERNS[pattern], row)
    expected, expected_gradients = gradients(model, images)
    (entry,) = vk.fuse(model)
    assert (entry.fused, entry.note) == (True, "projection only")
    assert taken(model, images)
    out, found = gradients(model, images)
    close(out, expected)
    assert found.keys() == expected_gradients.keys()
    for name, gradient in found.items():
        close(gradient, expected_gradients[name])
    wider = torch.cat([images, images], -1) if pattern != "channels last" else torch.cat([images, images], -2)
    plain = copy.deepcopy(model)
    vk.unfuse(plain)
    close(model(wider), plain(wider))
    assert taken(model, wider)
    assert not taken(plain, wider)


def checkpointed(model, images, reentrant):
    """All gradients, of what is computed a second time for them."""
    images = images.clone().requires_grad_()
    checkpoint(model, images, use_reentrant=reentrant).square().sum().backward()
    return torch.cat([t.grad.flatten() for t in (images, *model.parameters())])


@pytest.mark.parametrize("row", ["Linear", "norms"])
@pytest.mark.parametrize("pattern", ["vit_pytorch", "no channels", "video"])
@pytest.mark.parametrize("way", [
    "compile", "export", "script", "trace", "copy", "pickle", "autocast", "inference", "checkpoint", "reentrant",
])  # fmt: skip
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_ways(pattern, row, way):
    plain, images = front_end(*PATTERNS[pattern], row)
    fused = copy.deepcopy(plain)
    vk.fuse(fused)
    ways = {
        "compile": lambda m: torch.compile(m, fullgraph=True, backend="aot_eager")(images),
        "export": lambda m: torch.export.export(m, (images,)).module()(images),
        "script": lambda m: torch.jit.script(m)(images),
        "trace": lambda m: torch.jit.trace(m, images)(images),
        "copy": lambda m: copy.deepcopy(m)(images),
        "pickle": lambda m: pickle.loads(pickle.dumps(m))(images),
        "autocast": lambda m: torch.autocast("cpu", torch.bfloat16)(m)(images),
        "inference": lambda m: torch.inference_mode()(m)(images),
        "checkpoint": lambda m: checkpointed(m, images, reentrant=False),
        "reentrant": lambda m: checkpointed(m, images, reentrant=True),
    }
    close(ways[way](fused), ways[way](plain), 2e-2 if way == "autocast" else 1e-5)


ODD = {
    "does not divide": torch.randn(2, 3, 8, 13),
    "channels": torch.randn(2, 4, 8, 12),
    "no batch": torch.randn(3, 8, 12),
    "empty": torch.randn(0, 3, 8, 12),
    "no patch": torch.randn(2, 3, 8, 0),
    "double": torch.randn(2, 3, 8, 12).double(),
    "bytes": torch.ones(2, 3, 8, 12).byte(),
}


@pytest.mark.parametrize("row", ["Linear", "norms"])
@pytest.mark.parametrize("images", ODD)
def test_what_the_library_refuses_it_still_refuses(images, row):
    plain, _ = front_end(*PATTERNS["vit_pytorch"], row)
    fused = copy.deepcopy(plain)
    vk.fuse(fused)
    same(outcome(fused, ODD[images]), outcome(plain, ODD[images]))


def rearranged(pattern, *modules, **lengths):
    return nn.Sequential(einops.Rearrange(pattern, **lengths), *modules)


CUT = "b c (h p1) (w p2) -> b (h w) (p1 p2 c)"
LEFT = {  # model, image, why
    "a convolution": (
        partial(rearranged, "b c (h p1) (w p2) -> b (p1 p2 c) h w", nn.Conv2d(24, 6, 1), **P2), "is a Conv2d",
    ),
    "columns of patches": (
        partial(rearranged, "b c (h p1) (w p2) -> b (w h) (p1 p2 c)", nn.Linear(24, 6), **P2), "raster order",
    ),
    "strided": (partial(rearranged, "b c (p1 h) (p2 w) -> b (h w) (p1 p2 c)", nn.Linear(24, 6), **P2), "raster order"),
    "another class": (
        partial(rearranged, CUT, type("Lora", (nn.Linear,), {})(24, 6), **P2), "is a Lora,",
    ),
    "sizes of the grid": (partial(rearranged, CUT, nn.Linear(24, 6), h=2, w=6), "not told how large"),
    "one size": (partial(rearranged, CUT, nn.Linear(24, 6), p1=4, w=6), None),
    "features": (partial(rearranged, CUT, nn.Linear(8 * 8, 6), **P2), None),
    "a head": (partial(rearranged, "b c h w -> b (c h w)", nn.Linear(3 * 8 * 12, 6)), None),
    "windows": (partial(rearranged, "b c (x w1) (y w2) -> b x y w1 w2 c", nn.Linear(3, 6), w1=4, w2=4), None),
    "heads": (partial(rearranged, "b c h (w d) -> b c h w d", nn.Linear(4, 6), d=4), None),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name):
    build, reason = LEFT[name]
    model = build()
    images = torch.randn(2, 8 if name == "features" else 3, 8, 12)
    expected = model(images)
    report = vk.fuse(model)
    assert not report.fused
    assert [reason in e.note for e in report] == ([True] if reason else [])
    close(model(images), expected, 0)


CHANGES = {
    "cut hook": lambda m: m[0].register_forward_hook(lambda module, args, out: out * 2),
    "Linear hook": lambda m: m[1].register_forward_hook(lambda module, args, out: out * 2),
    "hook": lambda m: m.register_forward_hook(lambda module, args, out: out * 2),
    "appended": lambda m: m.append(nn.Linear(6, 4)),
    "cut": lambda m: m.__setitem__(0, einops.Rearrange("b c (h p1) (w p2) -> b (h w) (c p1 p2)", **P2)),
    "projection": lambda m: m.__setitem__(1, nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 5))),
    "norm": lambda m: m.insert(1, nn.LayerNorm(24)),
    "parametrised": lambda m: nn.utils.parametrizations.weight_norm(m[1]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_fusing_is_not_passed_by(change):
    plain, images = front_end(*PATTERNS["vit_pytorch"], "Linear")
    fused = copy.deepcopy(plain)
    vk.fuse(fused)
    for model in (plain, fused):
        torch.manual_seed(3)
        CHANGES[change](model)
    close(fused(images), plain(images))


def test_parts_called_from_outside():
    """vit_pytorch's wrappers (MAE, SimMIM) call to_patch_embedding[0] and [1:]."""
    plain, images = front_end(*PATTERNS["vit_pytorch"], "norms")
    fused = copy.deepcopy(plain)
    vk.fuse(fused)
    close(fused[1:](fused[0](images)), plain(images))


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_pixels_are_read_where_they_lie(pattern):
    """Without a norm before, nothing is copied for the operation."""
    model, images = front_end(*PATTERNS[pattern], "Linear")
    vk.fuse(model)
    with torch.no_grad(), Operations() as seen:
        model(images)
    before = seen.names[: seen.names.index("vitkernels::patch_embed")]
    assert not [name for name in before if "copy" in name or "clone" in name or "_unsafe_view" in name]


SIZES = {"dim": 32, "heads": 2, "mlp_dim": 48, "num_classes": 5}
IMAGE = {**SIZES, "image_size": 32, "patch_size": 8, "depth": 1}
VIDEO = {**SIZES, "image_size": 32, "image_patch_size": 8, "frames": 4, "frame_patch_size": 2}
ARCHITECTURES = {
    "simple_vit.SimpleViT": (IMAGE, (3, 32, 32)),
    "parallel_vit.ViT": (IMAGE, (3, 32, 32)),
    "rvt.RvT": (IMAGE, (3, 32, 32)),
    "cait.CaiT": ({**IMAGE, "cls_depth": 1}, (3, 32, 32)),
    "xcit.XCiT": ({**IMAGE, "cls_depth": 1}, (3, 32, 32)),
    "simple_vit_1d.SimpleViT": ({**SIZES, "seq_len": 32, "patch_size": 8, "depth": 1}, (3, 32)),
    "vit_3d.ViT": ({**VIDEO, "depth": 1}, (3, 4, 32, 32)),
    "vivit.ViViT": ({**VIDEO, "spatial_depth": 1, "temporal_depth": 1}, (3, 4, 32, 32)),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_of_vit_pytorch(name):
    module, _, cls = name.partition(".")
    kwargs, size = ARCHITECTURES[name]
    torch.manual_seed(0)
    library = pytest.importorskip(f"vit_pytorch.{module}")
    model, images = getattr(library, cls)(**kwargs).eval(), torch.randn(2, *size)
    expected, expected_gradients = gradients(model, images)
    keys = list(model.state_dict())
    report = vk.fuse(model)
    assert report.fused
    assert taken(model, images)
    out, found = gradients(model, images)
    close(out, expected, 5e-5)
    for parameter, gradient in found.items():
        close(gradient, expected_gradients[parameter], 1e-3)
    assert list(model.state_dict()) == keys
