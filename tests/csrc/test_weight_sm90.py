"""The weight's gradient on sm_90a (csrc/backward/weight_sm90.cuh): random problems that it takes, against fp64."""

import random

import pytest
import torch
from host import backend
from problems import arguments, drawn_for_the_copy_engine, drawn_for_threads, on

import vitkernels as vk
from vitkernels.backends import cuda, split_k
from vitkernels.backends.common import canonical
from vitkernels.backends.cuda import backward_plan
from vitkernels.testing import accuracy

pytestmark = pytest.mark.usefixtures("poisoned")

BF16 = torch.bfloat16


@pytest.fixture
def watched(on_cuda_kernels, device, monkeypatch):
    """Call it with a number of multiprocessors to emulate: there wgmma costs nothing, nor do parts, so that small
    problems take it, too; it returns the plans that are made from then on. On a GPU it is what it is."""
    on_cuda_kernels(90)
    if device == "cuda" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the GPU is no sm_90")
    plans, true = [], backward_plan.make_plan

    def kept(*arguments, **more):
        plans.append(true(*arguments, **more))
        return plans[-1]

    monkeypatch.setattr(backward_plan, "make_plan", kept)
    if device != "cuda":
        monkeypatch.setattr(backward_plan, "COPY_COST", 0.0)
        free = tuple(tile._replace(rate=1e6) for tile in backward_plan.WGMMA_TILES)
        monkeypatch.setattr(backward_plan, "WGMMA_TILES", free)
        copied = {n: tile._replace(rate=1e6) for n, tile in backward_plan.COPIED_TILES.items()}
        monkeypatch.setattr(backward_plan, "COPIED_TILES", copied)
        monkeypatch.setattr(split_k, "PART_COST", 0.0)

    def use(count: int) -> list:
        on_cuda_kernels(90, multiprocessors=count)
        backend.forget()
        plans.clear()
        return plans

    return use


@pytest.mark.parametrize("in_groups", [False, True])
@pytest.mark.parametrize("seed", range(90))
def test_random_problem(watched, device, monkeypatch, seed, in_groups):
    call = on(device, drawn_for_the_copy_engine(seed, in_groups))
    multiprocessors = random.Random(seed).choice((1, 2, 5, 132))
    plans = watched(multiprocessors)
    monkeypatch.setattr(backward_plan, "PAIRS", seed % 3 > 0)
    rows = accuracy.compare(call, "cuda", gradients=True)
    assert [r for r in rows if not r["ok"]] == []
    assert device == "cuda" or (plans and all(plan.weight.wgmma and not plan.copy_row for plan in plans))
    if device != "cuda" and multiprocessors == 2 and seed % 3:
        assert all((plan.weight.pair == 2) == (plan.weight.tiles_k % 2 == 0) for plan in plans)


@pytest.mark.parametrize("draw", [drawn_for_the_copy_engine, drawn_for_threads])
@pytest.mark.parametrize("seed", range(40))
def test_copies_of_the_gradient_of_tokens(watched, device, monkeypatch, seed, draw):
    """Tokens in float32, as autocast keeps them: of all images at once, and of a few after the other."""
    call = draw(seed)
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    p = vk.explain(**call).problem
    rows = (p.N, p.T + p.N)[seed % 2]
    call |= {"out_dtype": torch.float32, "pos_embed": torch.randn(rows, p.D, generator=generator)}
    plans = watched(rng.choice((1, 2, 5, 132)))
    at_once = rng.choice((2, 2, 3, 6, 100))
    few = at_once * p.rows * -(-p.D // 8) * 8 * 2
    monkeypatch.setattr(backward_plan, "_fits", lambda parts, copies: copies <= few)
    rows = accuracy.compare(on(device, call), "cuda", gradients=True)
    assert [r for r in rows if not r["ok"]] == []
    assert plans and all(plan.copy_row >= p.D for plan in plans)
    assert all(min(2, p.B) <= plan.piece <= at_once for plan in plans)


@pytest.mark.parametrize(("C", "pair"), [(3, 1), (4, 2)])
def test_a_tile_without_a_neighbour(watched, device, monkeypatch, C, pair):
    """Patches of 8 pixels have a tile of each channel: of three no pairs are made."""
    call = arguments(9, C, 32, 48, 8, 72, device=device)
    plans = watched(2)
    monkeypatch.setattr(backward_plan, "PAIRS", True)
    assert [r for r in accuracy.compare(call, "cuda", gradients=True) if not r["ok"]] == []
    assert device == "cuda" or {(plan.weight.tiles_k, plan.weight.pair) for plan in plans} == {(C, pair)}


@pytest.mark.parametrize("kept", [None, 5])
def test_copies_where_nothing_is_summed(watched, device, kept):
    call = arguments(9, 3, 48, 32, 16, 72, T=2, kept=kept, out_dtype=torch.float32, device=device)
    weight = call["weight"].requires_grad_()
    plans = watched(2)
    tokens = [vk.patch_embed(**call, backend=backend) for backend in ("cuda", "reference")]
    grad = torch.randn(tokens[0].shape, generator=torch.Generator().manual_seed(0)).to(tokens[0])
    found, expected = (torch.autograd.grad(t, weight, grad)[0] for t in tokens)
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=0.1)  # of a dY that is rounded, and of one that is not
    (plan,) = plans
    assert plan.copy_row == 72 and plan.sums.table_rows == 0 and plan.indexed == (kept is not None)


@pytest.mark.parametrize("seed", range(90))
def test_pixels_copied_by_threads(watched, device, seed):
    call = on(device, drawn_for_threads(seed))
    plans = watched(random.Random(seed).choice((1, 2, 5, 132)))
    rows = accuracy.compare(call, "cuda", gradients=True)
    assert [r for r in rows if not r["ok"]] == []
    assert device == "cuda" or (plans and all(p.weight.wgmma and p.weight.pixels.chunk for p in plans))


@pytest.mark.parametrize(("pixels", "tokens"), [(torch.uint8, BF16), (BF16, BF16), (BF16, torch.float32)])
@pytest.mark.parametrize("D", [72, 264])
def test_an_index_that_is_none(watched, device, pixels, tokens, D):
    """Its row is left out of all gradients, not-a-number though it be. (On a CPU the public call would refuse it.)"""
    watched(2)
    call = arguments(9, 3, 48, 32, 16, D, T=2, pixels=pixels, kept=5, device=device, out_dtype=tokens)
    p = vk.explain(**call).problem
    tensors = canonical(*(call.get(name) for name in ("images", "weight", "bias", "pos_embed", "prefix", "keep")))
    keep, grad = tensors[5], torch.randn(p.out_shape, device=device).to(tokens)
    none = torch.zeros_like(keep, dtype=torch.bool)
    none[1, 2] = none[3, 0] = none[8, 4] = True

    def gradients(keep, grad):
        made = [None if t is None or i == 0 else torch.empty_like(t) for i, t in enumerate(tensors[:5])]
        cuda.backward(p, grad, *tensors[:5], keep, made)
        return made[1:]

    assert not grad.isnan().any()
    left_out = grad.clone()
    left_out[:, p.T :][none] = 0
    grad[:, p.T :][none] = float("nan")
    strange = keep.masked_fill(none, p.N)
    strange[3, 0] = -1
    for found, expected in zip(gradients(strange, grad), gradients(keep, left_out), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("count", [25, 40, 132])
def test_splits(watched, device, count):
    """The same bits twice, and near those of one split: parts that hold whole blocks of patches and a shorter last."""
    images = torch.rand(33, 3, 48, 80, device=device).to(BF16)
    start = torch.randn(200, 3, 16, 16, device=device).to(BF16)
    grad = torch.randn(33, 15, 200, device=device).to(BF16)

    def gradient(count: int) -> tuple[torch.Tensor, int]:
        plans = watched(count)
        weight = start.clone().requires_grad_()
        vk.patch_embed(images, weight, backend="cuda").backward(grad)
        assert device == "cuda" or plans[0].weight.wgmma
        return weight.grad, plans[0].weight.splits

    once, splits = gradient(count)
    assert torch.equal(once, gradient(count)[0])
    whole, one = gradient(1)
    assert device == "cuda" or (one == 1 and splits > 1)
    torch.testing.assert_close(once, whole, rtol=2**-7, atol=0.05)


# Of the tokens' gradient [B, N, D]: what is made of a contiguous one, and whether the kernel takes it as it lies
LAYOUTS = {
    "contiguous": (lambda g: g, True),
    "batch inside": (lambda g: g.transpose(0, 1).contiguous().transpose(0, 1), True),
    "rows cut out": (lambda g: torch.nn.functional.pad(g, (0, 8))[..., :-8], True),
    "rows a little cut out": (lambda g: torch.nn.functional.pad(g, (0, 1))[..., :-1], False),
    "begun at an odd address": (lambda g: torch.nn.functional.pad(g, (1, 7))[..., 1:-7], False),
    "channels outside": (lambda g: g.transpose(1, 2).contiguous().transpose(1, 2), False),
    "one for all channels": (lambda g: g[..., :1].expand_as(g), False),
    "one for all images": (lambda g: g[:1].expand_as(g), None),
    "one for all": (lambda g: g[:1, :1, :1].expand_as(g), False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("D", [33, 72])
def test_gradients_of_tokens_in_any_strides(watched, device, layout, D):
    """Near what comes of a contiguous one, whether it is read as it lies or copied first."""
    laid_out, taken = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(D)
    images = torch.rand(5, 3, 48, 32, generator=generator).to(BF16).to(device)
    weight = torch.randn(D, 3, 16, 16, generator=generator).to(BF16).to(device).requires_grad_()
    grad = laid_out(torch.randn(5, 6, D, generator=generator).to(BF16).to(device))

    def gradient(grad):
        plans = watched(2)
        (found,) = torch.autograd.grad(vk.patch_embed(images, weight, backend="cuda"), weight, grad)
        return found, plans[0]

    strided, plan = gradient(grad)
    copied, _ = gradient(grad.contiguous())
    torch.testing.assert_close(strided, copied, rtol=2**-7, atol=0.02)
    assert device == "cuda" or plan.weight.wgmma
    assert device == "cuda" or taken is None or (plan.copy_row == 0) == (taken and D % 8 == 0)
