"""What PyTorch was told: schemas, fakes, compile, export, FLOPs; and what the package costs before it is called."""

import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import vitkernels as vk
from vitkernels import dispatch
from vitkernels.problem import arguments_of
from vitkernels.testing import accuracy, oracle, random_problems

OP, OP_BACKWARD = torch.ops.vitkernels.patch_embed.default, torch.ops.vitkernels.patch_embed_backward.default
TENSORS = ("images", "weight", "bias", "pos_embed", "prefix", "keep")
HAS_COMPILER = shutil.which("g++") or shutil.which("clang++")


def op_arguments(arguments, backend="reference"):
    """The positional arguments of the registered op."""
    names = ("stride", "padding", "mean", "std", "scale", "out_dtype")
    rest = (arguments.get(n, 0 if n == "padding" else None) for n in names)
    return *(arguments.get(n) for n in TENSORS), *arguments_of(arguments["images"], arguments["weight"], *rest), backend


def call_arguments(B=2, video=False, dtype=torch.float32, pixels=torch.float32, **more):
    g = torch.Generator().manual_seed(0)
    size, patch = ([4, 8, 12], [2, 4, 4]) if video else ([8, 12], [4, 4])
    N, T, D = (12 if video else 6), 2, 5

    def normal(*shape):
        return torch.randn(shape, generator=g).to(dtype)

    images = (torch.rand([B, 3, *size], generator=g) * 255).to(pixels)
    tables = dict(bias=normal(D), pos_embed=normal(1, T + N, D), prefix=normal(T, D))
    return dict(images=images, weight=normal(D, 3, *patch), **tables) | more


def permuted(t):
    """The same tensor with its dimensions in another order in memory: dense, and not contiguous."""
    order = (0, *range(2, t.ndim), 1) if t.ndim > 2 else tuple(reversed(range(t.ndim)))
    return t.permute(order).contiguous().permute([order.index(d) for d in range(t.ndim)])


KEEP = torch.tensor([[0, 5, 5], [1, 2, 3]])
CHECKED = {
    "contiguous": call_arguments(),
    "images channels-last": call_arguments(images=permuted(call_arguments()["images"])),
    "weight channels-last": call_arguments(weight=permuted(call_arguments()["weight"])),
    "all permuted": {n: permuted(t) for n, t in call_arguments().items()},
    "pos_embed transposed": call_arguments(pos_embed=torch.randn(2, 5, 6).mT),
    "prefix transposed, per image": call_arguments(prefix=torch.randn(2, 5, 2).mT),
    "position of the patches alone, per image": call_arguments(pos_embed=torch.randn(2, 6, 5)),
    "video": call_arguments(video=True),
    "uint8 to bf16": call_arguments(dtype=torch.bfloat16, pixels=torch.uint8, mean=(0.1, 0.2, 0.3), std=(1, 2, 3)),
    "keep": call_arguments(keep=KEEP),
    "keep transposed": call_arguments(keep=KEEP.int().t().contiguous().t(), pos_embed=torch.randn(2, 6, 5)),
    "overlap, padding": call_arguments(stride=(4, 3), padding=(0, 1), pos_embed=None, out_dtype=torch.float64),
    "weight alone": dict(images=torch.rand(2, 3, 8, 12), weight=torch.randn(5, 3, 4, 4)),
    "no images": call_arguments(B=0),
    "sliced": call_arguments(
        images=torch.rand(2, 3, 16, 24)[..., ::2, 1::2], pos_embed=torch.randn(1, 8, 10)[..., ::2]
    ),
}


@pytest.mark.parametrize("name", CHECKED)
def test_opcheck(name, device):
    tensors = {n: t.to(device).detach() for n, t in CHECKED[name].items() if isinstance(t, torch.Tensor)}
    arguments = {**CHECKED[name], **tensors}
    args = op_arguments(arguments, "auto")
    torch.library.opcheck(OP, args)
    grad = torch.randn(OP(*args).shape, device=device)
    needs = [arguments.get(n) is not None and arguments[n].is_floating_point() for n in TENSORS[:5]]
    torch.library.opcheck(OP_BACKWARD, (grad, *args, needs))
    for t in (grad, *args):  # and with what autograd records
        if isinstance(t, torch.Tensor) and t.is_floating_point():
            t.requires_grad_()
    torch.library.opcheck(OP, args)
    torch.library.opcheck(OP_BACKWARD, (grad, *args, needs))


@pytest.mark.parametrize("name", CHECKED)
def test_fakes_are_like_the_results(name):
    arguments = CHECKED[name]
    tensors = {n: t for n, t in arguments.items() if isinstance(t, torch.Tensor)}

    def results(tensors, grad_of):
        args = op_arguments({**arguments, **tensors})
        y = OP(*args)
        needs = [n in tensors and tensors[n].is_floating_point() for n in TENSORS[:5]]
        return [y, *OP_BACKWARD(grad_of(y), *args, needs)]

    real = results(tensors, torch.ones_like)
    meta = results({n: t.to("meta") for n, t in tensors.items()}, torch.ones_like)
    assert len(real) == len(meta)
    for r, m in zip(real, meta, strict=True):
        assert (r.shape, r.dtype, r.stride()) == (m.shape, m.dtype, m.stride())
    assert real[0].is_contiguous()
    inputs = [tensors[n] for n in TENSORS[:5] if n in tensors and tensors[n].is_floating_point()]
    for g, like in zip(real[1:], map(torch.empty_like, inputs), strict=True):  # an optimiser copies nothing
        assert (g.shape, g.dtype, g.stride()) == (like.shape, like.dtype, like.stride())


def test_on_meta_as_on_the_cpu():
    y = vk.patch_embed(**{n: t.to("meta") for n, t in call_arguments().items()})
    assert (y.device.type, y.shape) == ("meta", (2, 8, 5))


class Front(torch.nn.Module):
    def __init__(self, **rest):
        super().__init__()
        self.rest = rest
        arguments = call_arguments()
        for name in ("weight", "bias", "pos_embed", "prefix"):
            setattr(self, name, torch.nn.Parameter(arguments[name]))

    def forward(self, images, keep=None):
        return vk.patch_embed(
            images, self.weight, self.bias, pos_embed=self.pos_embed, prefix=self.prefix, keep=keep, **self.rest
        ).sin()  # fmt: skip


def gradients(model, f, *args):
    model.zero_grad()
    y = f(*args)
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters())]


needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="inductor needs a C++ compiler on a CPU")


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
@pytest.mark.parametrize("rest", [{}, dict(mean=(0.1, 0.2, 0.3), std=0.5, scale=0.1)], ids=["plain", "normalised"])
def test_compiles_whole(compiler, rest):
    torch.compiler.reset()
    model = Front(**rest)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    for images in (torch.rand(2, 3, 8, 12), permuted(torch.rand(2, 3, 8, 12))):
        for ours, eager in zip(gradients(model, compiled, images), gradients(model, model, images), strict=True):
            torch.testing.assert_close(ours, eager)
        with torch.no_grad():
            torch.testing.assert_close(compiled(images), model(images))


def test_compiles_once_for_every_batch():
    torch.compiler.reset()
    model, graphs = Front(), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    for B in (2, 3, 7):
        images = torch.rand(B, 3, 8, 12)
        torch.testing.assert_close(compiled(images), model(images))
    assert len(graphs) == 1


def test_compiles_with_keep_and_dynamic_batch():
    torch.compiler.reset()
    model = Front()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for B, n in ((2, 3), (3, 4), (5, 2)):
        images, keep = torch.rand(B, 3, 8, 12), torch.randint(6, (B, n))
        found, expected = (gradients(model, f, images, keep) for f in (compiled, model))
        for ours, eager in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, eager)


def test_compiles_under_autocast():
    torch.compiler.reset()
    model = Front()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        ours, eager = compiled(torch.ones(2, 3, 8, 12)), model(torch.ones(2, 3, 8, 12))
    assert ours.dtype == eager.dtype == torch.bfloat16
    torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("frozen", [True, False])
def test_exports_with_dynamic_batch(frozen):
    model = Front().requires_grad_(not frozen)
    B = torch.export.Dim("B", min=2, max=64)
    program = torch.export.export(model, (torch.rand(4, 3, 8, 12),), dynamic_shapes=({0: B},))
    assert any(node.target is OP for node in program.graph.nodes)
    for batch in (2, 9):
        images = torch.rand(batch, 3, 8, 12)
        torch.testing.assert_close(program.module()(images), model(images))


@pytest.mark.parametrize("keep", [None, KEEP])
@pytest.mark.parametrize("prefix", [True, False])
def test_counts_its_flops(keep, prefix):
    arguments = call_arguments(keep=keep)
    if not prefix:
        arguments |= dict(prefix=None, pos_embed=None)
    with FlopCounterMode(display=False) as counter:
        vk.patch_embed(**arguments)
    assert counter.get_total_flops() == 2 * 2 * (6 if keep is None else 3) * 48 * 5


def test_counts_its_flops_backwards():
    arguments = call_arguments()
    for name in ("images", "weight"):
        arguments[name].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        vk.patch_embed(**arguments).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 2 * 6 * 48 * 5


def test_explains_itself():
    explanation = vk.explain(**call_arguments())
    assert list(explanation) == ["triton", "cuda", "reference"]
    assert explanation["reference"] == []
    assert explanation["cuda"]
    assert explanation.chosen == "reference"
    lines = str(explanation).splitlines()
    assert lines[0] == "B=2 C=3 8x12 patch 4x4 D=5 T=2 float32 -> float32"
    assert lines[-1].startswith("  reference auto takes it, multiplying in float32")
    assert [line.split()[:2] for line in lines[1:-1]] == [["triton", *lines[1].split()[1:2]], ["cuda", "no:"]]


def test_auto_takes_the_first_that_can(device):
    arguments = {n: t.to(device) for n, t in call_arguments().items()}
    explanation = vk.explain(**arguments)
    if device == "cuda":
        tried = dispatch.row_of(explanation.problem, "forward").backends
        assert explanation.chosen == next(n for n in tried if not explanation[n])
    else:  # Triton's interpreter is no backend that anybody wants by default
        assert explanation.chosen == "reference"
    assert torch.equal(vk.patch_embed(**arguments), vk.patch_embed(**arguments, backend=explanation.chosen))


@pytest.mark.parametrize("seed", range(3000, 3030))
def test_random_problems_through_aot(seed):
    """Fakes, strides and dtypes of random problems, forward and backward, as the compiler's runtime asserts them."""
    torch.compiler.reset()
    arguments = random_problems.case(seed, max_work=1 << 16).tensors()
    expected = accuracy.evaluate(vk.patch_embed, arguments)
    found = accuracy.evaluate(torch.compile(vk.patch_embed, fullgraph=True, backend="aot_eager"), arguments)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)


# Derivatives of every order

EAGER = oracle.eager  # the chain that is replaced, differentiated by PyTorch


def leaves_of(arguments):
    return {n: arguments[n] for n in oracle.LEARNT if arguments.get(n) is not None and arguments[n].is_floating_point()}


def weighed(tensors, seed):
    """A number from tensors, by random weights; a third of them is left out."""
    g = torch.Generator().manual_seed(seed)
    drawn = [(t * torch.randn(t.shape, generator=g, dtype=t.dtype)).sum() for t in tensors]
    return sum(drawn[i] for i in range(len(drawn)) if len(drawn) == 1 or i % 3 != seed % 3)


def derivatives(call, arguments, seed):
    """First, second and third derivatives of a function of the tokens, in all that is learnt, by name."""
    leaves = {n: t.detach().clone().requires_grad_() for n, t in leaves_of(arguments).items()}
    found, total = {}, call(**{**arguments, **leaves}).sin().square().sum()
    for order in range(1, 4):
        options = dict(create_graph=True, materialize_grads=True)
        grads = torch.autograd.grad(total, list(leaves.values()), **options)
        found |= {f"{n} {order}": g.detach() for n, g in zip(leaves, grads, strict=True)}
        total = weighed(grads, seed + order)
    return found


DOUBLE = dict(image_dtype=torch.float64, weight_dtype=torch.float64, out_dtype=None, scale=0.9, contrast=1, gain=1)


def assert_same(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype), name
        bound = tolerance * max(1.0, value.abs().max().item() if value.numel() else 0.0)
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


SEEDS = {"reference": range(6000, 6060), "triton": range(6060, 6066)}


@pytest.mark.parametrize(("backend", "seed"), [(b, s) for b, seeds in SEEDS.items() for s in seeds])
def test_derivatives_of_random_problems(backend, seed):
    arguments = random_problems.case(
        seed, 1 << 13, **DOUBLE, mean=0.4 if seed % 2 else None, std=0.7 if seed % 3 else None
    )
    arguments = arguments.tensors()
    if reasons := vk.explain(**arguments)[backend]:
        pytest.skip(f"{backend}: {'; '.join(reasons)}")
    found = derivatives(partial(vk.patch_embed, backend=backend), arguments, seed)
    assert_same(found, derivatives(EAGER, arguments, seed))


def small(**change):
    return call_arguments(dtype=torch.float64, pixels=torch.float64, images=torch.rand(2, 3, 8, 8).double()) | {
        "pos_embed": torch.randn(1, 6, 5).double(), "mean": (0.1, 0.2, 0.3), "std": (1.0, 0.5, 2.0), **change
    }  # fmt: skip


CHECKED_TWICE = {
    "plain": {},
    "alone": dict(bias=None, pos_embed=None, prefix=None, mean=None, std=None),
    "kept": dict(keep=torch.tensor([[0, 3, 3], [2, 1, 0]]), pos_embed=torch.randn(2, 4, 5).double()),
    "overlapping": dict(stride=(3, 2), padding=(0, 1), pos_embed=None, prefix=torch.randn(2, 1, 5).double()),
    "video": dict(images=torch.rand(1, 2, 3, 4, 4).double(), weight=torch.randn(5, 2, 2, 4, 2).double(),
                  stride=(1, 4, 2), mean=(0.3, 0.4), std=0.5, pos_embed=torch.randn(6, 5).double()),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKED_TWICE)
def test_gradcheck(name):
    arguments = small(**CHECKED_TWICE[name])
    names = list(leaves_of(arguments))

    def call(*leaves):
        return vk.patch_embed(**{**arguments, **dict(zip(names, leaves, strict=True))})

    leaves = [arguments[n].requires_grad_() for n in names]
    torch.autograd.gradcheck(call, leaves, fast_mode=True, check_forward_ad=True)
    torch.autograd.gradgradcheck(call, leaves, fast_mode=True, check_fwd_over_rev=True)


@pytest.mark.parametrize("learnt", [("weight",), ("images",), ("bias", "prefix"), ("weight", "images")])
def test_second_derivatives_of_some(learnt):
    """What is not learnt gets none, and where only tables are learnt the second derivative is that of the loss."""
    arguments = small()

    def second(call):
        leaves = {n: arguments[n].detach().clone().requires_grad_() for n in learnt}
        loss = call(**{**arguments, **leaves}).pow(3).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        sum(g.square().sum() for g in grads).backward()
        return {n: t.grad for n, t in leaves.items()}

    assert_same(second(vk.patch_embed), second(EAGER))


def test_gradient_penalty_in_16_bits():
    """Wasserstein's critic: the norm of the images' gradient, trained under autocast."""
    arguments = call_arguments(dtype=torch.float32)
    arguments["images"] /= 255

    def penalty(call):
        weight, images = (arguments[n].detach().clone().requires_grad_() for n in ("weight", "images"))
        with torch.autocast("cpu", torch.bfloat16):
            score = call(**arguments | dict(weight=weight, images=images)).tanh().sum()
            (slope,) = torch.autograd.grad(score, images, create_graph=True)
            (slope.flatten(1).norm(dim=1) - 1).square().sum().backward()
        return weight.grad

    ours, theirs = penalty(vk.patch_embed), penalty(EAGER)
    assert ours.dtype == torch.float32
    assert (ours - theirs).norm() <= 0.05 * theirs.norm()


# torch.func

func = torch.func
P = {n: t.double() for n, t in call_arguments().items()}
IMAGES = P.pop("images") / 255
STACKED = {n: torch.stack([t, -t, t + 1]) for n, t in P.items()}
TABLES = torch.randn(2, 2, 8, 5, dtype=torch.float64)  # of two batches of two images


def transformed(call):
    """What torch.func makes of a call, by name."""

    def f(p, x):
        return call(**p, images=x, mean=(0.1, 0.2, 0.3), std=0.5)

    def loss(p, x):
        return f(p, x).sin().sum()

    def one(p, x):
        return loss(p, x[None])

    def of(name, p=P):
        return lambda t, x=IMAGES: f({**p, name: t}, x)

    def norm(p, x):
        return sum(g.square().sum() for g in func.grad(loss, (0, 1))(p, x)[0].values())

    batches = torch.stack([IMAGES, IMAGES.flip(0)])
    kept = torch.tensor([[[0, 1], [1, 5]], [[2, 2], [3, 0]]])
    return {
        "grad": lambda: func.grad(loss, (0, 1))(P, IMAGES),
        "vjp": lambda: func.vjp(f, P, IMAGES)[1](torch.ones(2, 8, 5).double()),
        "vmap": lambda: func.vmap(f, (None, 0))(P, batches),
        "vmap, second dimension": lambda: func.vmap(f, (None, 1), 2)(P, batches),
        "vmap of tables": lambda: func.vmap(of("pos_embed"), (0, None))(STACKED["pos_embed"], IMAGES),
        "vmap of tables per image": lambda: func.vmap(of("pos_embed"))(TABLES, batches),
        "vmap of kept": lambda: func.vmap(lambda k, x: f({**P, "keep": k}, x))(kept, batches),
        "vmap of kept alone": lambda: func.vmap(lambda k: f({**P, "keep": k}, IMAGES))(kept),
        "per sample": lambda: func.vmap(func.grad(one, (0, 1)), (None, 0))(P, IMAGES),
        "per sample, images": lambda: func.vmap(func.grad(one, 1), (None, 0))(P, IMAGES),
        "ensemble": lambda: func.vmap(f, (0, None))(STACKED, IMAGES),
        "ensemble's gradients": lambda: func.vmap(func.grad(loss), (0, None))(STACKED, IMAGES),
        "ensemble's, images": lambda: func.vmap(func.grad(loss, 1), (0, None))(STACKED, IMAGES),
        "ensemble's per sample": lambda: func.vmap(func.vmap(func.grad(one), (None, 0)), (0, None))(STACKED, IMAGES),
        "jacrev": lambda: func.jacrev(of("weight"))(P["weight"], IMAGES[:1]),
        "jacrev of images": lambda: func.jacrev(lambda x: f(P, x))(IMAGES[:1]),
        "jvp": lambda: func.jvp(f, (P, IMAGES), (P, IMAGES)),
        "jvp of bytes": lambda: func.jvp(lambda p: f(p, (IMAGES * 255).byte()), (P,), (P,)),
        "jacfwd": lambda: func.jacfwd(of("prefix"))(P["prefix"]),
        "linearize": lambda: func.linearize(lambda p: f(p, IMAGES), P)[1](P),
        "hessian": lambda: func.hessian(lambda w: loss({**P, "weight": w}, IMAGES[:1]))(P["weight"]),
        "Hessian times vector": lambda: func.jvp(func.grad(loss, (0, 1)), (P, IMAGES), (P, IMAGES)),
        "reverse twice": lambda: func.grad(norm, (0, 1))(P, IMAGES),
        "reverse three times": lambda: func.grad(lambda p: func.grad(norm, 1)(p, IMAGES).square().sum())(P),
    }


TRANSFORMED, EXPECTED = transformed(vk.patch_embed), transformed(EAGER)


def flat(tree):
    return dict(enumerate(torch.utils._pytree.tree_leaves(tree)))


@pytest.mark.parametrize("name", TRANSFORMED)
def test_torch_func(name):
    assert_same(flat(TRANSFORMED[name]()), flat(EXPECTED[name]()))


@pytest.mark.parametrize("name", ["grad", "per sample", "ensemble", "jvp", "reverse twice", "Hessian times vector"])
def test_torch_func_compiled(name):
    torch.compiler.reset()
    found = torch.compile(TRANSFORMED[name], fullgraph=True, backend="aot_eager")()
    assert_same(flat(found), flat(EXPECTED[name]()))


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops.append(op)
        return op(*args, **(kwargs or {}))


def test_vmap_below_ordinary_autograd():
    """One call for all images, and one for the gradient."""
    leaves = {n: t.detach().clone().requires_grad_() for n, t in P.items()}
    batches = torch.stack([IMAGES] * 4)
    with Seen() as seen:
        func.vmap(lambda x: vk.patch_embed(images=x, **leaves))(batches).sin().sum().backward()
    assert [op for op in seen.ops if op.namespace == "vitkernels"] == [OP, OP_BACKWARD]
    other = {n: t.detach().clone().requires_grad_() for n, t in P.items()}
    EAGER(images=batches.flatten(0, 1), **other).sin().sum().backward()
    assert_same({n: t.grad for n, t in leaves.items()}, {n: t.grad for n, t in other.items()})


@pytest.mark.parametrize("over_reverse", [False, True])
def test_forward_mode(over_reverse):
    def tangents(call):
        with torch.autograd.forward_ad.dual_level():
            leaves = {n: t.detach().clone().requires_grad_(over_reverse) for n, t in P.items()}
            duals = {n: torch.autograd.forward_ad.make_dual(t, t + 1) for n, t in leaves.items()}
            found = [call(**duals, images=IMAGES)]
            if over_reverse:
                found += torch.autograd.grad(found[0].sin().sum(), list(leaves.values()), create_graph=True)
            return dict(enumerate(torch.autograd.forward_ad.unpack_dual(t).tangent for t in found))

    assert_same(tangents(vk.patch_embed), tangents(EAGER))


# What was made under inference_mode, by a loader or a cache of features, may not be saved for the backward.

MADE_THEN = ("images", "weight", "bias", "pos_embed", "prefix", "keep")


def with_inference(made, needs, pixels):
    """A call of which `made` is an inference tensor and `needs` learns."""
    call = call_arguments(pixels=pixels) | ({"keep": KEEP} if made == "keep" else {})
    with torch.inference_mode():
        call[made] = call[made].clone()
    call[needs] = call[needs].clone().requires_grad_()
    return call


def eager_chain(images, weight, bias, pos_embed, prefix, keep=None):
    if images.dtype == torch.uint8:
        images = images / 255
    tokens = torch.nn.functional.conv2d(images, weight, bias, stride=4).flatten(2).transpose(1, 2)
    tokens = tokens + pos_embed[:, 2:]
    if keep is not None:
        tokens = tokens.gather(1, keep.clone()[..., None].expand(-1, -1, 5))
    return torch.cat([(prefix + pos_embed[:, :2]).expand(len(images), -1, -1), tokens], 1)


def gradient_or_error(function, call, needs):
    try:
        (gradient,) = torch.autograd.grad(function(**call).square().sum(), call[needs])
    except RuntimeError as error:
        if "Inference tensors cannot be saved" not in str(error):
            raise
        return None
    return gradient


@pytest.mark.parametrize(("made", "needs"), [(m, n) for m in MADE_THEN for n in MADE_THEN[:-1] if m != n])
@pytest.mark.parametrize("pixels", [torch.uint8, torch.float32], ids=["uint8", "fp32"])
def test_tensors_of_inference_mode_are_trained_on_as_eagerly(made, needs, pixels):
    """8-bit pixels and keep lists always can be; float pixels and a weight can't where the convolution needs them."""
    if needs == "images":
        pixels = torch.float32  # integers have no gradient
    call = with_inference(made, needs, pixels)
    expected = gradient_or_error(eager_chain, call, needs)
    got = gradient_or_error(vk.patch_embed, call, needs)
    if made in ("images", "weight") and needs == "bias":  # the convolution saves what it doesn't need
        assert got is not None
    else:
        assert (got is None) == (expected is None)
    if made == "keep" or (made == "images" and pixels == torch.uint8):
        assert got is not None
    if expected is not None:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


def test_second_derivatives_of_pixels_of_inference_mode():
    call = with_inference("images", "weight", torch.uint8)
    found = []
    for function in (vk.patch_embed, eager_chain):
        (first,) = torch.autograd.grad(function(**call).square().sum(), call["weight"], create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), call["weight"])[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1)


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_is_light():
    python("""if True:
        import sys, vitkernels, vitkernels.cli
        assert {"PatchEmbed", "patch_embed"} <= set(dir(vitkernels))
        heavy = {"torch", "numpy", "triton", "rich"} & set(sys.modules)
        assert not heavy, heavy
    """)


def test_a_call_on_the_cpu_starts_no_gpu():
    python("""if True:
        import sys, torch, vitkernels as vk
        def never(*args): raise AssertionError("CUDA was touched")
        torch.cuda._lazy_init = torch.cuda.init = never
        weight = torch.zeros(5, 3, 4, 4, requires_grad=True)
        vk.patch_embed(torch.zeros(1, 3, 8, 8), weight, mean=0.5).sum().backward()
        assert not torch.cuda.is_initialized()
        import vitkernels.testing.verify
        assert not {"vitkernels.backends.triton", "rich"} & set(sys.modules)
    """)
