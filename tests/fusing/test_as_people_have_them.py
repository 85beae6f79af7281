"""Fused models as public reports have them: pickled by older releases, with parts replaced, hooks on all modules,
traced and scripted. What is not understood is the library's own to run, or to refuse."""

import copy
from functools import partial

import pytest
import torch
from models import CASES, LIBRARIES, build, close, result, same
from problems import onnx
from torch import nn
from torch.nn.modules import module as hooks
from torch.utils.flop_counter import FlopCounterMode

import vitkernels as vk
from vitkernels import fusing
from vitkernels.fusing import swapping

PARTS = {  # what the adapters read
    "timm": ("", "patch_embed", "patch_embed.proj", "patch_embed.norm"),
    "eva": ("", "patch_embed", "patch_embed.proj"),
    "beit": ("", "patch_embed", "patch_embed.proj", "pos_drop"),
    "clip": ("embeddings", "embeddings.patch_embedding"),
    "transformers": (
        "vit.embeddings", "vit.embeddings.patch_embeddings", "vit.embeddings.patch_embeddings.projection",
    ),
    "mae": ("embeddings", "embeddings.patch_embeddings", "embeddings.patch_embeddings.projection"),
    "videomae": ("embeddings", "embeddings.patch_embeddings", "embeddings.patch_embeddings.projection"),
    "torchvision": ("", "conv_proj", "encoder"),
    "vit_pytorch": ("", "to_patch_embedding", "to_patch_embedding.0", "to_patch_embedding.2"),
}  # fmt: skip


@pytest.fixture
def tolerant(monkeypatch):
    """As users have it: conftest.py lets errors of our own through."""
    monkeypatch.setattr(swapping, "STRICT", False)


def outcome(model, images, call):
    try:
        with torch.no_grad():
            return result(model(images, **call))
    except Exception as error:
        return type(error), str(error)


def attributes(module):
    return [n for n in (*vars(module), *module._parameters, *module._buffers, *module._modules) if n[0] != "_"]


@pytest.mark.usefixtures("tolerant")
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_model_without_an_attribute(library):
    """As an older release's pickle may be: it is fused or left alone with the reason, and the healthy one beside it is
    fused. It gives what it gave; or what it gave whole, where the library misses something that isn't needed."""
    original, images, call = build(library)
    whole = outcome(original, images, call)
    lacking = [(path, name) for path in PARTS[library] for name in attributes(original.get_submodule(path))]
    left = set()
    for path, name in lacking:
        fused_before = copy.deepcopy(original)
        vk.fuse(fused_before)
        older, healthy = copy.deepcopy(original), copy.deepcopy(original)
        for model in (older, fused_before):
            delattr(model.get_submodule(path), name)
        expected = outcome(older, images, call)
        gave = [outcome(fused_before, images, call)]
        report = vk.fuse(nn.ModuleList([older, healthy]))
        assert any(e.fused and e.name.startswith("1") for e in report), (path, name)
        left |= {(name, e.note) for e in report if e.name.startswith("0") and not e.fused}
        gave.append(outcome(older, images, call))
        for got in gave:
            same(got, whole if isinstance(expected, tuple) and not isinstance(got, tuple) else expected)
    assert left
    assert all("\n" not in note for _, note in left)


@pytest.mark.usefixtures("tolerant")
def test_the_reason_names_class_and_attribute():
    model, *_ = build("timm")
    del model.dynamic_img_size
    (entry,) = vk.fuse(model)
    assert entry.note == "AttributeError: 'VisionTransformer' object has no attribute 'dynamic_img_size'"


def test_our_own_mistakes_are_not_tolerated_here():
    model, *_ = build("timm")
    del model.dynamic_img_size
    with pytest.raises(AttributeError, match="dynamic_img_size"):
        vk.fuse(model)


@pytest.mark.usefixtures("tolerant")
def test_an_adapter_that_this_release_lacks_names_for(monkeypatch):
    def missing(name, package):
        raise ImportError("cannot import name 'resample_abs_pos_embed' from 'timm.layers'")

    model, images, call = build("timm")
    expected = outcome(model, images, call)
    monkeypatch.setattr(fusing, "import_module", missing)
    fusing._adapter.cache_clear()
    try:
        (entry,) = vk.fuse(model)
    finally:
        fusing._adapter.cache_clear()
    assert (
        "projection only: the adapter for timm can't be used: ImportError: cannot import name 'resample" in entry.note
    )
    same(outcome(model, images, call), expected)


@pytest.mark.usefixtures("tolerant")
def test_a_front_end_is_fused_whole_or_not_at_all(monkeypatch):
    def no_class_for_patches(mixin, base, backend):
        if base.__name__ == "PatchEmbed":
            raise TypeError("__class__ assignment: object layout differs")
        return fused_class(mixin, base, backend)

    fused_class = fusing.fused_class
    monkeypatch.setattr(fusing, "fused_class", no_class_for_patches)
    model, *_ = build("timm")
    (entry,) = vk.fuse(model)
    assert entry.note == "TypeError: __class__ assignment: object layout differs"
    assert not any(isinstance(m, swapping.Fused) for m in model.modules())


class Twice(nn.Module):
    """Somebody's own module in place of another: it has nothing but its forward."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, *args, **kwargs):
        return self.inner(x, *args, **kwargs) * 2


@pytest.mark.usefixtures("tolerant")
@pytest.mark.parametrize(("library", "path"), [(at, path) for at in LIBRARIES for path in PARTS[at] if path])
def test_a_part_replaced_after_fusing_is_used(library, path):
    plain, images, call = build(library)
    fused = copy.deepcopy(plain)
    vk.fuse(fused)
    for model in (plain, fused):
        model.set_submodule(path, Twice(model.get_submodule(path)))
    same(outcome(fused, images, call), outcome(plain, images, call))


def doubled(out):
    return (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2


@pytest.mark.parametrize(("library", "path", "name"), [
    ("timm", "", "_pos_embed"), ("mae", "embeddings", "random_masking"), ("torchvision", "", "_process_input"),
])  # fmt: skip
def test_a_method_replaced_after_fusing_is_used(library, path, name):
    plain, images, call = build(library)
    fused = copy.deepcopy(plain)
    vk.fuse(fused)
    method = getattr(type(plain.get_submodule(path)), name)  # the library's own, of which somebody makes another
    for model in (plain, fused):
        module = model.get_submodule(path)
        own = partial(method, module)
        setattr(module, name, (lambda *a, own=own: doubled(own(*a))))
    same(outcome(fused, images, call), outcome(plain, images, call))


class Quantised(torch.Tensor):
    """A weight that knows products and nothing else, as torchao's do."""

    PRODUCTS = (torch.nn.functional.linear, torch.nn.functional.conv2d, torch.nn.functional.conv3d)

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __init__(self, values):
        self.values_ = values

    def __tensor_flatten__(self):
        return ["values_"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["values_"])

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in cls.PRODUCTS:
            return func(*(a.values_ if isinstance(a, cls) else a for a in args), **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(args[0].values_.clone())
        raise NotImplementedError(f"{func} of a quantised weight")


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_quantised_projection(library):
    """It has a product of its own; so has what it is part of, whether it was fused before or is now."""
    model, images, call = build(library)
    fused = copy.deepcopy(model)
    vk.fuse(fused)
    expected = outcome(model, images, call)
    for each in (model, fused):
        projection = next(m for m in each.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv3d))
        projection.weight = nn.Parameter(Quantised(projection.weight.detach()), requires_grad=False)
    same(outcome(fused, images, call), expected)
    vk.fuse(model)
    same(outcome(model, images, call), expected)


SHAPES = [(1, 32, 4, 32), (1, 1, 2, 17, 32), (1, 2, 17, 32), (2, 17, 32), (1, 32, 4, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_nothing_is_taken_for_tokens_by_its_shape(library, shape):
    """`nn.Sequential(*model.children())` hands the projection's map to the next child; that must stay an error."""
    plain, *_ = build(library)
    fused = copy.deepcopy(plain)
    vk.fuse(fused)
    x = torch.randn(shape)
    names = {"timm": ("patch_embed", "_pos_embed", "forward_features"), "torchvision": ("encoder", "_process_input")}
    for name in names[library]:
        same(outcome(getattr(fused, name), x, {}), outcome(getattr(plain, name), x, {}))


def test_children_of_torchvision_in_a_row():
    plain, *_ = build("torchvision")
    fused = copy.deepcopy(plain)
    vk.fuse(fused)
    for x in (torch.randn(1, 3, 32, 32), torch.randn(2, 3, 32, 32)):
        rows = [nn.Sequential(*list(model.children())[:-1]) for model in (plain, fused)]
        expected = outcome(rows[0], x, {})
        assert expected[0] is AssertionError
        same(outcome(rows[1], x, {}), expected)


KINDS = {
    "forward": hooks.register_module_forward_hook,
    "forward always": partial(hooks.register_module_forward_hook, always_call=True),
    "forward pre": hooks.register_module_forward_pre_hook,
    "backward": hooks.register_module_full_backward_hook,
    "backward pre": hooks.register_module_full_backward_pre_hook,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_hooks_on_all_modules_see_what_they_saw(library, kind):
    """Profilers, FLOP counters and tensor statistics register them; for the time being every module is called."""

    def seen(model):
        classes = []
        hook = KINDS[kind](lambda module, *_: classes.append(type(module).__name__))
        try:
            result(model(images, **call)).sum().backward()
        finally:
            hook.remove()
        return classes

    plain, images, call = build(library)
    fused = copy.deepcopy(plain)
    vk.fuse(fused)
    assert seen(fused) == seen(plain)
    assert len(seen(plain)) > 5


@pytest.mark.parametrize("library", LIBRARIES)
def test_flops_by_module(library):
    def counted(model):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images, **call)
        return {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}

    plain, images, call = build(library)
    expected = counted(plain)
    vk.fuse(plain)
    assert counted(plain) == expected


WAYS = {
    "onnx": onnx,
    "jit.trace": lambda model, images: torch.jit.trace(model, images, strict=False),
    "jit.script": lambda model, _: torch.jit.script(model),
    "fx": lambda model, _: torch.fx.symbolic_trace(model),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("library", [name for name in LIBRARIES if not CASES[name][3]])
def test_traced_and_scripted_as_before(library, way):
    """The library's own code is what is traced, as such graphs are to run where this package is not."""
    plain, images, call = build(library)
    fused = copy.deepcopy(plain)
    vk.fuse(fused)
    try:
        expected = outcome(WAYS[way](plain, images), images, {})
    except Exception as error:
        with pytest.raises(type(error)):
            WAYS[way](fused, images)
        return
    graph = WAYS[way](fused, images)
    assert "vitkernels" not in str(getattr(graph, "graph", graph))
    same(outcome(graph, images, {}), expected)
    if way == "onnx":  # the library's own
        assert [n.target for n in graph.graph.nodes] == [n.target for n in onnx(plain, images).graph.nodes]
    assert any(isinstance(m, swapping.Fused) for m in fused.modules())
    same(outcome(fused, images, call), outcome(plain, images, call))


def test_features_of_torchvision():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    plain, images, _ = build("torchvision")
    fused = copy.deepcopy(plain)
    vk.fuse(fused)
    for node in ("conv_proj", "encoder.ln"):
        features = [extraction.create_feature_extractor(model, [node])(images)[node] for model in (plain, fused)]
        close(*features)
