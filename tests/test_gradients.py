"""Training a fused model, with what people train with: every step as the unfused model's."""

import copy
import io
import pickle
import shutil
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import vitkernels as vk

vision_transformer = pytest.importorskip("timm.models.vision_transformer")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),  # Triton 3.6
]
BACKENDS = ("reference", "triton")
HAS_COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))
COMPILERS = (
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.skipif(not HAS_COMPILER, reason="inductor needs a C++ compiler")),
)


def model(**kwargs) -> nn.Module:
    """The same ViT at every call."""
    torch.manual_seed(0)
    sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
    vit = vision_transformer.VisionTransformer(**{**sizes, **kwargs})
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.2)
    return vit


def fused(backend="auto", **kwargs) -> nn.Module:
    return fuse(model(**kwargs), backend)


def fuse(vit: nn.Module, backend="auto") -> nn.Module:
    report = vk.fuse(vit, backend)
    assert [entry.fused for entry in report] == [True], report
    return vit


def batch(B=4, seed=0, **kwargs):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, 3, 32, 32, generator=g, **kwargs), torch.randint(5, (B,), generator=g)


def loss_of(vit, images, labels, reduction="mean"):
    return nn.functional.cross_entropy(vit(images).float(), labels, reduction=reduction)


def train(vit, steps=3, lr=0.1, optimiser=torch.optim.SGD, **options):
    """The parameters after some steps."""
    optimiser = optimiser([p for p in vit.parameters() if p.requires_grad], lr=lr, **options)
    for step in range(steps):
        optimiser.zero_grad()
        loss_of(vit, *batch(seed=step)).backward()
        optimiser.step()
    return parameters(vit)


def parameters(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters()}


def same(found, expected, tolerance=1e-4):
    """Tensors by name, each within `tolerance` of its largest value; 0 asks for the same bits."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] is None) == (value is None), name
        if value is not None:
            assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype), name
            error, size = (found[name].double() - value.double()).abs().max(), value.abs().max().clamp(min=1e-3)
            assert error <= tolerance * size, f"{name}: {error:.3g} of {size:.3g}"


def backward_of(vit, *args):
    loss_of(vit, *(args or batch())).backward()
    return gradients(vit)


# Precision


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_and_a_step_that_is_skipped(backend, dtype):
    """Autocast and GradScaler; the gradients of step 1 are not finite, so its step is not taken."""

    def run(vit):
        optimiser = torch.optim.SGD(vit.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        scales, kept = [], []
        for step in range(3):
            before = parameters(vit)
            optimiser.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = loss_of(vit, *batch(seed=step))
            scaler.scale(loss * float("inf") if step == 1 else loss).backward()
            assert all(p.grad.dtype == torch.float32 for p in vit.parameters())
            scaler.step(optimiser)
            scaler.update()
            scales.append(scaler.get_scale())
            kept.append(all(torch.equal(p, before[name]) for name, p in vit.named_parameters()))
        assert kept == [False, True, False]
        assert scales == [2.0**10, 2.0**9, 2.0**9]
        return parameters(vit)

    same(run(fused(backend)), run(model()), 6e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_in_another_dtype(dtype):
    found, expected = backward_of(fused().to(dtype), *dtyped(dtype)), backward_of(model().to(dtype), *dtyped(dtype))
    same(found, expected, 0.1 if dtype == torch.bfloat16 else 1e-10)


def dtyped(dtype):
    images, labels = batch()
    return images.to(dtype), labels


# Compilers and checkpoints


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled_whole_for_every_batch(compiler):
    torch.compiler.reset()
    vit, plain = fused(depth=1), model(depth=1)
    graphs, counts = CompileCounterWithBackend(compiler), set()
    compiled = torch.compile(vit, fullgraph=True, dynamic=True, backend=graphs)
    for B in (4, 3, 7):
        vit.zero_grad()
        plain.zero_grad()
        loss_of(compiled, *batch(B, seed=B)).backward()
        same(gradients(vit), backward_of(plain, *batch(B, seed=B)))
        counts.add(graphs.frame_count)
    assert len(counts) == 1


def test_compiled_under_autocast():
    torch.compiler.reset()
    vit = fused(depth=1)
    compiled = torch.compile(vit, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(compiled, *batch()).backward()
        expected = backward_of(fused(depth=1))
    same(gradients(vit), expected, 1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", ["timm", "front end", "front end, reentrant", "whole", "whole, reentrant"])
def test_activation_checkpoints(way, backend):
    vit = fused(backend)
    reentrant = way.endswith("reentrant")
    images, labels = batch()
    if way == "timm":
        vit.set_grad_checkpointing()
        loss_of(vit, images, labels).backward()
    elif way.startswith("whole"):
        y = checkpoint(vit, images.requires_grad_(), use_reentrant=reentrant)
        nn.functional.cross_entropy(y, labels).backward()
    else:
        p = vit.patch_embed.proj

        def front(images, weight, bias, pos_embed, prefix):
            return vk.patch_embed(images, weight, bias, pos_embed=pos_embed, prefix=prefix, backend=backend)

        tokens = checkpoint(front, images, p.weight, p.bias, vit.pos_embed, vit.cls_token, use_reentrant=reentrant)
        y = vit.forward_head(vit.norm(vit.blocks(tokens)))
        nn.functional.cross_entropy(y, labels).backward()
    same(gradients(vit), backward_of(model()))


def test_saved_tensors_elsewhere():
    """Offloading by hooks (activations on the host, FSDP's and torchtune's) packs what the Function saves."""
    vit, packed = fused(), []

    def pack(t):
        packed.append(t.data_ptr())
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = loss_of(vit, *batch())
    loss.backward()
    assert vit.patch_embed.proj.weight.data_ptr() in packed
    same(gradients(vit), backward_of(model()))


# Accumulation, and what hangs on parameters


@pytest.mark.parametrize("to_none", [True, False])
def test_micro_batches_make_one_batch(to_none):
    images, labels = batch(6)
    vit, plain = fused(), model()
    for _ in range(2):  # the second time, gradients are None or zeros of before
        vit.zero_grad(set_to_none=to_none)
        plain.zero_grad(set_to_none=to_none)
        for part in (slice(0, 1), slice(1, 3), slice(3, 6)):
            (loss_of(vit, images[part], labels[part], "sum") / 6).backward()
        same(gradients(vit), backward_of(plain, images, labels))


def test_hooks_on_parameters_see_each_gradient_once():
    vit, plain = fused(), model()
    seen = {vit: {}, plain: {}}
    for each, names in seen.items():
        for name, p in each.named_parameters():
            if "blocks" not in name:
                p.register_hook(lambda g, n=name, names=names: names.setdefault(n, []).append(g.clone()) or 2 * g)
                p.register_post_accumulate_grad_hook(lambda p, n=name, names=names: names[n].append(p.grad.clone()))
        backward_of(each)
    assert {n: len(g) for n, g in seen[vit].items()} == dict.fromkeys(seen[plain], 2)
    for i in range(2):
        same(*({n: g[i] for n, g in seen[each].items()} for each in (vit, plain)))
    same(gradients(vit), gradients(plain))


def step_at_once(optimiser, _):
    optimiser.step()
    optimiser.zero_grad()


def test_optimiser_in_the_backward():
    """A step in the post-accumulate hook, the gradient freed at once."""

    def run(vit):
        for p in vit.parameters():
            optimiser = torch.optim.SGD([p], lr=0.1)
            p.register_post_accumulate_grad_hook(partial(step_at_once, optimiser))
        for step in range(3):
            loss_of(vit, *batch(seed=step)).backward()
        assert all(p.grad is None for p in vit.parameters())
        return parameters(vit)

    same(run(fused()), run(model()))


OPTIMISERS = {
    "SGD, foreach": partial(torch.optim.SGD, momentum=0.9, foreach=True),
    "AdamW, foreach": partial(torch.optim.AdamW, foreach=True, eps=1e-3),
    "AdamW, fused": partial(torch.optim.AdamW, fused=True, eps=1e-3),
    "Adagrad, fused": partial(torch.optim.Adagrad, fused=True, eps=1e-3),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_optimisers(name):
    run = partial(train, optimiser=OPTIMISERS[name], lr=1e-2)
    same(run(fused()), run(model()), 1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_gradients_lie_as_their_parameters(channels_last, in_chans, backend):
    vit = fused(backend, in_chans=in_chans)
    if channels_last:
        vit = vit.to(memory_format=torch.channels_last)
    images, labels = batch()
    loss_of(vit, images[:, :in_chans], labels).backward()
    for name, p in vit.named_parameters():
        assert p.grad.stride() == p.stride(), name
    weight = vit.patch_embed.proj.weight
    assert weight.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strictly", [False, True])
def test_the_same_steps_give_the_same_bits(backend, strictly):
    torch.use_deterministic_algorithms(strictly)
    try:
        same(train(fused(backend)), train(fused(backend)), 0)
    finally:
        torch.use_deterministic_algorithms(False)


# Frozen

FROZEN = {
    "projection": ["patch_embed.proj.weight", "patch_embed.proj.bias"],  # MoCo v3
    "weight": ["patch_embed.proj.weight"],
    "position": ["pos_embed"],
    "class token": ["cls_token"],
    "front end": ["patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed", "cls_token"],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", FROZEN)
def test_frozen(what, backend):
    def run(vit):
        for name in FROZEN[what]:
            vit.get_parameter(name).requires_grad_(False)
        return backward_of(vit)

    found = run(fused(backend))
    assert {name for name, g in found.items() if g is None} == set(FROZEN[what])
    same(found, run(model()))


def test_all_frozen_makes_no_graph():
    vit = fused().requires_grad_(False)
    assert vit(batch()[0]).grad_fn is None
    images = batch()[0].requires_grad_()
    vit(images).sum().backward()
    expected = batch()[0].requires_grad_()
    model().requires_grad_(False)(expected).sum().backward()
    same({"images": images.grad}, {"images": expected.grad})


# torch.func on the model


def per_sample(vit, images, labels):
    state = {name: p.detach() for name, p in vit.named_parameters()}

    def loss(state, image, label):
        y = torch.func.functional_call(vit, state, (image[None],))
        return nn.functional.cross_entropy(y, label[None])

    return torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(state, images, labels)


@pytest.mark.parametrize("backend", BACKENDS)
def test_per_sample_gradients(backend):
    images, labels = batch(3)
    found = per_sample(fused(backend), images, labels)
    same(found, per_sample(model(), images, labels))
    plain = model()
    for i in range(3):
        plain.zero_grad()
        same({n: g[i] for n, g in found.items()}, backward_of(plain, images[i : i + 1], labels[i : i + 1]))


def test_ensembles():
    models = [fused() for _ in range(3)]
    for i, each in enumerate(models):
        with torch.no_grad():
            for p in each.parameters():
                p.mul_(1 + 0.1 * i)
    state, buffers = torch.func.stack_module_state(models)
    images = batch()[0]

    def call(state, buffers, images):
        return torch.func.functional_call(models[0], (state, buffers), (images,))

    y = torch.func.vmap(call, (0, 0, None))(state, buffers, images)
    same(dict(enumerate(y.detach())), {i: each(images).detach() for i, each in enumerate(models)})
    y.square().sum().backward()
    for i, each in enumerate(models):
        each(images).square().sum().backward()
        same({n: t.grad[i] for n, t in state.items()}, gradients(each))


@pytest.mark.parametrize("layer", [vk.PatchEmbed(32, 8, embed_dim=16, mean=0.4, std=0.3)])
def test_layer_under_torch_func(layer):
    images = torch.rand(3, 3, 32, 32)
    state = {n: p.detach() for n, p in layer.named_parameters()}

    def loss(state, image):
        return torch.func.functional_call(layer, state, (image[None],)).sin().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(state, images)
    for i in range(3):
        layer.zero_grad()
        layer(images[i : i + 1]).sin().sum().backward()
        same({n: g[i] for n, g in found.items()}, gradients(layer), 1e-5)


def test_one_step_of_maml():
    """A gradient through a step of gradient descent."""

    def run(vit):
        names, values = zip(*vit.named_parameters(), strict=True)
        inner = torch.autograd.grad(loss_of(vit, *batch(seed=1)), values, create_graph=True)
        adapted = {n: p - 0.05 * g for n, p, g in zip(names, values, inner, strict=True)}
        images, labels = batch(seed=2)
        nn.functional.cross_entropy(torch.func.functional_call(vit, adapted, (images,)), labels).backward()
        return gradients(vit)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the others have no second derivative
        same(run(fused()), run(model()), 1e-3)


# Copies


def test_exponential_moving_average():
    utils = pytest.importorskip("timm.utils")

    def run(vit, before=lambda vit: vit, after=lambda vit: vit):
        vit = before(vit)
        average = utils.ModelEmaV3(vit, decay=0.5)
        after(vit)
        for step in range(3):
            train(vit, 1, lr=0.1 + step)
            average.update(vit)
        return parameters(average.module), average.module.eval()(batch()[0])

    expected, y = run(model())
    for found, tokens in (run(model(), before=fuse), run(model(), after=fuse)):
        same(found, expected)
        same({"y": tokens}, {"y": y})


@pytest.mark.parametrize("multi", [torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), None])
def test_averaged_model(multi):
    def run(vit):
        average = torch.optim.swa_utils.AveragedModel(vit, multi_avg_fn=multi)
        for _ in range(3):
            train(vit, 1)
            average.update_parameters(vit)
        return parameters(average), average(batch()[0]).detach()

    (found, y), (expected, z) = run(fused()), run(model())
    same({**found, "y": y}, {**expected, "y": z})


def saved(vit):
    memory = io.BytesIO()
    torch.save(vit, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda vit: pickle.loads(pickle.dumps(vit)), "save": saved}


@pytest.mark.parametrize("way", COPIES)
def test_copies_train_on(way):
    vit, plain = fused(), model()
    train(vit, 1)
    train(plain, 1)
    other = COPIES[way](vit)
    expected = train(plain)
    same(train(other), expected)
    same(train(vit), expected)  # and the copy shares nothing with its model
    again = model()
    again.load_state_dict(other.state_dict(), strict=True)
    other.load_state_dict(again.state_dict(), strict=True)
    images = batch()[0]
    same({"y": other(images).detach()}, {"y": again(images).detach()})


# Parametrised projections


@pytest.mark.parametrize("first", ["fuse", "wrap"])
def test_weight_norm_is_left_alone(first):
    def wrap(vit):
        torch.nn.utils.parametrizations.weight_norm(vit.patch_embed.proj)
        return vit

    vit = model()
    if first == "fuse":
        wrap(fuse(vit))
    else:
        report = vk.fuse(wrap(vit))
        assert [e.fused for e in report] == [False]
        assert "Parametrized" in report[0].note
    same(train(vit), train(wrap(model())))


# LoRA


def lora(vit, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["patch_embed.proj", "qkv"], init_lora_weights=False, **options)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(vit, config)


@pytest.mark.parametrize("first", ["fuse", "wrap"])
def test_lora_on_the_projection(first):
    if first == "fuse":
        wrapped = lora(fused())
    else:
        wrapped = lora(model())
        report = vk.fuse(wrapped)
        assert [e.fused for e in report] == [True]  # the convolution that LoRA wraps
        assert report[0].note.startswith("projection only: patch_embed.proj is a")
    expected = lora(model())
    assert any("patch_embed.proj.lora_A" in name for name, p in wrapped.named_parameters() if p.requires_grad)
    same(train(wrapped), train(expected))

    images = batch()[0]
    y = expected.eval()(images).detach()
    merged = wrapped.eval().merge_and_unload()
    assert [e.fused for e in vk.fuse(merged)] == [True]
    same({"y": merged(images).detach()}, {"y": y}, 1e-3)


def test_lora_beside_the_projection_stays_fused():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["qkv"], init_lora_weights=False)

    def wrapped(vit):
        torch.manual_seed(1)
        return peft.get_peft_model(vit, config)

    vit = wrapped(model())
    assert [e.fused for e in vk.fuse(vit)] == [True]
    expected = train(wrapped(model()))
    same(train(vit), expected)
    same(train(wrapped(fused())), expected)
