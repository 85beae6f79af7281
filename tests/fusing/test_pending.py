"""What a front end's own code may do with a projection's result: noted and computed in one call, or computed first."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from models import backward_through, close, given, gradients, per_sample
from torch import nn
from torch.utils.checkpoint import checkpoint

import vitkernels as vk
from vitkernels.fusing import pending, pixels, swapping

B, N, D = 2, 6, 8
GRID = 2, 3


class Embeddings(nn.Module):
    """With tables of every kind; `run` is what it does with the map."""

    def __init__(self, run, conv=None):
        super().__init__()
        torch.manual_seed(0)
        self.conv = conv or nn.Conv2d(3, D, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, D))
        self.registers = nn.Parameter(torch.randn(1, 2, D))
        self.patches = nn.Parameter(torch.randn(1, N, D))
        self.all = nn.Parameter(torch.randn(1, 1 + N, D))
        self.flat = nn.Embedding(1 + N, D)
        self.map = nn.Parameter(torch.randn(1, *GRID, D))
        self.planes = nn.Parameter(torch.randn(1, D, *GRID))
        self.rows = nn.Parameter(torch.randn(1, GRID[0], 1, D))
        self.each = nn.Parameter(torch.randn(B, N, D))
        self.drop = nn.Dropout(0.5)
        self.run = run

    def forward(self, images):
        return self.run(self, self.conv(images))


class Model(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.embeddings = Embeddings(run)
        self.head = nn.Linear(D, 4)

    def forward(self, images):
        return self.head(self.embeddings(images))


def tokens(x):
    return x.flatten(2).transpose(1, 2)


def in_front(m, x):
    return torch.cat((m.cls.expand(x.shape[0], -1, -1), x), dim=1)


def stats_first(m, x):
    with torch.no_grad():
        x.mean()
    return tokens(x) + m.patches


def in_place_on_an_alias(m, x):
    t = tokens(x)
    t += m.patches
    return tokens(x) * 2


def in_place_after_sum(m, x):
    t = tokens(x)
    s = t + m.patches
    t.mul_(3)
    return s + t


def set_item(m, x):
    t = tokens(x) + m.patches
    t[:, 0] = m.cls[0, 0]
    return t


def returned_twice(m, x):
    t = tokens(x)
    return torch.cat([t, t + m.patches], 1)


def no_gradient_for_the_sum(m, x):
    t = tokens(x)
    with torch.no_grad():
        s = t + m.patches
    return s + t


# what is done with a map [B,D,G_h,G_w], and what the calls of the operation were given
NOTED = {
    "nothing": (lambda m, x: x.flatten(2).transpose(1, 2), [""]),
    "functions": (lambda m, x: torch.transpose(torch.flatten(x, 2), 1, 2) + m.patches, ["p"]),
    "positions": (lambda m, x: tokens(x) + m.patches, ["p"]),
    "positions on the left": (lambda m, x: m.patches + tokens(x), ["p"]),
    "torch.add": (lambda m, x: torch.add(tokens(x), m.patches), ["p"]),
    "x.add": (lambda m, x: tokens(x).add(m.patches), ["p"]),
    "without a batch": (lambda m, x: tokens(x) + m.patches[0], ["p"]),
    "for each image": (lambda m, x: tokens(x) + m.each, ["p"]),
    "of every patch": (lambda m, x: tokens(x) + m.cls, ["p"]),
    "prefix": (lambda m, x: in_front(m, tokens(x)), ["+"]),
    "prefix, positions": (lambda m, x: in_front(m, tokens(x)) + m.all, ["p+"]),
    "positions, prefix": (lambda m, x: in_front(m, tokens(x) + m.patches), ["p+"]),
    "prefixes": (
        lambda m, x: torch.cat((m.cls.expand(B, -1, -1), m.registers.expand(B, -1, -1), tokens(x)), 1) + m.cls, ["p+"],
    ),
    "one prefix after the other": (
        lambda m, x: in_front(m, torch.cat((m.registers.expand(B, -1, -1), tokens(x) + m.patches), dim=-2)), ["p+"],
    ),
    "prefix of each": (lambda m, x: torch.cat((m.each[:, :3], tokens(x)), 1), ["+"]),
    "embedding": (lambda m, x: in_front(m, tokens(x)) + m.flat(torch.arange(1 + N)), ["p+"]),
    "on the map": (lambda m, x: x.permute(0, 2, 3, 1) + m.map, ["p"]),
    "on the map, then tokens": (lambda m, x: in_front(m, (x.permute(0, 2, 3, 1) + m.map).view(B, -1, D)), ["p+"]),
    "on planes": (lambda m, x: tokens(x + m.planes), ["p"]),
    "of rows": (lambda m, x: (x.permute(0, 2, 3, 1) + m.rows).reshape(B, N, D), ["p"]),
    "of images and patches": (lambda m, x: tokens(x).reshape(-1, D) + m.each.reshape(-1, D), ["p"]),
    "sizes": (lambda m, x: x.view(x.size(0), x.shape[1], -1).movedim(1, 2) + m.patches[:, : x.ndim + 2], ["p"]),
    "sizes of other things": (
        lambda m, x: tokens(x).to(m.patches.dtype).contiguous() + m.patches.to(x.device, x.dtype), ["p"],
    ),
    "dropout": (lambda m, x: F.dropout(tokens(x) + m.patches, 0.5, training=False), ["p"]),
    "norm": (lambda m, x: F.layer_norm(tokens(x), (D,)) + m.patches, [""]),
    "by name": (lambda m, x: F.layer_norm(input=tokens(x), normalized_shape=(D,)) + m.patches, [""]),
    "suffix": (lambda m, x: torch.cat((tokens(x) + m.patches, m.cls.expand(B, -1, -1)), 1), ["p"]),
    "two tables": (lambda m, x: tokens(x) + m.patches + m.cls, ["p"]),
    "for all, then in front": (lambda m, x: in_front(m, in_front(m, tokens(x)) + m.all), ["p+"]),
    "numbers": (lambda m, x: tokens(x) + 1, [""]),
    "scaled": (lambda m, x: tokens(x) * 2 + m.patches, [""]),
    "minus": (lambda m, x: 1 - tokens(x), [""]),
    "part": (lambda m, x: tokens(x)[:, 1:] + m.patches[:, 1:], [""]),
    "columns first": (lambda m, x: x.transpose(2, 3).flatten(2).transpose(1, 2) + m.patches, [""]),
    "more images": (lambda m, x: tokens(x).unsqueeze(1) + m.patches.expand(1, 3, N, D), [""]),
    "wider table": (lambda m, x: tokens(x) + m.patches.double(), ["p"]),
    "bits": (lambda m, x: tokens(x).view(torch.int32).view(torch.float32) + m.patches, [""]),
    "list": (lambda m, x: torch.stack(list(tokens(x))), [""]),
    "mask": (lambda m, x: torch.where(tokens(x) > 0, m.patches, tokens(x)), [""]),
    "stats first": (stats_first, [""]),
    "in place": (lambda m, x: tokens(x).add_(m.patches), ["p"]),
    "in place on an alias": (in_place_on_an_alias, ["p"]),
    "in place after a sum": (in_place_after_sum, ["", "p"]),
    "in place on numbers": (lambda m, x: F.relu(tokens(x) + m.patches, inplace=True), ["p"]),
    "set item": (set_item, ["p"]),
    "twice": (returned_twice, ["", "p"]),
    "no gradient for the sum": (no_gradient_for_the_sum, [""]),
}  # fmt: skip


@pytest.mark.parametrize("name", NOTED)
def test_agrees(name):
    run, calls = NOTED[name]
    model, images = Embeddings(run), torch.randn(B, 3, 8, 12)
    expected, expected_gradients = gradients(model, images)
    (entry,) = vk.fuse(model)
    assert entry.note.startswith("projection; position and prefix")
    out, found = gradients(model, images)
    close(out, expected)
    assert found.keys() == expected_gradients.keys()
    for parameter, gradient in found.items():
        close(gradient, expected_gradients[parameter])
    assert given(model, images) == calls


def test_planes_in_front_are_no_tokens_in_front():
    """Of as many channels as patches."""
    model = Embeddings(lambda m, x: torch.cat((m.each[:, :1, :N], x.flatten(2)), 1), nn.Conv2d(3, N, 4, 4))
    images = torch.randn(B, 3, 8, 12)
    expected = model(images)
    vk.fuse(model)
    close(model(images), expected)


def test_planes_of_as_many_channels_as_patches():
    model = Embeddings(lambda m, x: x.flatten(2) + m.each[:, :, :N], nn.Conv2d(3, N, 4, 4))
    images = torch.randn(B, 3, 8, 12)
    expected = model(images)
    vk.fuse(model)
    close(model(images), expected)


def test_results_of_every_form_are_computed():
    model, images = (
        Embeddings(lambda m, x: {"a": [tokens(x)], "b": (tokens(x) + m.patches, 1.5)}),
        torch.randn(B, 3, 8, 12),
    )
    expected = model(images)
    vk.fuse(model)
    out = model(images)
    close(out["a"][0], expected["a"][0])
    close(out["b"][0], expected["b"][0])
    assert out["b"][1] == 1.5 and type(out["b"]) is tuple


WHOLE = "prefix, positions"


def pair(run=NOTED[WHOLE][0]):
    plain = Model(run)
    fused = copy.deepcopy(plain)
    vk.fuse(fused)
    assert isinstance(fused.embeddings, pending.Embedding)
    return plain, fused, torch.randn(B, 3, 8, 12)


USES = {
    "compile": lambda m, x: torch.compile(m, fullgraph=True, backend="aot_eager")(x),
    "export": lambda m, x: torch.export.export(m, (x,)).module()(x),
    "export, not strict": lambda m, x: torch.export.export(m, (x,), strict=False).module()(x),
    "fx": lambda m, x: torch.fx.symbolic_trace(m)(x),
    "jit.trace": lambda m, x: torch.jit.trace(m, x)(x),
    "deepcopy": lambda m, x: copy.deepcopy(m)(x),
    "inference mode": torch.inference_mode()(lambda m, x: m(x)),
    "channels last": lambda m, x: m(x.to(memory_format=torch.channels_last)),
    "other sizes of batch": lambda m, x: m(x[:1]),
    "backward": backward_through(lambda m, x: m(x)),
    "checkpoint": backward_through(lambda m, x: checkpoint(m, x, use_reentrant=False)),
    "checkpoint, reentrant": backward_through(
        lambda m, x: checkpoint(m, x.clone().requires_grad_(), use_reentrant=True)
    ),
    "per sample": per_sample,
    "bfloat16": lambda m, x: copy.deepcopy(m).bfloat16()(x.bfloat16()).float(),
    "autocast": lambda m, x: torch.autocast("cpu", torch.bfloat16)(m)(x).float(),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("use", USES)
def test_uses(use):
    plain, fused, x = pair()
    close(USES[use](fused, x), USES[use](plain, x), 5e-2 if use in ("bfloat16", "autocast") else 1e-4)


@pytest.mark.parametrize(
    "name", ["prefix, positions", "positions", "sizes of other things", "wider table", "on planes"]
)
def test_autocast_gives_the_dtype_that_it_gave(name):
    model, images = Embeddings(NOTED[name][0]), torch.randn(B, 3, 8, 12)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(images)
        vk.fuse(model)
        out = model(images)
    close(out, expected, 3e-2)


class Taken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


def through_a_function(m, x):
    return Taken.apply(tokens(x) + m.patches)


def checkpointed(reentrant):
    def run(m, x):
        return checkpoint(lambda t: t * t + m.patches, tokens(x) + m.patches, use_reentrant=reentrant)

    return run


INSIDE = {
    "autograd.Function": through_a_function,
    "checkpoint": checkpointed(False),
    "checkpoint, reentrant": checkpointed(True),
}


@pytest.mark.parametrize("name", INSIDE)
def test_what_keeps_tensors_for_itself_inside(name):
    plain, images = Embeddings(INSIDE[name]), torch.randn(B, 3, 8, 12)
    fused = copy.deepcopy(plain)
    vk.fuse(fused)
    expected, expected_gradients = gradients(plain, images)
    out, found = gradients(fused, images)
    close(out, expected)
    for parameter, gradient in expected_gradients.items():
        close(found[parameter], gradient)


def test_a_hook_inside_sees_tensors():
    plain, fused, x = pair()
    for model in (plain, fused):
        model.embeddings.conv.register_forward_hook(lambda module, args, out: F.relu(out))
    close(fused(x), plain(x))
    (entry,) = vk.fuse(fused)
    assert not entry.fused


def test_errors_are_the_librarys():
    plain, fused, _ = pair()
    for images in (torch.randn(B, 3, 8, 16), torch.randn(B, 4, 8, 12), torch.randn(B, 8, 12)):
        with pytest.raises(RuntimeError) as expected:
            plain(images)
        with pytest.raises(RuntimeError) as got:
            fused(images)
        assert str(got.value) == str(expected.value)


def test_what_takes_tensors_only(monkeypatch):
    def run(m, x):
        if type(x) is not torch.Tensor:
            raise TypeError("no tensor")
        return tokens(x)

    model, images = Embeddings(run), torch.randn(B, 3, 8, 12)
    expected = model(images)
    vk.fuse(model)
    monkeypatch.setattr(swapping, "STRICT", False)
    close(model(images), expected)
    monkeypatch.setattr(swapping, "STRICT", True)
    with pytest.raises(TypeError, match="no tensor"):
        model(images)
    assert not pending.noting()


def test_threads_do_not_see_each_other():
    """A convolution called by itself gives a tensor while another thread is inside a front end."""
    inside, leave = threading.Event(), threading.Event()

    def run(m, x):
        inside.set()
        leave.wait(10)
        return tokens(x) + m.patches

    model, images, conv = Embeddings(run), torch.randn(B, 3, 8, 12), nn.Sequential(nn.Conv2d(3, D, 4, 4))
    vk.fuse(model)
    vk.fuse(conv)
    thread = threading.Thread(target=model, args=(images,))
    thread.start()
    assert inside.wait(10)
    assert type(conv(images)) is torch.Tensor
    leave.set()
    thread.join()


def test_keys_and_pickles():
    model = nn.Sequential(Plain(), nn.Linear(D, 2))
    images, keys = torch.randn(B, 3, 8, 12), list(model.state_dict())
    expected = model(images)
    vk.fuse(model)
    assert list(model.state_dict()) == keys
    close(pickle.loads(pickle.dumps(model))(images), expected)
    vk.unfuse(model)
    assert type(model[0]) is Plain
    close(model(images), expected, 0)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, D, 4, 4)
        self.table = nn.Parameter(torch.randn(N, D))

    def forward(self, images):
        return tokens(self.conv(images)) + self.table


def test_the_module_around():
    """The largest that has tables and no other weights."""
    one, two = nn.Sequential(Plain(), nn.LayerNorm(D)), nn.Sequential(Plain(), nn.Linear(D, D))
    for model, embedding in ((one, one), (two, two[0])):
        vk.fuse(model)
        assert [m for m in model.modules() if isinstance(m, pending.Embedding)] == [embedding]
    for model in (nn.Sequential(nn.Conv2d(3, D, 4, 4), nn.LayerNorm((2, 3))), nn.ModuleList([nn.Conv2d(3, D, 4, 4)])):
        (entry,) = vk.fuse(model)
        assert entry.note == "projection only"


CUTS = {  # order of the axes [B, C, G_h, P_h, G_w, P_w], whether these are patches in raster order
    "channels last": ((0, 2, 4, 3, 5, 1), True),
    "channels first": ((0, 2, 4, 1, 3, 5), True),
    "columns of a patch first": ((0, 2, 4, 1, 5, 3), True),
    "columns of patches first": ((0, 4, 2, 3, 5, 1), False),
    "patches of strided pixels": ((0, 3, 5, 2, 4, 1), False),
    "not cut": ((0, 1, 2, 3, 4, 5), False),
}


@pytest.mark.parametrize("name", CUTS)
def test_images_that_are_cut_for_a_linear(name):
    order, raster = CUTS[name]
    images = torch.randn(B, 2, 8, 12)
    cut = (B, 2, 2, 4, 2, 6)  # P_h = 4, P_w = 6
    weight, bias = torch.randn(D, 48), torch.randn(D)

    def projected(x):
        return F.linear(x.view(*cut).permute(*order).reshape(B, 4, 48).flatten(2), weight, bias)

    if raster:
        close(pending.computed(projected(pixels.Pixels(images, "auto"))), projected(images))
    else:
        with pytest.raises(pending.Elsewhere):
            projected(pixels.Pixels(images, "auto"))


def test_images_that_something_else_is_done_with():
    images = pixels.Pixels(torch.randn(B, 2, 8, 12), "auto")
    for other in (lambda x: x.mean(), lambda x: F.relu(x), lambda x: F.linear(x, torch.randn(D, 12))):
        with pytest.raises(pending.Elsewhere):
            other(images)
