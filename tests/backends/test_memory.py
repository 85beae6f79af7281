"""Temporary memory is what a call holds at its peak: neither what was there before, nor what it returns."""

import pytest
import torch

import vitkernels as vk
from vitkernels.backends import common
from vitkernels.bench.memory import peak_bytes

MB = 1 << 20
DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def new(device, size=MB):
    return torch.empty(size, dtype=torch.uint8, device=device)


def test_temporaries_one_after_the_other_and_at_once(device):
    def freed():
        for _ in range(3):
            new(device)

    def together():
        first, second = new(device), new(device)
        del first, second
        new(device)

    assert peak_bytes(lambda: None, device) == 0
    assert peak_bytes(freed, device) == MB
    assert peak_bytes(together, device) == 2 * MB


def test_the_result_does_not_count(device):
    buffer = new(device, 4 * MB)
    assert peak_bytes(lambda: new(device, 3 * MB), device) == 0
    assert peak_bytes(lambda: {"a": (new(device), [new(device)]), "b": 3}, device) == 0
    assert peak_bytes(lambda: new(device).clone(), device) == MB
    assert peak_bytes(lambda: buffer[:MB], device) == 0  # lived before: there is nothing to take off
    assert peak_bytes(lambda: (buffer, new(device).clone()), device) == MB

    def a_view_twice():
        whole = new(device, 4 * MB)
        return whole[:MB], whole[:MB].expand(9, MB)

    assert peak_bytes(a_view_twice, device) == 0  # as large as what it keeps alive
    assert peak_bytes(lambda: new(device, 4 * MB)[:MB], device) == 3 * MB  # three are kept for nothing


def test_what_is_freed_but_was_there_before_is_no_credit():
    held = []
    assert (
        peak_bytes(lambda: held.append(new("cpu", 8 * MB))) == 8 * MB
    )  # PyTorch tells of the end of what it saw begin

    def swap():
        held.clear()
        held.append(new("cpu"))

    assert peak_bytes(swap) == MB


def test_buffers_for_out_and_in_place_count_once(device):
    a = torch.ones(MB // 4, device=device)
    assert (
        peak_bytes(lambda: torch.mul(a, 2, out=torch.empty_like(a)), device) < 4096
    )  # PyTorch makes a tensor of the 2
    assert peak_bytes(lambda: torch.mul(a, 2, out=torch.empty_like(a)).sum().item(), device) >= MB
    assert peak_bytes(lambda: a.mul_(1), device) < 4096
    out = torch.empty_like(a)
    assert peak_bytes(lambda: torch.mul(a, 2, out=out), device) < 4096


def test_what_a_backward_needs_and_leaves_counts():
    w = torch.ones(MB // 4, requires_grad=True)
    assert MB <= peak_bytes(lambda: (w * w).sum()) < 1.1 * MB  # the product lives until it is summed
    assert MB <= peak_bytes(lambda: w.exp().sum()) < 1.1 * MB  # and is saved

    def step():
        w.grad = None
        w.exp().sum().backward()

    assert 2 * MB <= peak_bytes(step) < 2.2 * MB  # what was saved, and the gradient


def test_a_convolution_shows_what_it_reorders_and_the_fused_call_does_not():
    images, weight = torch.randn(32, 3, 224, 224), torch.randn(384, 3, 16, 16)
    position = torch.randn(197, 384)
    prefix = torch.randn(1, 384)

    def chain():
        x = torch.nn.functional.conv2d(images, weight, stride=16).flatten(2).transpose(1, 2)
        return torch.cat([prefix.expand(32, 1, -1), x], 1) + position

    result = chain().nbytes
    with torch.no_grad():
        assert peak_bytes(chain) >= result  # cat's result lives beside the sum's
        assert peak_bytes(lambda: vk.patch_embed(images, weight, pos_embed=position, prefix=prefix)) < 8 * MB


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tables_learn_without_a_copy_of_all_gradients_in_float32(dtype):
    images, weight = torch.zeros(64, 3, 32, 32, dtype=dtype), torch.zeros(768, 3, 4, 4, dtype=dtype)
    tables = {"bias": (768,), "pos_embed": (65, 768), "prefix": (1, 768)}
    learnt = {name: torch.zeros(size, dtype=dtype, requires_grad=True) for name, size in tables.items()}
    tokens = vk.patch_embed(images, weight, **learnt)
    grad = torch.randn(tokens.shape, dtype=dtype)
    found = []

    def backward():
        found[:] = torch.autograd.grad(tokens, list(learnt.values()), grad, retain_graph=True)

    assert peak_bytes(backward) < 6 * MB < 4 * grad.numel()  # 12.8
    exact = grad.double().sum(0)
    expected = exact[1:].sum(0), exact, exact[:1]
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want.view(got.shape).to(dtype))


@pytest.mark.parametrize("own", [True, False], ids=["torch.compile's", "an operator"])
@pytest.mark.parametrize("inferred", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 8), (0, 5, 8), (2, 0, 8), (7,), (0,)])
def test_what_allocates_tokens(device, own, inferred, shape, monkeypatch):
    if not own:
        monkeypatch.setattr(common, "_ON_CPU", None)
        monkeypatch.setattr(common, "_ON_GPU", None)
    beside = torch.rand(3, device=device)
    with torch.inference_mode(inferred):
        made, expected = common.empty(beside, shape, torch.bfloat16), beside.new_empty(shape, dtype=torch.bfloat16)
    for what in ("shape", "dtype", "device", "requires_grad"):
        assert getattr(made, what) == getattr(expected, what)
    assert made.stride() == expected.stride()
    assert made.is_inference() == inferred
    assert made.untyped_storage().nbytes() == expected.untyped_storage().nbytes()


def test_torch_still_has_what_allocates_tokens():
    assert common._ON_CPU is not None and common._ON_GPU is not None
