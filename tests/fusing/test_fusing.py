"""vk.fuse against the model it found: values, gradients and errors; what pickles hold."""

import copy
import io
import lzma
import pickle
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from models import CASES, HIDDEN, LIBRARIES, NOISE, UNFUSED_CALLS, build, close, result, timm
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import vitkernels as vk


def gradients(model, images, call):
    out = result(model(images, **call))
    model.zero_grad()
    out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape))
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.numel()}


class Calls(TorchDispatchMode):
    """Backends named in calls of the registered operation, and its tensors: images first, keep last."""

    def __init__(self):
        super().__init__()
        self.backends, self.tensors = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.vitkernels.patch_embed.default:
            self.backends.append(args[-1])
            self.tensors.append(args[:6])
        return func(*args, **(kwargs or {}))


def calls(model, images, **call):
    with torch.no_grad(), Calls() as seen:
        model(images, **call)
    return seen.backends


@pytest.mark.parametrize("case", CASES)
def test_agrees(case):
    model, images, call = build(case)
    expected, expected_gradients = gradients(model, images, call)
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    keys, modules = list(model.state_dict()), [type(m).__qualname__ for m in model.modules()]

    report = vk.fuse(model)
    assert [entry.fused for entry in report] == [True], report
    out, gradients_ = gradients(model, images, call)
    close(out, expected)
    assert gradients_.keys() == expected_gradients.keys()
    for name, gradient in gradients_.items():
        close(gradient, expected_gradients[name], 1e-4)
    assert calls(model, images, **call) == ([] if case in UNFUSED_CALLS else ["auto"])

    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert list(model.state_dict()) == keys
    assert [type(m).__qualname__ for m in model.modules()] == modules
    assert not any("_vk" in name for m in model.modules() for name in vars(m))

    vk.fuse(model, backend="reference")
    assert calls(model, images, **call) == ([] if case in UNFUSED_CALLS else ["reference"])
    vk.unfuse(model)
    close(result(model(images, **call)), expected, 0)
    assert calls(model, images, **call) == []


@pytest.mark.parametrize("library", LIBRARIES)
def test_bfloat16_errs_no_more_than_twice_eager(library):
    model, images, call = build(library)
    with torch.no_grad():
        exact = result(model.double()(images.double(), **call))
        eager = result(model.bfloat16()(images.bfloat16(), **call))
        vk.fuse(model)
        out = result(model(images.bfloat16(), **call))
    floor = torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert out.dtype == torch.bfloat16
    assert (out - exact).abs().max() <= 2 * (eager - exact).abs().max() + floor


@pytest.mark.parametrize("library", LIBRARIES)
def test_autocast_keeps_the_dtype_of_the_stream(library):
    model, images, call = build(library)
    seen = []
    block = next(m for m in model.modules() if isinstance(m, nn.LayerNorm) and m.normalized_shape == (32,))
    if library == "vit_pytorch":
        block = model.transformer
    block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(images, **call)
        vk.fuse(model)
        model(images, **call)
    expected, out = seen
    assert expected.dtype == out.dtype == (torch.bfloat16 if library == "videomae" else torch.float32)
    close(out, expected, 2e-2)


@pytest.mark.parametrize("pixels", [torch.float32, torch.float64, torch.float16])
def test_takes_floats_of_any_dtype(pixels):
    model, images, _ = build("timm")
    vk.fuse(model)
    close(model(images.to(pixels)), model(images), 1e-2)


DROPOUTS = {
    "timm": {"pos_drop_rate": 0.3},
    "timm registers": {"patch_drop_rate": 0.5, "pos_drop_rate": 0.1},
    "timm no position": {"pos_drop_rate": 0.3},
    "transformers": {"hidden_dropout_prob": 0.3},
    "torchvision": {"dropout": 0.3},
    "vit_pytorch": {"emb_dropout": 0.3, "dropout": 0.1},
}


@pytest.mark.parametrize("case", DROPOUTS)
def test_drops_the_same_in_training(case):
    model, images, _ = build(case, **DROPOUTS[case])
    outs = []
    for prepare in (nn.Module.train, vk.fuse, nn.Module.eval):
        prepare(model)
        torch.manual_seed(5)
        outs.append(result(model(images)))
    close(outs[1], outs[0])
    assert torch.allclose(outs[2], outs[0]) == (case == "timm no position")  # timm drops positions only


@pytest.mark.parametrize("library", LIBRARIES)
def test_copies_are_fused(library):
    model, images, call = build(library)
    plain = copy.deepcopy(model)
    expected = result(model(images, **call))
    vk.fuse(model, backend="reference")
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stored, weights_only=False)
    for other in copies:
        close(result(other(images, **call)), expected)
        assert calls(other, images, **call) == ["reference"]
        assert vk.fuse(other).fused
        vk.unfuse(other)
        assert [type(m) for m in other.modules()] == [type(m) for m in plain.modules()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    plain.load_state_dict(model.state_dict(), strict=True)
    close(result(plain(images, **call)), result(model(images, **call)))


def test_optimiser_goes_on():
    models = [build("timm")[0] for _ in range(2)]
    images = build("timm")[1]
    optimisers = [torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9) for m in models]
    for step in (vk.fuse, vk.unfuse, vk.fuse):
        step(models[0])
        for model, optimiser in zip(models, optimisers, strict=True):
            optimiser.zero_grad()
            model(images).square().mean().backward()
            optimiser.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        close(a, b, 1e-3)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("library", LIBRARIES)
def test_compiles_and_exports(library):
    model, images, call = build(library)
    expected = result(model(images, **call))
    vk.fuse(model)
    torch._dynamo.reset()
    close(result(torch.compile(model, fullgraph=True, backend="eager")(images, **call)), expected)
    B = torch.export.Dim("B")
    shapes = {"pixel_values": {0: B}, "noise": {0: B}} if call else ({0: B},)
    exported = torch.export.export(model, (images,), call, dynamic_shapes=shapes)
    assert any("vitkernels" in str(node.target) for node in exported.graph.nodes)
    three = {name: value[[0, 0, 0]] for name, value in call.items()}
    close(result(exported.module()(images[[0, 0, 0]], **three))[:1], expected[:1])


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a C++ compiler")
def test_trains_in_inductor():
    model, images, _ = build("timm", depth=0)
    expected, expected_gradients = gradients(model, images, {})
    vk.fuse(model)
    torch._dynamo.reset()
    out, gradients_ = gradients(torch.compile(model, fullgraph=True), images, {})
    close(out, expected)
    for name, gradient in gradients_.items():
        close(gradient, expected_gradients[name.replace("_orig_mod.", "")], 1e-4)


def test_parts_of_timm_called_from_outside():
    model, images, _ = build("timm registers")

    def outside():
        patches = model.patch_embed(images)
        final, intermediates = model.forward_intermediates(images)
        return patches, model._pos_embed(patches), final, *intermediates, model.forward_features(images)

    expected = outside()
    vk.fuse(model)
    for a, b in zip(outside(), expected, strict=True):
        close(a, b)
    plain = build("timm registers")[0]
    for each in (model, plain):
        each.set_input_size(img_size=(16, 48), patch_size=4)
    images = torch.randn(2, 3, 16, 48)
    close(model(images), plain(images))
    assert calls(model, images) == ["auto"]


def test_parts_of_torchvision_called_from_outside():
    model, images, _ = build("torchvision")
    patches = model._process_input(images)
    tokens = torch.cat([model.class_token.expand(2, -1, -1), patches], 1)
    encoded = model.encoder(tokens)
    vk.fuse(model)
    close(model._process_input(images), patches)
    close(model.encoder(tokens), encoded)


REFUSED = {
    "integers": torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
    "height": torch.zeros(2, 3, 40, 32),
    "width": torch.zeros(2, 3, 32, 31),
    "channels": torch.zeros(2, 4, 32, 32),
    "no batch": torch.zeros(3, 32, 32),
}


@pytest.mark.parametrize("images", REFUSED)
@pytest.mark.parametrize("library", [*LIBRARIES, "timm dynamic", "vit_pytorch without norms"])
def test_refuses_what_the_library_refuses(library, images):
    model, _, call = build(library.removesuffix(" without norms"))
    images = REFUSED[images]
    if library.endswith("without norms"):
        model.to_patch_embedding[1] = nn.Identity()

    def outcome():
        try:
            return result(model(images, **call))
        except Exception as error:
            return type(error), str(error)

    expected = outcome()
    vk.fuse(model)
    if isinstance(expected, tuple):
        assert outcome() == expected
    else:
        close(outcome(), expected)


def seen_by_the_operation(model, images, **call):
    """(images, keep) of the one call of the registered operation."""
    with torch.no_grad(), Calls() as seen:
        model(images, **call)
    [(pixels, *_, keep)] = seen.tensors
    return pixels, keep


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.75, 0.99])
def test_mae_draws_the_mask_it_drew(ratio):
    model, images, _ = build("mae", mask_ratio=ratio)
    outs = []
    for prepare in (vk.unfuse, vk.fuse):
        prepare(model)
        torch.manual_seed(7)
        outs.append((model(images), torch.get_rng_state()))
    (before, state), (after, state_after) = outs
    close(after.last_hidden_state, before.last_hidden_state)
    assert torch.equal(after.mask, before.mask)
    assert (after.mask.dtype, after.ids_restore.dtype) == (before.mask.dtype, before.ids_restore.dtype)
    assert torch.equal(after.ids_restore, before.ids_restore)
    assert torch.equal(state, state_after)
    _, keep = seen_by_the_operation(model, images)
    assert keep.shape == (2, int(16 * (1 - ratio)))  # nothing else is embedded


def test_mae_noise_for_one_image_is_what_the_library_makes_of_it():
    model, images, _ = build("mae")
    expected = model(images, noise=NOISE[:1])
    vk.fuse(model)
    close(model(images, noise=NOISE[:1]).last_hidden_state, expected.last_hidden_state, 0)
    assert calls(model, images, noise=NOISE[:1]) == []


def test_video_is_read_where_it_lies_and_only_what_is_visible():
    model, images, call = build("videomae masked")
    vk.fuse(model)
    pixels, keep = seen_by_the_operation(model, images, **call)
    assert (pixels.data_ptr(), pixels.shape) == (images.data_ptr(), (2, 3, 4, 16, 16))
    assert keep.tolist() == [[1, 2, 5], [2, 4, 6]]
    assert seen_by_the_operation(model, images)[1] is None


ODD_MASKS = {
    "five visible": HIDDEN.index_fill(1, torch.tensor([5]), True),
    "one and three": torch.stack([HIDDEN[0].index_fill(0, torch.tensor([1, 2]), True), HIDDEN[1]]),
    "all hidden": torch.ones(2, 8).bool(),
    "integers": HIDDEN.int(),
    "one image": HIDDEN[:1],
    "short": HIDDEN[:, :4],
}


@pytest.mark.parametrize("mask", ODD_MASKS)
def test_odd_masks_are_what_the_library_makes_of_them(mask):
    model, images, _ = build("videomae")

    def outcome():
        try:
            return result(model(images, bool_masked_pos=ODD_MASKS[mask]))
        except Exception as error:
            return type(error), str(error)

    expected = outcome()
    vk.fuse(model)
    got = outcome()
    assert got == expected if isinstance(expected, tuple) else torch.equal(got, expected)
    assert isinstance(expected, torch.Tensor) or mask not in ("one and three", "integers"), expected


def test_named_backend_is_not_replaced():
    model, images, _ = build("timm")
    with pytest.raises(ValueError, match="tpu"):
        vk.fuse(model, backend="tpu")
    vk.fuse(model, backend="cuda")
    with pytest.raises(NotImplementedError, match="cuda"):
        model(images)


def test_a_class_swapped_since_is_not_undone():
    model = build("timm")[0]
    vk.fuse(model)
    model.__class__ = type("FSDPVisionTransformer", (type(model),), {})
    for undo in (vk.unfuse, vk.fuse):
        with pytest.raises(RuntimeError, match="FSDPVisionTransformer"):
            undo(model)


def test_imports_no_library():
    code = (
        "import sys, torch, vitkernels as vk; vk.fuse(torch.nn.Conv2d(3, 8, 4, 4));"
        "print([m for m in ('timm', 'transformers', 'torchvision', 'vit_pytorch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


STORED = {"timm": "1.0.31", "torchvision": "0.29.1", "transformers": "5.24.0", "vit_pytorch": "1.26.11", "ours": None}


@pytest.mark.parametrize("library", STORED)
def test_what_an_older_version_pickled_still_runs(library):
    """Models, fused and of our own, as commit d12bce4 pickled them, each with what it gave for these images. A pickle
    of another library's model is only good for the version that it was made with."""
    written = STORED[library]
    if written and (found := metadata.version(library).partition("+")[0]) != written:
        pytest.skip(f"the model was pickled with {library} {written}, here is {found}")
    stored = pickle.loads(lzma.decompress(Path(__file__).with_name("models_of_0_1_0.pkl.xz").read_bytes()))
    images = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
    for name in ("PatchEmbed", "ViT") if library == "ours" else (library,):
        model, expected = stored[name]
        fused = [m for m in model.modules() if hasattr(m, "_vk_backend")]
        assert bool(fused) == (library != "ours")
        for _ in range(2):  # as it was pickled; then unfused
            with torch.no_grad():
                tokens = model(images)
            torch.testing.assert_close(tokens if torch.is_tensor(tokens) else tokens[0], expected)
            vk.unfuse(model)


def test_pickles_name_what_older_versions_named():
    """So that each version reads the other's."""
    model = timm()
    vk.fuse(model)
    named = set(re.findall(rb"c(vitkernels[\w.]*)\n(\w+)\n", pickle.dumps(model, protocol=2)))
    adapter = b"vitkernels.fusing.timm"
    classes = {(adapter, b"VisionTransformer"), (adapter, b"PatchEmbed")}
    assert named == {(b"vitkernels.fusing.swapping", b"_rebuilt"), *classes}
